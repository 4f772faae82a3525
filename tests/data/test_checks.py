"""The facts of `data check`: worked by hand, against brute force, and rendered."""

import json
from io import StringIO
from itertools import pairwise, permutations
from random import Random

import pytest
from rich.console import Console

from trimtab.data.checks import Facts, facts, lengths_of, render, wilson
from trimtab.data.cycles import cycles, strong_components
from trimtab.data.files import Problem
from trimtab.records import Demonstration, Feedback, Preference, Prompt, Ranking


def prompt(text: str, line: int = 1) -> Prompt:
    return Prompt.from_user(text, source=f"rows.jsonl:{line}")


def pair(chosen: str, rejected: str, line: int = 1, asked: str = "p", **fields) -> Preference:
    return Preference(prompt(asked, line), chosen, rejected, **fields)


def test_contradictions_are_pairs_preferred_both_ways():
    found = facts([pair("a", "b", 1), pair("b", "a", 2), pair("a", "b", 3, asked="other"), pair("c", "a", 4)])
    assert found.contradictions is not None
    assert found.contradictions.count == 1
    assert found.contradictions.examples == ("rows.jsonl:1 against rows.jsonl:2",)
    assert found.cycles is not None
    assert found.cycles.count == 0


def test_a_repeated_contradiction_counts_once():
    found = facts([pair("a", "b", 1), pair("b", "a", 2), pair("b", "a", 3), pair("a", "b", 4)])
    assert found.contradictions is not None
    assert found.contradictions.count == 1


def test_confidence_below_a_half_turns_a_pair_around():
    found = facts([pair("a", "b", 1), pair("a", "b", 2, confidence=0.2)])
    assert found.contradictions is not None
    assert found.contradictions.count == 1


def test_cycles_name_the_rows_that_close_them():
    records = [pair("a", "b", 1), pair("b", "c", 2), pair("c", "a", 3), pair("c", "d", 4)]
    found = facts(records)
    assert found.cycles is not None
    assert found.cycles.count == 1
    assert sorted(found.cycles.examples[0].split(", ")) == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert facts([*records[:2], pair("c", "a", 3, confidence=0.5)]).cycles.count == 0  # type: ignore[union-attr]
    assert facts([*records[:2], pair("c", "a", 3, asked="q")]).cycles.count == 0  # type: ignore[union-attr]


def test_two_contradictions_in_a_row_are_no_cycle():
    found = facts([pair("a", "b"), pair("b", "a"), pair("b", "c"), pair("c", "b")])
    assert found.contradictions is not None and found.contradictions.count == 2
    assert found.cycles is not None and found.cycles.count == 0


def simple_cycle_exists(graph: dict[int, list[int]], nodes: range) -> bool:
    """Whether any sequence of at least three different nodes closes, by trying all of them."""
    return any(
        all(after in graph[node] for node, after in pairwise((*order, order[0])))
        for size in range(3, len(nodes) + 1)
        for order in permutations(nodes, size)
    )


@pytest.mark.parametrize("seed", range(40))
def test_cycles_agree_with_trying_everything(seed: int):
    random, nodes = Random(seed), range(5)
    graph = {n: [m for m in nodes if m != n and random.random() < 0.05 + 0.01 * seed] for n in nodes}
    found = list(cycles(graph))
    assert bool(found) == simple_cycle_exists(graph, nodes)
    for cycle in found:
        assert len(cycle) == len(set(cycle)) >= 3
        assert all(after in graph[node] for node, after in pairwise((*cycle, cycle[0])))


def test_components_reach_each_other_and_long_chains_need_no_recursion():
    assert sorted(map(sorted, strong_components({1: [2], 2: [1, 3], 3: []}))) == [[1, 2], [3]]
    ring = {n: [(n + 1) % 50_000] for n in range(50_000)}
    assert [len(cycle) for cycle in cycles(ring)] == [50_000]


def test_ties_and_how_often_the_longer_answer_wins():
    records = [
        pair("long answer", "x", 1),
        pair("two words", "y", 2),
        pair("z", "longer", 3),
        pair("same", "size", 4),
        pair("a tie counts not", "t", 5, confidence=0.5),
        pair("u", "turned around", 6, confidence=0.0),
    ]
    found = facts(records)
    assert found.ties is not None and found.ties.examples == ("rows.jsonl:5",)
    assert found.longer_wins is not None and found.longer_wins_in_words is not None
    assert (found.longer_wins.count, found.longer_wins.total, found.longer_wins.share) == (3, 4, 0.75)
    assert (found.longer_wins_in_words.count, found.longer_wins_in_words.total) == (3, 3)


def test_wilson_interval():
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(20, 20)[0] == pytest.approx(1 - 0.1611, abs=5e-5)
    assert wilson(0, 0) == (0, 1)


def test_lengths():
    found = lengths_of([*range(1, 101)])
    assert (found.minimum, found.median, found.mean, found.p95, found.maximum) == (1, 50.5, 50.5, 95, 100)
    assert lengths_of([7]).p95 == 7


def test_lengths_are_summed_up_by_field():
    found = facts([pair("abc", "d"), pair("e", "f" * 9, 2, asked="longer")])
    assert {name: (each.minimum, each.maximum) for name, each in found.lengths.items()} == {
        "prompt": (1, 6),
        "chosen": (1, 3),
        "rejected": (1, 9),
    }


def test_duplicates_are_the_same_words_by_the_same_annotator():
    same = [pair("a", "b", 1), pair("a", "b", 2, weight=2.0)]
    assert facts(same).duplicates.examples == ("rows.jsonl:2 repeats rows.jsonl:1",)
    assert facts([pair("a", "b", 1, annotator="x"), pair("a", "b", 2, annotator="y")]).duplicates.count == 0
    texts = [Demonstration(prompt("p", line), "r") for line in (1, 2, 3)]
    assert facts(texts).duplicates.count == 2


def test_rows_and_prompts_shared_with_another_file():
    other = [Demonstration(Prompt.from_user("p", source="b.jsonl:9"), "a"), Demonstration(prompt("q"), "z")]
    here = [Demonstration(prompt("p", 1), "a"), Demonstration(prompt("p", 2), "b"), Demonstration(prompt("r", 3), "a")]
    found = facts(here, against=other, against_source="b.jsonl")
    assert found.shared_rows is not None and found.shared_prompts is not None
    assert found.shared_rows.examples == ("rows.jsonl:1 = b.jsonl:9",)
    assert found.shared_prompts.examples == ("rows.jsonl:1 = b.jsonl:9", "rows.jsonl:2 = b.jsonl:9")
    assert facts(here).shared_rows is None


def test_rankings_count_their_pairs():
    found = facts([Ranking(prompt("p", 1), ("aaa", "bb", "c")), Ranking(prompt("p", 2), ("c", "aaa"))])
    assert found.longer_wins is not None and found.contradictions is not None and found.cycles is not None
    assert (found.longer_wins.count, found.longer_wins.total) == (3, 4)
    assert (found.contradictions.count, found.cycles.count) == (1, 1)


def test_feedback_has_a_share_of_wanted_answers_and_no_pairs():
    found = facts([Feedback(prompt("p", n), str(n), n == 1, annotator=f"a{n % 2}") for n in range(4)])
    assert found.desirable is not None and (found.desirable.count, found.desirable.total) == (1, 4)
    assert (found.ties, found.longer_wins, found.annotators) == (None, None, 2)


def test_empty_answers_are_counted():
    assert facts([pair(" \n", "b", 1), pair("a", "b", 2)]).empty_answers.examples == ("rows.jsonl:1",)


def test_examples_are_the_first_five():
    found = facts([pair("a", "b", line) for line in range(1, 10)]).duplicates
    assert (found.count, len(found.examples)) == (8, 5)


def checked() -> Facts:
    records = [pair("a [b]", "b", 1), pair("b", "a [b]", 2), *(pair("x", "y", line) for line in range(3, 12))]
    return facts(
        records,
        source="rows.jsonl",
        rows=12,
        skipped=[Problem("rows.jsonl:12", "chosen", "found [5], expected text")],
        notes=["a note"],
        against=records[:1],
        against_source="b.jsonl",
    )


def test_facts_are_json():
    stored = json.loads(json.dumps(checked().to_json(), allow_nan=False))
    assert stored["contradictions"] == {"count": 1, "examples": ["rows.jsonl:1 against rows.jsonl:2"]}
    assert stored["longer_wins"] == {"count": 1, "total": 2, **{k: stored["longer_wins"][k] for k in ("low", "high")}}


def test_facts_are_rendered_for_people():
    console = Console(width=120, record=True, file=StringIO())
    render(checked(), console, tokens={"tokens [max]": "at most 17 [of 20]"})
    shown = console.export_text()
    for words in [
        "12 (1 invalid)",
        "Preference, 11 records, conversations",
        "invalid: rows.jsonl:12: chosen: found [5], expected text",
        "duplicates: rows.jsonl:4 repeats rows.jsonl:3",
        "duplicates: and 3 more",
        "contradictory pairs: rows.jsonl:1 against rows.jsonl:2",
        "rows also in b.jsonl: rows.jsonl:1 = rows.jsonl:1",
        "tokens [max]",
        "at most 17 [of 20]",
        "0.500 (95% interval 0.095 to 0.905; 1 of 2)",
        "a note",
    ]:
        assert words in shown
