"""Is there one latent reward at all? Circles in preferences, against those that noise alone would make.

If every answer has one worth and people err around it, circles (a over b, b over c, c over a) come from errors, and how
much people err shows where two of them judge the same two answers. More circles than that cannot come from one reward.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import root_scalar
from scipy.special import expit

from trimtab.evals.intervals import CELLS_PER_CHUNK, random_numbers

Floats = NDArray[np.float64]
COIN_FLIPS = 0.25
"""The share of circular triads where every choice is a coin flip (Kendall & Babington Smith 1940)."""
LARGEST_SPREAD = 50.0
SIMULATIONS = 999

Answer = Hashable
Tally = tuple[int, int]
"""Votes for the first answer, and for the second; ties are left out."""


@dataclass(frozen=True)
class Transitivity:
    """Circular triads among `triads` of answers of which each two have a majority, and what one reward would give.

    `expected`, `low` and `high` are the mean and the central 95 % of the share under one reward with the errors that
    repeated votes show; `p_value` is the chance of at least as many circles there. All four are None where no two
    answers have two votes: then errors cannot be told from circles.
    """

    triads: int
    circular: int
    agreement: float | None
    expected: float | None
    low: float | None
    high: float | None
    p_value: float | None

    @property
    def share(self) -> float | None:
        """The share of circular triads; None without triads."""
        return self.circular / self.triads if self.triads else None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        names = ("triads", "circular", "share", "agreement", "expected", "low", "high", "p_value")
        return {**{name: getattr(self, name) for name in names}, "coin_flips": COIN_FLIPS}


@dataclass(frozen=True)
class Design:
    """Which answers were compared, as numbers: `pairs` `[pairs, 2]` answers, `triads` `[triads, 3]` pairs.

    A triad of answers a, b, c is its pairs (a, b), (b, c), (a, c), so that it is circular where the first two go one
    way and the third the other.
    """

    answers: int
    pairs: NDArray[np.intp]
    triads: NDArray[np.intp]


def transitivity(
    tallies: Mapping[Hashable, Mapping[tuple[Answer, Answer], Tally]], *, seed: int = 0, simulations: int = SIMULATIONS
) -> Transitivity:
    """The test, from the votes on every two answers to every prompt.

    Null: the worth of answers is normal around its prompt's mean, each vote is Bradley-Terry. The one free number, the
    spread of the worths, is set by how often two votes on the same two answers agree. Then votes of the same design are
    simulated and the circles of majorities counted (without the triads in which a pair has none). An own test;
    deviation from an exact one: the spread counts as known.
    """
    design, votes = design_of(tallies)
    observed = circles(design, (votes[None, :, 0] - votes[None, :, 1]))
    triads, circular = int(observed[0, 0]), int(observed[0, 1])
    agreement = agreement_of(votes)
    if agreement is None or not triads:
        return Transitivity(triads, circular, agreement, None, None, None, None)
    found = simulated(design, votes.sum(-1), spread_of(agreement), simulations, seed)
    shares = found[:, 1] / np.maximum(found[:, 0], 1)
    low, high = np.quantile(shares, [0.025, 0.975])
    as_many = int((shares >= circular / triads - 1e-12).sum())
    p_value = (1 + as_many) / (1 + simulations)
    return Transitivity(triads, circular, agreement, float(shares.mean()), float(low), float(high), p_value)


def design_of(
    tallies: Mapping[Hashable, Mapping[tuple[Answer, Answer], Tally]],
) -> tuple[Design, NDArray[np.intp]]:
    """The answers, pairs and triads of all prompts, and the votes `[pairs, 2]`."""
    pairs: list[tuple[int, int]] = []
    votes: list[Tally] = []
    triads: list[tuple[int, int, int]] = []
    answers = 0
    for compared in tallies.values():
        number = {answer: answers + i for i, answer in enumerate(dict.fromkeys(a for two in compared for a in two))}
        answers += len(number)
        place: dict[tuple[int, int], int] = {}
        for (first, second), (ours, theirs) in compared.items():
            one, other = number[first], number[second]
            place[min(one, other), max(one, other)] = len(pairs)
            pairs.append((min(one, other), max(one, other)))
            votes.append((ours, theirs) if one < other else (theirs, ours))
        triads += triads_of(place)
    design = Design(answers, as_table(pairs, 2), as_table(triads, 3))
    return design, as_table(votes, 2)


def triads_of(place: Mapping[tuple[int, int], int]) -> list[tuple[int, int, int]]:
    """The triads of answers of which each two were compared, as the numbers of their pairs."""
    above: dict[int, list[int]] = {}
    for one, other in sorted(place):
        above.setdefault(one, []).append(other)
    return [
        (place[a, b], place[b, c], place[a, c])
        for a, others in above.items()
        for b, c in combinations(others, 2)
        if (b, c) in place
    ]


def as_table(rows: Sequence[tuple[int, ...]], width: int) -> NDArray[np.intp]:
    return np.array(rows, dtype=np.intp).reshape(-1, width)


def circles(design: Design, lead: NDArray[np.intp]) -> NDArray[np.intp]:
    """Triads with three majorities, and the circular ones among them, `[S, 2]`, from votes ahead `[S, pairs]`."""
    signs = np.sign(lead).astype(np.int8)
    ab, bc, ac = (signs[:, column] for column in design.triads.T)
    decided = (ab != 0) & (bc != 0) & (ac != 0)
    circular = decided & (ab == bc) & (ac == -ab)
    return np.stack([decided.sum(-1), circular.sum(-1)], axis=-1)


def agreement_of(votes: NDArray[np.intp]) -> float | None:
    """The share of pairs of votes on the same two answers that say the same; None where no pair has two votes."""
    total = votes.sum(-1)
    pairs = (total * (total - 1) // 2).sum()
    return float((votes * (votes - 1) // 2).sum() / pairs) if pairs else None


def spread_of(agreement: float) -> float:
    """The standard deviation of worths at which two votes on two answers agree this often, `E[p^2 + (1 - p)^2]`."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)

    def excess(spread: float) -> float:
        p = expit(np.sqrt(2) * spread * nodes)
        return float((weights * (p**2 + (1 - p) ** 2)).sum() / weights.sum()) - agreement

    if excess(0.0) >= 0:
        return 0.0
    if excess(LARGEST_SPREAD) <= 0:
        return LARGEST_SPREAD
    return float(root_scalar(excess, bracket=(0.0, LARGEST_SPREAD)).root)


def simulated(design: Design, totals: NDArray[np.intp], spread: float, simulations: int, seed: int) -> NDArray[np.intp]:
    """The triads and circles of `simulations` sets of votes that one reward makes, `[simulations, 2]`."""
    generator = random_numbers(seed)
    chunk = max(1, CELLS_PER_CHUNK // max(design.answers, len(design.pairs), len(design.triads), 1))
    found = []
    for start in range(0, simulations, chunk):
        worths = spread * generator.standard_normal((min(chunk, simulations - start), design.answers))
        chance = expit(worths[:, design.pairs[:, 0]] - worths[:, design.pairs[:, 1]])
        ours = generator.binomial(totals, chance)
        found.append(circles(design, 2 * ours - totals))
    return np.concatenate(found)
