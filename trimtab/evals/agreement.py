"""How far annotators agree about which of two answers is better."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from trimtab.evals.intervals import Estimate, bootstrap_mean, random_numbers, wilson

Floats = NDArray[np.float64]
RESAMPLES = 2000
FEWEST_SHARED = 10
"""Two annotators are compared by kappa from so many items on that both judged."""

Units = Mapping[Hashable, Mapping[str, float]]
"""Item -> annotator -> what that annotator said of it."""


def raw_agreement(units: Units, seed: int = 0) -> Estimate:
    """The share of pairs of votes on one item that say the same, with its bootstrap interval over items.

    Every pair of votes counts alike, so an item with many votes counts more. NaN without an item that has two.
    """
    agreeing, pairs = [], []
    for votes in units.values():
        total = math.comb(len(votes), 2)
        if total:
            same = sum(math.comb(count, 2) for count in Counter(votes.values()).values())
            agreeing.append(same / total)
            pairs.append(total)
    return bootstrap_mean(agreeing, seed, weights=pairs) if pairs else Estimate(math.nan, math.nan, math.nan, 0)


def cohen(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's kappa (1960): agreement of two annotators beyond chance, `(p_o - p_e) / (1 - p_e)`.

    Chance is each annotator's own shares of the answers. NaN where both always say one and the same thing.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"kappa needs as many votes on both sides, at least one; got {len(first)} and {len(second)}")
    total = len(first)
    observed = sum(one == other for one, other in zip(first, second, strict=True)) / total
    ours, theirs = Counter(first), Counter(second)
    expected = sum(ours[said] * theirs[said] for said in ours) / total**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def mean_cohen(units: Units, fewest: int = FEWEST_SHARED) -> tuple[float, int]:
    """Kappa averaged over the pairs of annotators with enough items in common, weighted by these; and how many pairs.

    NaN and 0 where no two annotators have enough.
    """
    shared: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for votes in units.values():
        for one, other in combinations(sorted(votes), 2):
            shared[one, other].append((votes[one], votes[other]))
    kappas = [(cohen(*zip(*both, strict=True)), len(both)) for both in shared.values() if len(both) >= fewest]
    kappas = [(kappa, count) for kappa, count in kappas if math.isfinite(kappa)]
    weight = sum(count for _, count in kappas)
    return (sum(kappa * count for kappa, count in kappas) / weight if weight else math.nan), len(kappas)


def krippendorff(units: Iterable[Sequence[float]], *, is_interval: bool = False, seed: int = 0) -> Estimate:
    """Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability"), its interval over resampled units.

    `1 - D_o / D_e` from the coincidences of values within units; any number of annotators, values may be missing.
    Two values differ by 1 or 0 (nominal) or by their squared distance (`is_interval`). NaN where only one value was
    ever used. `count` is the number of units with at least two values.
    """
    paired = [unit for unit in units if len(unit) > 1]
    if not paired:
        return Estimate(math.nan, math.nan, math.nan, 0)
    values = sorted({value for unit in paired for value in unit})
    each = np.stack([coincidences(unit, values) for unit in paired])
    line = np.array(values)
    distance = (line[:, None] - line) ** 2 if is_interval else 1.0 - np.eye(len(values))
    generator = random_numbers(seed)
    drawn = generator.multinomial(len(paired), np.full(len(paired), 1 / len(paired)), size=RESAMPLES)
    resampled = (drawn.astype(np.float64) @ each.reshape(len(paired), -1)).reshape(-1, len(values), len(values))
    alphas = alpha_of(resampled, distance)
    known = alphas[np.isfinite(alphas)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(paired) > 1 and len(known) else (math.nan, math.nan)
    return Estimate(float(alpha_of(each.sum(0), distance)), float(low), float(high), len(paired))


def coincidences(unit: Sequence[float], values: Sequence[float]) -> Floats:
    """How often each value stands beside each other one in a unit, every ordered pair weighing 1 / (votes - 1)."""
    counts = np.array([list(unit).count(value) for value in values], dtype=np.float64)
    return (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)


def alpha_of(coincidence: Floats, distance: Floats) -> Floats:
    """Alpha of coincidence matrices `[..., values, values]`."""
    marginal = coincidence.sum(-1)
    total = marginal.sum(-1)
    expected = np.einsum("...c,...k,ck->...", marginal, marginal, distance) / (total - 1)
    observed = (coincidence * distance).sum((-1, -2))
    return np.where(expected > 0, 1 - observed / np.where(expected > 0, expected, 1), np.nan)


def against_majority(units: Units) -> dict[str, Estimate]:
    """How often each annotator says what most of the others say, with Wilson's interval; those with most items first.

    The annotator's own vote is left out of the majority, which would otherwise agree with itself. Items without other
    votes, or whose other votes have no single most frequent answer, say nothing.
    """
    same: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for votes in units.values():
        counts = Counter(votes.values())
        for annotator, said in votes.items():
            found = most_frequent(counts - Counter([said]))
            if found is not None:
                total[annotator] += 1
                same[annotator] += said == found
    return {name: wilson(same[name], count) for name, count in sorted(total.items(), key=lambda one: (-one[1], one[0]))}


def most_frequent(counts: Counter[float]) -> float | None:
    """The most frequent value; None where there is none, or two of them."""
    first, *others = counts.most_common(2) or [(0.0, 0)]
    return first[0] if first[1] and not (others and others[0][1] == first[1]) else None
