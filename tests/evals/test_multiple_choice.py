"""Multiple choice: prompts as they are worded, accuracies by hand, changes paired, the shared sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.evals.choices import Question, pick
from trimtab.evals.multiple_choice import change, multiple_choice, read_questions
from trimtab.records import Prompt
from trimtab.rewards import RuleReward

SHARED = Path(__file__).parents[2] / "../shared/data"

MMLU = [
    {"subject": "high_school", "split": "dev", "question": "1 + 1?", "choices": ["1", "2"], "answer": 1},
    {"subject": "high_school", "split": "test", "question": "2 + 2?", "choices": ["4", "5"], "answer": 0},
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def knows(*names: str) -> RuleReward:
    """Right on some groups, wrong on the others."""

    def score(prompt: Prompt, answer) -> float:
        return float((answer.text == prompt.columns["right"]) == (prompt.columns["group"] in names))

    return RuleReward("+".join(names), score)


def question(group: str) -> Question:
    return Question(Prompt.from_text("?", columns={"group": group, "right": "a"}), ("a", "b"), 0, group)


def test_counts_and_changes_by_hand() -> None:
    asked = [question("x")] * 6 + [question("y")] * 4
    before, after = multiple_choice(knows("x"), asked), multiple_choice(knows("y"), asked)
    assert (before.accuracy.value, after.accuracy.value) == (0.6, 0.4)
    assert {name: (one.value, one.count) for name, one in before.groups.items()} == {"x": (1, 6), "y": (0, 4)}
    changed = change(after, before, asked)
    assert changed.difference.value == pytest.approx(-0.2)
    assert (changed.lost, changed.gained) == (6, 4)
    assert changed.groups["x"].value == -1
    same = change(before, before, asked)
    assert (same.difference.value, same.lost, same.gained) == (0, 0, 0)
    assert same.difference.low < 0 < same.difference.high, "ten questions do not prove that nothing changed"


def test_ties_are_fractions_and_lengths_can_be_divided_out() -> None:
    asked = [Question(Prompt.from_text("?"), ("a", "bb", "cc", "dd"), 0)] * 3
    assert multiple_choice(RuleReward("constant", lambda prompt, answer: 1.0), asked).accuracy.value == 0.25
    # A likelihood of -2 a character: the shorter choice is likelier as a whole, and the first of them per character.
    likelihood = RuleReward("likelihood", lambda prompt, answer: -2.0 * len(answer.text) - (answer.text == "a"))
    rows = [(one.prompt, one.choices) for one in asked]
    assert pick(likelihood, rows)[0] == (0,)
    assert pick(likelihood, rows, per_character=True)[0] == (1, 2, 3)


def test_the_words_of_a_question(tmp_path: Path) -> None:
    path = write(tmp_path / "mmlu.jsonl", MMLU)
    (asked,) = read_questions(path, shots=1).questions
    assert asked.prompt.text == (
        "The following are multiple choice questions (with answers) about high school.\n\n"
        "1 + 1?\nA. 1\nB. 2\nAnswer: B\n\n2 + 2?\nA. 4\nB. 5\nAnswer:"
    )
    assert (asked.choices, asked.right, asked.group) == ((" A", " B"), 0, "high_school")
    (chatted,) = read_questions(path, shots=0, chat=True).questions
    assert not chatted.prompt.is_text and chatted.choices == ("A", "B")
    assert "1 + 1" not in chatted.prompt.text
    with pytest.raises(ValueError, match="fewer than 2 rows of split dev"):
        read_questions(path, shots=2)


def test_choices_in_the_text_or_among_the_targets(tmp_path: Path) -> None:
    rows = [
        {"task": "dates", "input": "When?\nOptions:\n(A) May\n(B) June", "target": "(B)"},
        {"task": "walks", "input": "Back?\nOptions:\n- Yes\n- No", "target": "No"},
        {"task": "sports", "input": "Plausible?", "target": "yes"},
        {"task": "sports", "input": "And this?", "target": "no"},
        {"task": "count", "input": "How many?", "target": "3"},
        {"task": "sort", "input": "Sort: b a", "target": "a b"},
        *({"task": "sort", "input": f"Sort: {i}", "target": f"x{i}"} for i in range(10)),
    ]
    read = read_questions(write(tmp_path / "bbh.jsonl", rows), shots=0)
    assert [one.choices for one in read.questions] == [
        (" (A)", " (B)"),
        (" Yes", " No"),
        (" no", " yes"),
        (" no", " yes"),
    ]
    assert [one.right for one in read.questions] == [1, 1, 1, 0]
    assert read.left_out == 12
    with pytest.raises(ValueError, match="--shots 0"):
        read_questions(str(tmp_path / "bbh.jsonl"), shots=5)


def test_other_forms_and_what_is_none(tmp_path: Path) -> None:
    mc1 = write(tmp_path / "mc1.jsonl", [{"question": "Why?", "mc1": [["So", 0], ["Because", 1]]}])
    (asked,) = read_questions(mc1, shots=0).questions
    assert (asked.prompt.text, asked.choices, asked.right) == ("Q: Why?\nA:", (" So", " Because"), 1)
    plain = write(tmp_path / "plain.jsonl", [{"prompt": "Sky:", "choices": [" red", " blue"], "answer": " blue"}])
    assert read_questions(plain, shots=0).questions[0].right == 1
    with pytest.raises(ValueError, match="answer: found 2, expected int"):
        read_questions(write(tmp_path / "bad.jsonl", [{**MMLU[1], "answer": 2}]), shots=0)
    with pytest.raises(ValueError, match="found the columns text"):
        read_questions(write(tmp_path / "text.jsonl", [{"text": "a"}]), shots=0)


@pytest.mark.parametrize(
    ("name", "shots", "count", "left_out", "groups"),
    [("mmlu_subset", 5, 456, 0, 57), ("bbh_subset", 0, 450, 270, 5), ("truthfulqa", 0, 398, 0, 1)],
)
def test_the_shared_sets_are_read_as_they_are(name: str, shots: int, count: int, left_out: int, groups: int) -> None:
    path = SHARED / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared/data")
    read = read_questions(str(path), shots=shots)
    assert (len(read.questions), read.left_out) == (count, left_out)
    assert len({one.group for one in read.questions}) == groups
    assert all(0 <= one.right < len(one.choices) for one in read.questions)


def test_the_command_compares_a_model_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["evaluate", "multiple-choice", "--model", "tiny", "--before", "tiny", "--dtype", "float32"]
    flags += ["--device", "cpu", "--data", write(tmp_path / "mmlu.jsonl", MMLU), "--shots", "1"]
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["change"]["difference"]["value"] == 0 and found["after"] == found["before"]
    assert main(flags) == 0
    assert "0 questions were right only before" in capsys.readouterr().out
