"""Ratings of several systems from comparisons of two: the Bradley-Terry model."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from trimtab.data.cycles import strong_components
from trimtab.evals.intervals import Estimate, random_numbers

Floats = NDArray[np.float64]
FAR = 10.0
"""A rating that is further from the mean than this, in logits, is on its way to infinity."""
MOST_STEPS = 200


@dataclass(frozen=True)
class Match:
    """Two systems on one prompt: `p` is 1 where the first won, 0 where the second did, 0.5 for a tie, or between."""

    prompt: Hashable
    first: str
    second: str
    p: float


def bradley_terry(matches: Sequence[Match], seed: int = 0, resamples: int = 1000) -> dict[str, Estimate]:
    """The ratings of Bradley & Terry 1952 in logits, their mean 0, best first: P(i beats j) = s(rating_i - rating_j).

    The maximum of the likelihood, a verdict between 0 and 1 counting as that share of a win (a tie as half of one for
    each side). Intervals are bootstrapped over prompts; a bound that a resample pushed to infinity is NaN. ValueError
    where the maximum does not exist (Ford 1957: unless every system can be reached from every other by wins).
    """
    names = sorted({name for match in matches for name in (match.first, match.second)})
    by_prompt = win_matrices(matches, names)
    wins = by_prompt.sum(0)
    check_reachable(wins, names)
    ratings = fit(wins)
    count = len(by_prompt)
    drawn = random_numbers(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    flat = drawn.astype(np.float64) @ by_prompt.reshape(count, -1)
    resampled = fit(flat.reshape(resamples, len(names), len(names)))
    low, high = bounds(resampled) if count > 1 else np.full((2, len(names)), np.nan)
    order = np.argsort(-ratings, kind="stable")
    return {names[i]: Estimate(float(ratings[i]), float(low[i]), float(high[i]), count) for i in order}


def bounds(resampled: Floats) -> tuple[Floats, Floats]:
    """The central 95 % of resampled ratings `[R, k]`; NaN where it does not end.

    If one rating of a resample has no maximum, the others' distances from the mean have none either.
    """
    endless = np.abs(resampled).max(-1) > FAR
    resampled = np.sort(np.where(endless[:, None], np.copysign(np.inf, resampled), resampled), axis=0)
    last = len(resampled) - 1
    low, high = resampled[math.floor(0.025 * last)], resampled[math.ceil(0.975 * last)]
    return np.where(np.isfinite(low), low, np.nan), np.where(np.isfinite(high), high, np.nan)


def win_matrices(matches: Sequence[Match], names: Sequence[str]) -> Floats:
    """Wins of the row's system against the column's, for each prompt: `[prompts, systems, systems]`."""
    place = {name: index for index, name in enumerate(names)}
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(match.prompt for match in matches))}
    wins = np.zeros((len(prompts), len(names), len(names)))
    for match in matches:
        i, j = place[match.first], place[match.second]
        wins[prompts[match.prompt], i, j] += match.p
        wins[prompts[match.prompt], j, i] += 1 - match.p
    return wins


def fit(wins: Floats) -> Floats:
    """Ratings of win matrices, `[..., k, k]` to `[..., k]`: Newton's method with bounded steps, the mean held at 0.

    Where a maximum does not exist, ratings stop somewhere beyond `FAR`.
    """
    games = wins + np.swapaxes(wins, -1, -2)
    count = wins.shape[-1]
    ratings = np.zeros(wins.shape[:-1])
    for _ in range(MOST_STEPS):
        said = expit(ratings[..., :, None] - ratings[..., None, :])
        gradient = (wins - games * said).sum(-1)
        weight = games * said * (1 - said)
        curvature = np.eye(count) * (weight.sum(-1)[..., None] + 1e-12) - weight
        # The likelihood does not change when all ratings move together: the added matrix fixes that direction.
        step = np.linalg.solve(curvature + 1 / count, gradient[..., None])[..., 0]
        step *= np.minimum(1, 1 / np.maximum(np.abs(step).max(-1, keepdims=True), 1e-300))
        ratings = np.clip(ratings + step, -3 * FAR, 3 * FAR)
        if np.abs(step).max() < 1e-12:
            break
    return ratings - ratings.mean(-1, keepdims=True)


def check_reachable(wins: Floats, names: Sequence[str]) -> None:
    """ValueError, naming the systems, unless each has won, by others in between, against each other one."""
    graph = {name: [names[j] for j in np.flatnonzero(row).tolist()] for name, row in zip(names, wins, strict=True)}
    groups = sorted((sorted(group) for group in strong_components(graph)), key=str)
    if len(groups) > 1:
        shown = "; ".join(", ".join(group) for group in groups)
        raise ValueError(
            f"no finite ratings: between these groups of systems all wins go one way, or nobody met: {shown}"
        )
