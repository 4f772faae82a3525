"""Bradley-Terry ratings: a logistic regression, Zermelo's own iteration, hand values, and what has no maximum."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from trimtab.evals.ratings import Match, bradley_terry, fit


def simulated(ratings: list[float], games: int, seed: int) -> list[Match]:
    """Matches between random systems; a tenth are ties, some verdicts lie between."""
    generator = np.random.default_rng(seed)
    found = []
    for game in range(games):
        i, j = generator.choice(len(ratings), 2, replace=False)
        chance = 1 / (1 + math.exp(ratings[j] - ratings[i]))
        p = float(generator.choice([float(generator.random() < chance), 0.5, chance], p=[0.8, 0.1, 0.1]))
        found.append(Match(game, f"s{i}", f"s{j}", p))
    return found


def logistic_regression(matches: list[Match], names: list[str]) -> np.ndarray:
    """One row a match, +1 for the first system and -1 for the second, no intercept, by a general optimizer."""
    design = np.zeros((len(matches), len(names)))
    for row, match in zip(design, matches, strict=True):
        row[names.index(match.first)], row[names.index(match.second)] = 1, -1
    p = np.array([match.p for match in matches])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = design @ weights
        value = (np.logaddexp(0, logits) - p * logits).sum()
        return float(value), design.T @ (1 / (1 + np.exp(-logits)) - p)

    found = minimize(loss, np.zeros(len(names)), jac=True, method="BFGS", options={"gtol": 1e-10}).x
    return found - found.mean()


@pytest.mark.parametrize("seed", range(3))
def test_ratings_are_a_logistic_regression(seed: int) -> None:
    matches = simulated([0.0, 0.7, -0.4, 1.5], 300, seed)
    found = bradley_terry(matches, resamples=10)
    names = sorted(found)
    assert [found[name].value for name in names] == pytest.approx(logistic_regression(matches, names), abs=1e-6)
    assert list(found) == sorted(found, key=lambda name: -found[name].value)


def test_ratings_are_the_fixed_point_of_zermelos_iteration() -> None:
    """p_i <- W_i / sum_j n_ij / (p_i + p_j): Bradley & Terry's own way, and its likelihood never falls."""
    wins = np.random.default_rng(0).integers(1, 20, (4, 4)) * (1.0 - np.eye(4))
    games, strength, last = wins + wins.T, np.ones(4), -math.inf
    for _ in range(3000):
        share = strength[:, None] / (strength[:, None] + strength)
        likelihood = (wins * np.log(share)).sum()
        assert likelihood >= last - 1e-9
        last = likelihood
        strength = wins.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        strength /= strength.sum()
    expected = np.log(strength)
    assert fit(wins) == pytest.approx(expected - expected.mean(), abs=1e-9)


def test_two_systems_by_hand() -> None:
    matches = [Match(i, "a", "b", p) for i, p in enumerate([1.0, 1.0, 1.0, 0.0])]
    found = bradley_terry(matches, resamples=50)
    assert found["a"].value == pytest.approx(math.log(3) / 2) and found["b"].value == pytest.approx(-math.log(3) / 2)
    half = bradley_terry([Match(0, "a", "b", 0.5)])
    assert half["a"].value == 0 and math.isnan(half["a"].low)


def test_a_tie_is_half_a_win_for_each() -> None:
    tied = [Match(0, "a", "b", 1.0), Match(1, "b", "a", 0.5), Match(2, "a", "b", 0.0), Match(3, "a", "b", 1.0)]
    wins = fit(np.array([[0.0, 2.5], [1.5, 0.0]]))
    assert bradley_terry(tied, resamples=5)["a"].value == pytest.approx(wins[0])


@pytest.mark.parametrize(
    "matches",
    [
        [Match(0, "a", "b", 1.0), Match(1, "b", "c", 0.5)],
        [Match(0, "a", "b", 0.5), Match(1, "c", "d", 0.5)],
        [Match(0, "a", "b", 1.0)],
    ],
)
def test_without_a_maximum_the_groups_are_named(matches: list[Match]) -> None:
    with pytest.raises(ValueError, match=r"no finite ratings: between these groups.*: a(, b)?; (b|c)"):
        bradley_terry(matches)


def test_an_interval_without_end_is_unknown() -> None:
    matches = [Match(i, "a", "b", float(i > 0)) for i in range(12)]
    found = bradley_terry(matches)
    assert math.isnan(found["a"].high) and math.isnan(found["b"].low)
    assert math.isfinite(found["a"].low) and found["a"].to_dict()["high"] is None
    others = [Match(i, "b", "c", float(i % 2)) for i in range(12)]
    three = bradley_terry([*matches, *others])
    # Where "a" has no bound, neither has the distance of the others from the mean.
    assert all(math.isnan(three[name].low) and math.isfinite(three[name].high) for name in "bc")


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    truth, covered, trials = [0.5, 0.0, -0.5], 0, 200
    for seed in range(trials):
        found = bradley_terry(simulated(truth, 300, seed), seed, resamples=400)
        covered += sum(found[f"s{i}"].low <= rating <= found[f"s{i}"].high for i, rating in enumerate(truth))
    assert 0.92 <= covered / (3 * trials) <= 0.975
