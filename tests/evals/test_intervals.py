"""Intervals: hand values, limits, and how often they hold what they claim to hold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from trimtab.evals.intervals import (
    Estimate,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
    difference,
    jackknife,
    share_difference,
    to_json,
    weighted_mean,
    wilson,
)


def test_wilson_hand_value() -> None:
    # 8 of 10 at 95 %: the textbook interval (0.4902, 0.9433).
    estimate = wilson(8, 10)
    assert (estimate.value, estimate.count) == (0.8, 10)
    assert estimate.low == pytest.approx(0.4902, abs=1e-4)
    assert estimate.high == pytest.approx(0.9433, abs=1e-4)


def test_wilson_stays_inside_and_never_shrinks_to_a_point() -> None:
    none, every = wilson(0, 20), wilson(20, 20)
    assert none.low == 0 and none.high == pytest.approx(0.1611, abs=1e-4)
    assert every.high == 1 and every.low == pytest.approx(1 - none.high)


def test_wilson_covers_the_share_it_estimates() -> None:
    generator = np.random.default_rng(0)
    for share, total in [(0.5, 40), (0.9, 40), (0.05, 100)]:
        bounds = [wilson(k, total) for k in range(total + 1)]
        drawn = generator.binomial(total, share, size=4000)
        covered = np.mean([bounds[k].low <= share <= bounds[k].high for k in drawn])
        assert 0.92 <= covered <= 0.99


def test_bootstrap_covers_the_mean_it_estimates() -> None:
    generator = np.random.default_rng(0)
    for draw, mean in [(generator.standard_normal, 0.0), (generator.standard_exponential, 1.0)]:
        estimates = [bootstrap_mean(draw(40), seed, 500) for seed in range(600)]
        covered = np.mean([estimate.low <= mean <= estimate.high for estimate in estimates])
        assert 0.90 <= covered <= 0.98


def test_bootstrap_agrees_with_the_normal_interval_of_many_values() -> None:
    values = np.random.default_rng(1).normal(3, 2, 2000)
    estimate = bootstrap_mean(values, seed=0, resamples=4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.006)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.006)


def test_weights_make_a_ratio_of_sums() -> None:
    # 10 nats over 5 tokens and 2 nats over 1 token: 12 nats over 6 tokens.
    assert bootstrap_mean([2.0, 2.0], weights=[5, 1]).value == 2
    assert bootstrap_mean([3.0, 1.0], weights=[1, 3]).value == pytest.approx(1.5)
    # Resampled together, a constant ratio has no spread.
    constant = bootstrap_mean([2.0] * 9, weights=range(1, 10))
    assert (constant.low, constant.high) == (2, 2)


def test_pairing_sees_what_separate_intervals_hide() -> None:
    generator = np.random.default_rng(2)
    prompt = generator.normal(0, 10, 100)
    first, second = prompt + 0.5 + generator.normal(0, 0.5, 100), prompt
    assert bootstrap_difference(first, second).low > 0
    assert bootstrap_mean(first).low < bootstrap_mean(second).high


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_mean(values, seed=7) == bootstrap_mean(values, seed=7)
    assert bootstrap_mean(values, seed=7) != bootstrap_mean(values, seed=8)
    assert bootstrap_mean(values, seed=-7) not in (bootstrap_mean(values, seed=7), bootstrap_mean(values, seed=8))


def test_one_value_has_no_interval_and_json_has_no_nan() -> None:
    estimate = bootstrap_mean([0.25])
    assert estimate.value == 0.25 and math.isnan(estimate.low)
    assert json.loads(json.dumps(estimate.to_dict(), allow_nan=False)) == {
        "value": 0.25,
        "low": None,
        "high": None,
        "count": 1,
    }
    assert wilson(0, 0).to_dict() == {"value": None, "low": None, "high": None, "count": 0}


def test_format() -> None:
    assert str(Estimate(0.611, 0.579, 0.642, 500)) == "0.61 [0.58, 0.64]"
    assert f"{Estimate(0.611, 0.579, 0.642, 500):.1f}" == "0.6 [0.6, 0.6]"


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="level"):
        wilson(1, 4, level=95)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean([1.0, float("nan")])
    with pytest.raises(ValueError, match="3 and 2"):
        bootstrap_difference([1, 2, 3], [1, 2])


def test_combined_shares_by_hand() -> None:
    one, two = Estimate(0.5, 0.4, 0.7, 10), Estimate(0.8, 0.5, 0.9, 20)
    mean = weighted_mean([one, two], [3, 1])
    assert mean.value == pytest.approx(0.575) and mean.count == 30
    assert mean.low == pytest.approx(0.575 - math.hypot(0.75 * 0.1, 0.25 * 0.3))
    assert mean.high == pytest.approx(0.575 + math.hypot(0.75 * 0.2, 0.25 * 0.1))
    apart = difference(one, two)
    assert apart.low == pytest.approx(-0.3 - math.hypot(0.1, 0.1))
    assert apart.high == pytest.approx(-0.3 + math.hypot(0.2, 0.3))


def test_newcombes_published_example() -> None:
    # Newcombe 1998, table II (a), method 10: 56/70 against 48/80 has the interval 0.0524 to 0.3339.
    apart = difference(wilson(56, 70), wilson(48, 80))
    assert (apart.low, apart.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_combined_shares_cover_what_they_estimate() -> None:
    generator = np.random.default_rng(4)
    shares, totals, weights = (0.95, 0.6, 0.3), (40, 30, 60), (2.0, 1.0, 1.0)
    true = float(np.average(shares, weights=weights))
    drawn = generator.binomial(totals, shares, size=(2000, 3))
    found = [weighted_mean([wilson(k, n) for k, n in zip(row, totals, strict=True)], weights) for row in drawn]
    assert 0.93 <= np.mean([one.low <= true <= one.high for one in found]) <= 0.98


def test_bootstrap_of_a_mean_as_a_statistic_is_the_bootstrap_of_the_mean() -> None:
    values = np.random.default_rng(5).normal(size=60)
    general = bootstrap_statistic(lambda rows: float(values[rows].mean()), 60, resamples=4000)
    mean = bootstrap_mean(values, resamples=4000)
    assert (general.value, general.low, general.high) == pytest.approx((mean.value, mean.low, mean.high), abs=0.03)


def test_bootstrap_of_a_ratio_covers_it() -> None:
    generator = np.random.default_rng(6)

    def covers(seed: int) -> bool:
        values = generator.exponential(size=(60, 2)) * (2.0, 1.0)
        found = bootstrap_statistic(lambda rows: float(values[rows, 0].sum() / values[rows, 1].sum()), 60, seed, 300)
        return found.low <= 2 <= found.high

    assert 0.90 <= np.mean([covers(seed) for seed in range(300)]) <= 0.98


def test_jackknife_of_a_mean_is_the_normal_interval() -> None:
    values = np.random.default_rng(7).normal(size=30)
    found = jackknife(float(values.mean()), [np.delete(values, i).mean() for i in range(30)])
    half = 1.959964 * values.std(ddof=1) / math.sqrt(30)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_results_go_to_json() -> None:
    written = to_json({"a": [Estimate(1.0, math.nan, 2.0, 3)], "b": (math.inf, None, "x")})
    assert written == {"a": [{"value": 1.0, "low": None, "high": 2.0, "count": 3}], "b": [None, None, "x"]}


def test_paired_shares_by_hand() -> None:
    # Of 10 pairs 4 differ one way and 1 the other: (5 / 12, 2 / 12) after adding one to each.
    first, second = [1] * 4 + [0] + [1] * 5, [0] * 4 + [1] + [1] * 5
    found = share_difference(first, second)
    half = 1.959964 * math.sqrt((7 / 12 - (3 / 12) ** 2) / 12)
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half))
    same = share_difference([1, 0, 1], [1, 0, 1])
    assert same.value == 0 and same.low == -same.high < -0.3
    assert share_difference([1] * 5, [0] * 5).high == 1
    assert share_difference([1, 0.5], [0, 0]) == bootstrap_difference([1, 0.5], [0, 0])


def test_paired_shares_cover_what_they_estimate() -> None:
    generator = np.random.default_rng(8)
    covered = []
    for _ in range(2000):
        drawn = generator.choice(4, size=30, p=[0.6, 0.25, 0.05, 0.1])
        found = share_difference(drawn < 2, (drawn == 0) | (drawn == 2))
        covered.append(found.low <= 0.2 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.99
