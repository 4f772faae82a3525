"""What a win rate would be if both systems' answers were equally long.

A logistic regression explains each verdict by which system is which and by how much longer the first answer is; the
length-controlled win rate is what it says at no difference.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from trimtab.evals.intervals import CELLS_PER_CHUNK, Estimate, random_numbers

Floats = NDArray[np.float64]
RIDGE = 0.01
"""A normal prior of standard deviation 10 on the weight of length: it only matters where length explains everything."""
LARGEST_STEP = 2.0
MOST_STEPS = 100


@dataclass(frozen=True)
class LengthControlled:
    """The win rate at equal lengths, and the weight of length: logits for an answer that is much longer."""

    rate: Estimate
    weight: Estimate

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"rate": self.rate.to_dict(), "length_weight": self.weight.to_dict()}


def length_controlled(
    p: ArrayLike, difference: ArrayLike, prompts: Sequence[Hashable], seed: int = 0, resamples: int = 1000
) -> LengthControlled | None:
    """The length-controlled win rate of Dubois et al. 2024 (arXiv 2404.04475, eq. 2), intervals over prompts.

    P(first is better) = s(theta + phi * tanh(d / std(d))), `s` the logistic function, `d` the difference of lengths;
    the rate is `s(theta)`. `p` are the verdicts, from 0 to 1, one a comparison.

    Deviations: no term for the difficulty of an instruction (it needs the verdicts on many systems), and a weak ridge
    on `phi` alone in the place of their regularization. Where all lengths are equal the rate is the plain one. None
    where all differences are the same number other than 0: nothing can tell length from system there.
    """
    verdicts, differences = np.asarray(p, dtype=np.float64), np.asarray(difference, dtype=np.float64)
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    if not spread and differences.any():
        return None
    lengths = np.tanh(differences / spread) if spread else differences
    places = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    groups = np.array([places[prompt] for prompt in prompts])
    theta, phi = fit(verdicts, lengths, np.ones((1, len(verdicts))))
    drawn = resampled_weights(groups, seed, resamples)
    parts = np.array_split(drawn, max(1, drawn.size // CELLS_PER_CHUNK))
    thetas, phis = (
        np.concatenate(found) for found in zip(*(fit(verdicts, lengths, part) for part in parts), strict=True)
    )
    count = int(groups.max()) + 1
    return LengthControlled(around(expit(theta[0]), expit(thetas), count), around(phi[0], phis, count))


def resampled_weights(groups: NDArray[np.intp], seed: int, resamples: int) -> Floats:
    """How often each row counts when its group is drawn with replacement, `[resamples, rows]`."""
    count = int(groups.max()) + 1
    drawn = random_numbers(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn[:, groups].astype(np.float64)


def around(value: float, resampled: Floats, count: int) -> Estimate:
    """An estimate with the percentile interval of its resamples; unknown for a single observation."""
    low, high = np.quantile(resampled, [0.025, 0.975]) if count > 1 else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high), count)


def fit(p: Floats, x: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """`theta` and `phi` of every row of weights, `[R]` each: Newton's method on the log-likelihood, steps bounded.

    `weights` is `[R, rows]`. Where all verdicts with weight are 0 or all are 1, theta has no bound: it stops where
    the logistic function is 0 or 1 to eight digits.
    """
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(MOST_STEPS):
        said = expit(theta[:, None] + phi[:, None] * x)
        error, slope = weights * (p - said), weights * said * (1 - said)
        first, second = error.sum(-1), (error * x).sum(-1) - RIDGE * phi
        a, b, c = slope.sum(-1), (slope * x).sum(-1), (slope * x * x).sum(-1) + RIDGE
        determinant = np.maximum(a * c - b * b, 1e-12)
        step = np.stack([c * first - b * second, a * second - b * first]) / determinant
        step *= np.minimum(1, LARGEST_STEP / np.maximum(np.abs(step).max(0), 1e-300))
        theta, phi = np.clip(theta + step[0], -20, 20), phi + step[1]
        if np.abs(step).max() < 1e-10:
            break
    return theta, phi
