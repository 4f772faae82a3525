"""Consistency: a planted position bias with its sign, published figures of real judges, paraphrases by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.evals.consistency import (
    Judged,
    judge_consistency,
    paraphrase_consistency,
    read_paraphrases,
    read_verdicts,
)
from trimtab.rewards import RuleReward

SHARED = Path(__file__).parents[2] / "../shared/data"


def verdicts(count: int, seed: int, *, leans: float, first: bool = True) -> list[Judged]:
    """A judge that knows the better output with probability 0.8, and leans to a place with another."""
    generator = random.Random(seed)

    def says(label: int, shown_first: int) -> int:
        if generator.random() < leans:
            return shown_first if first else 3 - shown_first
        return label if generator.random() < 0.8 else 3 - label

    made = []
    for _ in range(count):
        label = generator.choice((1, 2))
        made.append(Judged(says(label, 1), says(label, 2), label))
    return made


@pytest.mark.parametrize("first", [True, False])
def test_a_planted_position_bias_is_found_with_its_sign(first: bool) -> None:
    found = judge_consistency("leans", verdicts(400, 0, leans=0.4, first=first))
    assert found.position.found == ("first" if first else "second")
    # Leaning 0.4 of the time puts 0.4 + 0.6 / 2 of the verdicts on one place.
    assert found.position.first_wins.low < (0.7 if first else 0.3) < found.position.first_wins.high


def test_a_clean_judge_stays_silent() -> None:
    found = [judge_consistency("clean", verdicts(200, seed, leans=0)).position.found for seed in range(40)]
    assert sum(side is not None for side in found) <= 5


def test_counts_by_hand() -> None:
    pairs = [Judged(1, 1, 1), Judged(1, 2, 1), Judged(2, 2, 1), Judged(None, 1, 1), Judged(0, 0, None)]
    found = judge_consistency("by hand", pairs)
    assert found.consistent.value == pytest.approx(3 / 5) and found.unreadable == 1
    # For the first: 1/2, 1, 1/2, 1/2 (ties); one order alone tells nothing. The order decides the second pair alone.
    assert found.position.first_wins.value == pytest.approx(2.5 / 4) and found.position.flipped.value == 1 / 4
    assert found.accuracy is not None and found.accuracy.value == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert found.right_both is not None and found.right_both.value == 1 / 4
    assert judge_consistency("unlabelled", [Judged(1, 2, None)]).accuracy is None


def test_real_judges_have_their_published_figures() -> None:
    """LLMBar's own statistics: accuracy in each order and in both, and the share of equal verdicts."""
    path = SHARED / "judge_llmbar.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared/data")
    published = json.loads((SHARED / "llmbar_published_stats.json").read_text())
    compared = 0
    for judge, pairs in read_verdicts(str(path)).items():
        for group in {pair.group for pair in pairs}:
            expected = published.get(group, {}).get(judge)
            if expected is None:
                continue
            found = judge_consistency(judge, [pair for pair in pairs if pair.group == group])
            figures = {
                "correct_False": found.accuracy_given,
                "correct_True": found.accuracy_swapped,
                "correct_both": found.right_both,
                "equal": found.consistent,
            }
            for name, estimate in figures.items():
                assert estimate is not None
                share = float(expected[name].rpartition("= ")[2].rstrip("%")) / 100
                assert estimate.value == pytest.approx(share, abs=1e-3), (group, judge, name)
                compared += 1
    assert compared >= 40


@pytest.mark.parametrize("name", ["judge_mtbench_human"])
def test_the_other_shared_set_is_read_as_it_is(name: str) -> None:
    path = SHARED / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in ../shared/data")
    found = read_verdicts(str(path))
    assert len(found) == 4 and all(len(pairs) == 126 for pairs in found.values())


def test_paraphrases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "a?", "paraphrases": ["b?", "c?"], "choices": ["yes", "no"]},
        {"prompt": "a?", "paraphrases": ["a ?"], "chosen": "yes", "rejected": "no"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = read_paraphrases(str(path))
    by_letter = RuleReward("b", lambda prompt, answer: float((answer.text == "no") == ("b" in prompt.text)))
    found = paraphrase_consistency(by_letter, asked)
    # The first question: of three pairs of wordings only a and c agree; the second: its one pair does.
    assert found.agreement.value == pytest.approx((1 / 3 + 1) / 2)
    assert found.unanimous.value == 0.5 and found.ties == 0
    constant = paraphrase_consistency(RuleReward("constant", lambda prompt, answer: 0.0), asked)
    assert constant.agreement.value == 0 and constant.ties == 5
    assert main(["evaluate", "consistency", "--data", str(path), "--reward", "length", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"]["value"] == 1
    assert main(["evaluate", "consistency", "--data", str(path)]) == 2
    assert "either --model" in capsys.readouterr().err


def test_the_command_on_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "?", "output_1": "a", "output_2": "b", "label": 1, "verdicts": {"first": [1, 2], "wise": [1, 1]}}
    path.write_text((json.dumps(row) + "\n") * 20)
    flags = ["evaluate", "consistency", "--data", str(path)]
    assert main(flags) == 0
    assert "shown first" in capsys.readouterr().out
    assert main([*flags, "--reward", "length"]) == 2
    assert "no effect" in capsys.readouterr().err
    path.write_text(json.dumps({**row, "verdicts": {"odd": ["A", "B"]}}) + "\n")
    with pytest.raises(ValueError, match="of odd, expected two of"):
        read_verdicts(str(path))
