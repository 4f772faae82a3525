"""Length bias: counts by hand, a planted bias with its sign, and clean rewards that stay silent."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.evals.length_bias import length_bias, slope
from trimtab.records import Preference, Prompt
from trimtab.rewards import RuleReward


def pairs(count: int, seed: int, *, longer_is_better: float = 0.7) -> list[Preference]:
    """Pairs whose better answer begins with "good"; it is the longer one with the probability given."""
    generator = random.Random(seed)
    made = []
    for _ in range(count):
        short, long = generator.randint(10, 40), generator.randint(50, 120)
        better, worse = (long, short) if generator.random() < longer_is_better else (short, long)
        made.append(Preference(Prompt.from_text("?"), "good" + "x" * better, "evil" + "x" * worse))
    return made


def noisy(seed: int, *, per_character: float, noise: float = 1.0) -> RuleReward:
    """Quality plus noise plus a planted price or prize for every character."""
    generator = random.Random(seed)

    def score(prompt: Prompt, answer) -> float:
        return answer.text.startswith("good") + generator.gauss(0, noise) + per_character * len(answer.text)

    return RuleReward("noisy", score)


@pytest.mark.parametrize(("per_character", "favours"), [(0.02, "longer"), (-0.02, "shorter")])
def test_a_planted_bias_is_found_with_its_sign(per_character: float, favours: str) -> None:
    found = length_bias(noisy(0, per_character=per_character), pairs(600, 1))
    assert found.favours == favours
    assert found.slope is not None and found.slope.low * found.slope.high > 0
    assert (found.slope.value > 0) == (found.bias.value > 0) == (per_character > 0)


def test_a_clean_reward_stays_silent_although_people_prefer_longer_answers() -> None:
    alarms = 0
    for seed in range(40):
        found = length_bias(noisy(seed, per_character=0), pairs(300, 100 + seed, longer_is_better=0.8))
        assert found.people_prefer_longer.low > 0.6
        alarms += found.favours != "neither"
    assert alarms <= 5, "about one in twenty is chance"


def test_by_hand() -> None:
    rows = [("aaaa", "a"), ("aaaa", "a"), ("a", "aa"), ("aa", "aaaa"), ("bb", "aa")]
    found = length_bias(
        RuleReward("length", lambda prompt, answer: len(answer.text)),
        [Preference(Prompt.from_text("?"), *row) for row in rows],
    )
    assert (found.right_where_longer.value, found.right_where_shorter.value, found.bias.value) == (1, 0, 1)
    assert (found.prefers_longer.value, found.people_prefer_longer.value) == (1, 0.5)
    assert found.people_prefer_longer.count == 4, "pairs of equal length are on no side"


def test_slope_by_hand() -> None:
    line = slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert line is not None and line.value == pytest.approx(2)
    assert slope([1.0, 1.0], [0.0, 2.0]) is None


def test_one_kind_of_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match="pairs of the other kind"):
        length_bias(noisy(0, per_character=0), pairs(5, 0, longer_is_better=1.0))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "?", "chosen": p.chosen, "rejected": p.rejected} for p in pairs(30, 3)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["evaluate", "length-bias", "--reward", "length", "--data", str(data)]
    assert main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["favours"] == "longer"
    assert main(flags) == 0
    assert "it favours the longer answer" in capsys.readouterr().out
