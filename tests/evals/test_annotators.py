"""What votes say together: contradictions, circles, split items, and the forms that they are read from."""

import json
from pathlib import Path

import pytest

from trimtab.data.votes import Vote, read_votes
from trimtab.evals.annotators import agreement
from trimtab.records import Prompt

PROMPT = Prompt.from_text("Which?", source="rows.jsonl:1")


def vote(first: str, second: str, annotator: str, value: float = 1.0) -> Vote:
    assert first < second
    return Vote(PROMPT, first, second, annotator, value)


def written(tmp_path: Path, *rows: dict) -> str:
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_of_it_by_hand() -> None:
    votes = [
        *(vote("a", "b", name) for name in ("x", "y", "z")),
        *(vote("b", "c", name) for name in ("x", "y")),
        *(vote("a", "c", name, 0.0) for name in ("x", "y")),
        *(vote("a", "d", name, value) for name, value in (("x", 1.0), ("y", 0.0))),
        vote("b", "d", "x", 1.0),
        vote("b", "d", "x", 0.0),
        vote("c", "d", "x", 0.5),
    ]
    found = agreement(votes)
    assert (found.votes, found.items, found.shared_items) == (12, 6, 4)
    # Pairs of votes that agree: 3 of 3, 1 of 1, 1 of 1, 0 of 1.
    assert found.raw.value == pytest.approx(5 / 6)
    assert found.contradictions.count == 1 and found.contradictions.examples == ("rows.jsonl:1 (x)",)
    assert found.split.count == 2  # a against d, and b against d by one who said both
    assert found.cycles.count == 1 and found.cycles.examples == ("rows.jsonl:1: 3 answers",)
    assert found.transitivity.circular == 1
    told = json.loads(json.dumps(found.to_dict()))
    assert told["krippendorff_alpha"]["count"] == 4 and told["annotators"]["z"]["value"] == 1


def test_one_annotator_alone_has_nobody_to_agree_with() -> None:
    with pytest.raises(ValueError, match="none of 2 items was judged by two annotators"):
        agreement([vote("a", "b", "x"), vote("b", "c", "x")])


def test_rows_with_an_annotator(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "b", "rejected": "a", "annotator": "x"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "annotator": "y", "confidence": 0.5},
        {"prompt": "p", "chosen": "a", "rejected": "b", "annotator": 7, "confidence": 0.2},
    ]
    found = read_votes(written(tmp_path, *rows))
    assert [(one.first, one.second, one.annotator, one.value) for one in found] == [
        ("a", "b", "x", 0.0),
        ("a", "b", "y", 0.5),
        ("a", "b", "7", 0.0),
    ]


def test_rows_with_all_votes_of_a_pair(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "output_1": "z", "output_2": "y", "annotators": [1, 0, 2, None], "majority": 2},
        {"prompt": "p", "chosen": "y", "rejected": "x", "votes": [[4, 1], [9, 0], [2, 0.5]]},
    ]
    found = read_votes(written(tmp_path, *rows))
    assert [(one.first, one.annotator, one.value) for one in found] == [
        *(("y", f"annotator {n}", value) for n, value in ((1, 0.0), (2, 0.5), (3, 1.0))),
        *(("x", name, value) for name, value in (("4", 0.0), ("9", 1.0), ("2", 0.5))),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "votes.jsonl:1: annotator: found none"),
        ({"prompt": "p", "output_1": "z", "output_2": "y", "annotators": [3]}, r"annotators\[0\]: found 3"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "votes": [[1, 2]]}, r"votes\[0\]: found \[1, 2\]"),
        ({"prompt": "p"}, "columns: found prompt"),
    ],
)
def test_what_is_no_vote_is_named(tmp_path: Path, row: dict, expected: str) -> None:
    source = written(tmp_path, row)
    with pytest.raises(ValueError, match=expected):
        read_votes(source)
    with pytest.raises(ValueError, match="found no votes"):
        read_votes(source, skip_invalid=True)
