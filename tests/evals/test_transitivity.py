"""One latent reward or not: hand-made circles, planted rock-paper-scissors, and quiet where there is one reward."""

from itertools import combinations

import numpy as np
import pytest
from scipy.special import expit

from trimtab.evals.transitivity import agreement_of, design_of, spread_of, transitivity

Tallies = dict[int, dict[tuple[int, int], tuple[int, int]]]


def votes(worths: np.ndarray, voters: int, generator: np.random.Generator) -> Tallies:
    """Bradley-Terry votes on every two answers of every prompt, `worths` `[prompts, answers]`."""
    found: Tallies = {}
    for prompt, line in enumerate(worths):
        found[prompt] = {}
        for one, other in combinations(range(len(line)), 2):
            ours = int(generator.binomial(voters, expit(line[one] - line[other])))
            found[prompt][one, other] = (ours, voters - ours)
    return found


def test_circles_by_hand() -> None:
    # a > b > c > a, and d below all of them: of the four triads one is circular.
    tallies = {"p": {("a", "b"): (3, 0), ("c", "b"): (0, 3), ("c", "a"): (3, 0)}}
    tallies["p"] |= {("d", name): (0, 3) for name in "abc"}
    found = transitivity(tallies)
    assert (found.triads, found.circular, found.share) == (4, 1, 0.25)
    assert found.agreement == 1 and found.p_value is not None and found.p_value < 0.01
    turned = {"p": {two[::-1]: tally[::-1] for two, tally in tallies["p"].items()}}
    assert (transitivity(turned).triads, transitivity(turned).circular) == (4, 1)


def test_a_pair_without_a_majority_makes_no_triad() -> None:
    found = transitivity({0: {(0, 1): (1, 1), (1, 2): (2, 0), (0, 2): (2, 0)}})
    assert found.triads == 0 and found.share is None and found.p_value is None


def test_without_repeated_votes_nothing_is_claimed() -> None:
    found = transitivity({0: {(0, 1): (1, 0), (1, 2): (1, 0), (0, 2): (0, 1)}})
    assert (found.triads, found.circular) == (1, 1)
    assert found.agreement is None and found.expected is None and found.p_value is None


@pytest.mark.parametrize(("spread", "within"), [(0.0, 0.2), (0.3, 0.12), (1.0, 0.12), (3.0, 0.12)])
def test_the_spread_is_found_again(spread: float, within: float) -> None:
    generator = np.random.default_rng(2)
    tallies = votes(generator.normal(0, spread, (4000, 2)), 6, generator)
    agreement = agreement_of(design_of(tallies)[1])
    assert agreement is not None and spread_of(agreement) == pytest.approx(spread, abs=within)


def test_agreement_by_hand() -> None:
    # 3 pairs of votes, 1 of them agreeing; then 1 pair, agreeing; single votes say nothing.
    assert agreement_of(np.array([[2, 1], [0, 2], [1, 0]])) == pytest.approx(2 / 4)
    assert agreement_of(np.array([[1, 0]])) is None
    assert spread_of(1.0) == 50 and spread_of(0.4) == 0


def test_a_planted_circle_is_found() -> None:
    """Each prompt has three answers that beat each other in turn, seven times in ten."""
    generator = np.random.default_rng(3)
    tallies: Tallies = {}
    for prompt in range(60):
        ahead = generator.binomial(7, 0.7, 3)
        tallies[prompt] = {
            (0, 1): (int(ahead[0]), int(7 - ahead[0])),
            (1, 2): (int(ahead[1]), int(7 - ahead[1])),
            (0, 2): (int(7 - ahead[2]), int(ahead[2])),
        }
    found = transitivity(tallies, simulations=299)
    assert found.share is not None and found.high is not None
    assert found.share > found.high and found.p_value is not None and found.p_value < 0.01


def test_one_reward_is_seldom_denied() -> None:
    """Many noisy circles are not called proof: under one reward about one p-value in twenty is below 0.05."""
    generator = np.random.default_rng(4)
    found = [
        transitivity(votes(generator.normal(0, spread, (30, 4)), 3, generator), simulations=99, seed=trial)
        for trial, spread in enumerate([0.5, 1.0, 2.0] * 30)
    ]
    denied = sum(one.p_value is not None and one.p_value <= 0.05 for one in found)
    assert denied <= 10
    assert sum(one.circular for one in found) > 100
