"""Win rates at equal lengths: against a general optimizer, planted length preferences, and the limits."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from trimtab.evals.length_control import RIDGE, fit, length_controlled


def planted(theta: float, phi: float, count: int, seed: int, shift: float = 300.0) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts that follow the model, with first answers that are `shift` characters longer on average."""
    generator = np.random.default_rng(seed)
    difference = generator.normal(shift, 400.0, count).round()
    lengths = np.tanh(difference / difference.std(ddof=1))
    return (generator.random(count) < expit(theta + phi * lengths)).astype(float), difference


def literal_fit(p: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    def loss(parameters: np.ndarray) -> float:
        logits = parameters[0] + parameters[1] * x
        return float((weights * (np.logaddexp(0, logits) - p * logits)).sum() + RIDGE * parameters[1] ** 2 / 2)

    return minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x


@pytest.mark.parametrize("seed", range(3))
def test_newton_finds_what_a_general_optimizer_finds(seed: int) -> None:
    generator = np.random.default_rng(seed)
    p, x = generator.random(60), np.tanh(generator.normal(0.3, 1, 60))
    weights = generator.integers(0, 4, (2, 60)).astype(float)
    theta, phi = fit(p, x, weights)
    for row in range(2):
        assert [theta[row], phi[row]] == pytest.approx(literal_fit(p, x, weights[row]), abs=1e-6)


def test_a_planted_length_preference_is_taken_out() -> None:
    p, difference = planted(0.0, 1.5, 1500, seed=1)
    found = length_controlled(p, difference, range(1500))
    assert found is not None
    assert p.mean() > 0.6
    assert found.rate.low < 0.5 < found.rate.high and found.rate.high - found.rate.low < 0.1
    assert found.weight.low > 0 and found.weight.value == pytest.approx(1.5, abs=0.4)


def test_a_better_system_stays_better_and_a_clean_judge_has_no_weight() -> None:
    p, difference = planted(0.8, 0.0, 1500, seed=2)
    found = length_controlled(p, difference, range(1500))
    assert found is not None
    assert found.rate.low < expit(0.8) < found.rate.high and found.rate.low > 0.5
    assert found.weight.low < 0 < found.weight.high


def test_equal_lengths_change_nothing() -> None:
    p = np.array([1.0, 0.5, 0.0, 1.0, 1.0, 0.25])
    found = length_controlled(p, np.zeros(6), range(6))
    assert found is not None and found.rate.value == pytest.approx(p.mean(), abs=1e-9) and found.weight.value == 0


def test_exchanging_the_systems_exchanges_the_rate() -> None:
    p, difference = planted(0.4, 0.8, 200, seed=3)
    one, other = length_controlled(p, difference, range(200)), length_controlled(1 - p, -difference, range(200))
    assert one is not None and other is not None
    assert one.rate.value + other.rate.value == pytest.approx(1, abs=1e-9)
    assert one.weight.value == pytest.approx(other.weight.value, abs=1e-8)


def test_what_length_explains_entirely_stays_finite() -> None:
    found = length_controlled([1.0, 1.0, 0.0, 0.0], [50, 20, -30, -40], range(4))
    assert found is not None and 0.2 < found.rate.value < 0.8 and 1 < found.weight.value < 50
    always = length_controlled(np.ones(8), np.arange(8) - 3.0, range(8))
    assert always is not None and always.rate.value > 0.999


def test_one_and_the_same_difference_says_nothing() -> None:
    assert length_controlled([1.0, 0.0, 1.0], [10, 10, 10], range(3)) is None
    assert length_controlled([1.0], [10], range(1)) is None


def test_answers_to_one_prompt_are_drawn_together() -> None:
    p, difference = planted(0.5, 0.5, 60, seed=4)
    alone = length_controlled(p, difference, range(60))
    tripled = length_controlled(np.tile(p, 3), np.tile(difference, 3), [*range(60)] * 3)
    assert alone is not None and tripled is not None and tripled.rate.count == 60
    width, tripled_width = (found.rate.high - found.rate.low for found in (alone, tripled))
    # The differences' standard deviation divides by rows minus one, which moves the last digits.
    assert tripled_width == pytest.approx(width, rel=0.05)
