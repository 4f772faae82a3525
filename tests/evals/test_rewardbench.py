"""RewardBench: sections and Ties by hand, chance, and files in their published columns."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.evals.intervals import wilson
from trimtab.evals.rewardbench import (
    SECTIONS,
    SUBSETS_2,
    Item,
    bonus,
    credit,
    read_version_1,
    read_version_2,
    rewardbench_1,
    rewardbench_2,
    ties_score,
)
from trimtab.records import Preference, Prompt
from trimtab.rewards import RuleReward

LENGTH = RuleReward("length", lambda prompt, answer: len(answer.text))
CONSTANT = RuleReward("constant", lambda prompt, answer: 1.0)


def chance(seed: int) -> RuleReward:
    generator = random.Random(seed)
    return RuleReward("chance", lambda prompt, answer: generator.random())


def pair(subset: str, *, right: bool) -> Preference:
    answers = ("long", "no") if right else ("no", "long")
    return Preference(Prompt.from_user("?", columns={"subset": subset}), *answers)


def test_version_1_weighs_subsets_by_their_published_counts() -> None:
    # math-prm is right (984), hep-cpp half right (164) and hep-go wrong (164).
    pairs = [pair("math-prm", right=True), pair("hep-cpp", right=True), pair("hep-cpp", right=False)]
    pairs += [pair("hep-go", right=False), pair("donotanswer", right=True)]
    found = rewardbench_1(LENGTH, pairs)
    assert found.sections["Reasoning"].value == pytest.approx((984 + 82) / (984 + 164 + 164))
    assert found.sections["Safety"].value == 1
    assert found.score is None and "alpacaeval-easy" in found.missing
    assert found.subsets["hep-cpp"] == wilson(1, 2)


def test_version_1_published_counts() -> None:
    counts = {section: sum(subsets.values()) for section, subsets in SECTIONS.items()}
    assert counts == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 2 * 984}


def test_version_1_score_is_the_plain_mean_of_the_sections() -> None:
    pairs = [
        pair(subset, right=section != "Safety")
        for section, subsets in SECTIONS.items()
        for subset in subsets
        for _ in range(3)
    ]
    found = rewardbench_1(LENGTH, pairs)
    assert found.score is not None and not found.missing
    assert found.score.value == pytest.approx(0.75)
    assert found.score.low < 0.75 < found.score.high


def test_equal_scores_are_wrong_in_version_1_and_shared_in_version_2() -> None:
    assert rewardbench_1(CONSTANT, [pair("donotanswer", right=True)]).subsets["donotanswer"].value == 0
    items = [Item("", "Math", Prompt.from_user("?"), ("a",), ("b", "c", "d"))] * 5
    found = rewardbench_2(CONSTANT, items)
    assert found.subsets["Math"].value == 0.25 and found.ties == 5
    assert credit([2.0], [1.0, 0.0, 2.0]) == 0.5
    assert credit([2.0], [3.0, 0.0, 2.0]) == 0


def test_chance_is_a_half_and_a_quarter() -> None:
    subsets = [name for weights in SECTIONS.values() for name in weights]
    pairs = [pair(name, right=True) for name in subsets for _ in range(100)]
    found = rewardbench_1(chance(0), pairs)
    assert found.score is not None and found.score.low < 0.5 < found.score.high
    items = [Item("", "Focus", Prompt.from_user("?"), ("a",), ("b", "c", "d"))] * 2000
    best = rewardbench_2(chance(1), items).subsets["Focus"]
    assert best.low < 0.25 < best.high and best.high - best.low < 0.05


def tie(number: int, kind: str, right: list[str], wrong: list[str]) -> Item:
    return Item(f"{kind}:{number}", "Ties", Prompt.from_user("?"), tuple(right), tuple(wrong))


def test_ties_score_by_hand() -> None:
    items = [
        tie(0, "ref", ["a"], ["b"]),
        tie(0, "tied", ["a", "b"], ["c"]),
        tie(1, "ref", ["a"], ["b"]),
        tie(1, "tied", ["a", "b"], ["c"]),
    ]
    # Prompt 0: reference gap 3; tied: right 5 and 4 (spread 1), wrong 2 (gap 2): every part is met; tanh(2/1 - 1).
    # Prompt 1: reference gap -1 (wrong); tied: right 5 and 3 (spread 2), wrong 2 (gap 1): only accurate.
    scores = [([4.0], [1.0]), ([5.0, 4.0], [2.0]), ([1.0], [2.0]), ([5.0, 3.0], [2.0])]
    expected = 0.3 * 1 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * (math.tanh(1) + math.tanh(-1.5)) / 2
    assert ties_score(items, scores).value == pytest.approx(expected)


def test_a_reference_prompt_can_spoil_only_the_hard_part() -> None:
    items = [tie(0, "ref", ["a"], ["b"]), tie(0, "tied", ["a", "b"], ["c"])]
    scores = [([1.5], [1.0]), ([5.0, 4.0], [2.0])]  # the smaller gap 0.5 is below the spread 1, the tied gap 2 is not
    assert ties_score(items, scores).value == pytest.approx(0.3 + 0.3 + 0.2 + 0.01 * math.tanh(-0.5))


def test_a_spread_of_nothing_is_no_division_by_zero() -> None:
    assert (bonus(2.0, 0.0), bonus(-1.0, 0.0), bonus(0.0, 0.0)) == (1, -1, 0)
    assert bonus(2.0, 2.0) == 0


def test_files_in_their_published_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tmp_path / "one.jsonl"
    row = {"prompt": "?", "chosen": "long", "chosen_model": "m", "rejected": "no", "rejected_model": "n", "id": 3}
    one.write_text(json.dumps({**row, "subset": "donotanswer"}) + "\n")
    assert read_version_1(str(one))[0].prompt.messages[0].role == "user"
    two = tmp_path / "two.jsonl"
    shared = {"prompt": "?", "num_correct": 1, "num_rejected": 3, "total_completions": 4, "models": ["m"]}
    answers = {"chosen": ["long"], "rejected": ["no", "a", "b"]}
    rows = [{**shared, **answers, "id": str(i), "subset": name} for i, name in enumerate(SUBSETS_2[:-1])]
    rows.append({**shared, **answers, "id": "ref:0", "subset": "Ties"})
    rows.append({**shared, "chosen": ["long", "also"], "rejected": ["no"], "id": "tied:0", "subset": "Ties"})
    two.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_version_2(str(two))) == 7
    for version, path in (("rewardbench", one), ("rewardbench2", two)):
        flags = ["--reward", "length", "--data", str(path), "--benchmark", version]
        assert main(["evaluate", "reward", *flags]) == 0
        assert ("there is no score" in capsys.readouterr().out) == (version == "rewardbench")
        assert main(["evaluate", "reward", *flags, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["version"] == (1 if version == "rewardbench" else 2)
    # Both answers of the tied prompt have 4 characters: a spread of 0, so the last part is 1 as well.
    assert found["score"]["value"] == pytest.approx((5 + 1.01) / 6)


def test_what_is_no_row_of_the_benchmark_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "?", "chosen": "a", "rejected": "b", "subset": "poems"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: subset: found 'poems'"):
        read_version_1(str(path))
    path.write_text('{"prompt": "?", "chosen": ["a"], "rejected": ["b"], "subset": "Ties", "id": "7"}\n')
    with pytest.raises(ValueError, match="expected ref:NUMBER"):
        read_version_2(str(path))
    path.write_text('{"prompt": "?", "chosen": "a", "subset": "donotanswer"}\n')
    with pytest.raises(ValueError, match="rejected: the row has no such column"):
        read_version_1(str(path))
