"""Win rates: by hand, what is left out, and intervals that cover."""

import math

import numpy as np
import pytest

from trimtab.evals.shares import share_over_prompts
from trimtab.evals.win_rate import Judged, by_pair, win_rate


def judged(*values: float | None, lengths: tuple[int, int] = (5, 5)) -> list[Judged]:
    return [Judged(place, "new", "old", value, *lengths) for place, value in enumerate(values)]


def test_ties_count_half_and_are_reported() -> None:
    found = win_rate(judged(1.0, 0.5, 0.0, 1.0, 0.5, 0.75, None))
    assert found.rate.value == pytest.approx((1 + 0.5 + 0 + 1 + 0.5 + 0.75) / 6)
    assert (found.wins, found.ties, found.losses, found.unjudged) == (3, 2, 1, 1)
    assert found.rate.count == 6 and found.lengths == (5, 5)
    assert found.length_controlled is not None
    assert found.length_controlled.rate.value == pytest.approx(found.rate.value, abs=1e-9)


def test_the_two_sides_add_to_one() -> None:
    rows = judged(1.0, 0.5, 0.0, 0.9, 0.2, 1.0)
    one, other = win_rate(rows), win_rate([row.exchanged() for row in rows])
    assert one.rate.value + other.rate.value == pytest.approx(1)
    assert one.rate.low + other.rate.high == pytest.approx(1)
    assert (one.wins, one.losses) == (other.losses, other.wins)


def test_no_verdict_at_all_is_an_error_and_unknown_lengths_are_none() -> None:
    with pytest.raises(ValueError, match="none of 2 comparisons of new and old has a verdict"):
        win_rate(judged(None, None))
    found = win_rate([Judged(0, "a", "b", 1.0), Judged(1, "a", "b", 0.0)])
    assert found.lengths is None and found.length_controlled is None
    assert found.to_dict()["length_controlled"] is None


def test_pairs_are_told_in_one_order() -> None:
    rows = [Judged(0, "a", "b", 1.0, 3, 4), Judged(1, "b", "a", 0.25, 5, 6), Judged(2, "a", "c", None)]
    first, second = by_pair(rows)
    assert first == [rows[0], Judged(1, "a", "b", 0.75, 6, 5)] and second == [rows[2]]


def test_answers_to_one_prompt_are_one_observation() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 0.5]
    once = share_over_prompts(values, range(6))
    thrice = share_over_prompts(values * 3, [*range(6)] * 3)
    assert thrice == once and once.count == 6


def test_unanimous_verdicts_are_not_certain() -> None:
    for value in (0.0, 0.5, 1.0):
        found = share_over_prompts([value] * 10, range(10))
        assert found.value == value and found.high - found.low > 0.2
    assert share_over_prompts([0.0, 1.0] * 10, sorted([*range(10)] * 2)).high > 0.6  # one of two in every prompt
    assert math.isnan(share_over_prompts([], []).value)


@pytest.mark.parametrize("mean", [0.5, 0.8])
def test_intervals_cover_the_truth_about_95_times_in_100(mean: float) -> None:
    """80 prompts with two comparisons each, which share their prompt's difficulty; a tenth are ties."""
    generator = np.random.default_rng(0)
    covered, trials = 0, 400
    for trial in range(trials):
        chance = generator.beta(2 * mean, 2 * (1 - mean), 80).repeat(2)
        values = np.where(generator.random(160) < 0.1, chance, generator.random(160) < chance)
        found = share_over_prompts(values.tolist(), np.arange(80).repeat(2).tolist(), seed=trial)
        covered += found.low <= mean <= found.high
    assert 0.92 <= covered / trials <= 0.975
