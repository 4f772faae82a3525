"""Position bias: planted with either sign, and a clean control."""

import numpy as np
import pytest

from trimtab.evals.position_bias import position_bias
from trimtab.judges import Verdict


def verdicts(bias: float, count: int, seed: int) -> list[Verdict]:
    """A noisy judge of answers of different worth: P(it says the one shown first) rises by `bias` in either order."""
    generator = np.random.default_rng(seed)
    worth = generator.random(count) * 0.6 + 0.2
    in_order = generator.random(count) < worth + bias
    exchanged = generator.random(count) < worth - bias
    return [Verdict(float(one), float(other)) for one, other in zip(in_order, exchanged, strict=True)]


def test_by_hand() -> None:
    said = [Verdict(1.0, 1.0), Verdict(1.0, 0.0), Verdict(0.5, 0.0), Verdict(0.0, 0.0), Verdict(None, 1.0)]
    found = position_bias(said, range(5))
    # The one shown first wins 1/2, 1, 3/4 and 1/2 of the time; only the second comparison changed sides.
    assert found.first_wins.value == pytest.approx((0.5 + 1 + 0.75 + 0.5) / 4)
    assert found.flipped.value == 0.25 and found.flipped.count == 4
    assert [verdict.value for verdict in said] == [1.0, 0.5, 0.25, 0.0, None]


@pytest.mark.parametrize(("bias", "favours"), [(0.15, "first"), (-0.15, "second")])
def test_a_planted_bias_has_the_right_sign(bias: float, favours: str) -> None:
    found = position_bias(verdicts(bias, 400, seed=1), range(400))
    assert found.found == favours and found.first_wins.value == pytest.approx(0.5 + bias, abs=0.05)


def test_a_clean_judge_stays_silent() -> None:
    """However noisy: at most about one in twenty clean judges is called biased."""
    false_alarms = sum(position_bias(verdicts(0.0, 100, seed), range(100)).found is not None for seed in range(100))
    assert false_alarms <= 10
    sure = [Verdict(1.0, 1.0), Verdict(0.0, 0.0)] * 50
    assert position_bias(sure, range(100)).found is None


def test_two_comparisons_prove_nothing() -> None:
    assert position_bias([Verdict(1.0, 0.0)] * 2, range(2)).found is None
    nothing = position_bias([], [])
    assert nothing.found is None and nothing.to_dict()["first_wins"]["value"] is None
