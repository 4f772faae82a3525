"""Estimates with the interval that their sample supports: Wilson's for shares, the bootstrap's for means.

What is combined from independent estimates gets its interval from theirs; what is no mean is bootstrapped or
jackknifed as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

CELLS_PER_CHUNK = 2_000_000
"""Resampled counts that are held at a time, so that many values and many resamples fit in memory."""


@dataclass(frozen=True)
class Estimate:
    """A number, the interval around it and how many observations it rests on.

    `low` and `high` are NaN where the sample is too small to say anything (one observation of a mean, none of a share).
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]" if spec else str(self)

    def to_dict(self) -> dict[str, float | int | None]:
        """The same for JSON, which knows no NaN: None stands for an unknown bound."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()} | {
            "count": self.count
        }


def wilson(successes: float, total: int, level: float = 0.95) -> Estimate:
    """A share with the score interval of Wilson 1927, which neither leaves [0, 1] nor shrinks to a point at 0 or 1."""
    check_level(level)
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}: successes must lie between 0 and the total")
    if total == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    z = float(norm.ppf(0.5 + level / 2))
    share = successes / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # At 0 and 1 the bound equals the share exactly; rounding must not push it past.
    return Estimate(share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share), total)


def bootstrap_mean(
    values: ArrayLike,
    seed: int = 0,
    resamples: int = 2000,
    *,
    level: float = 0.95,
    weights: ArrayLike | None = None,
) -> Estimate:
    """A mean with the percentile bootstrap interval (Efron 1979) over its observations.

    Deviation: the percentile deviations from the mean are widened by sqrt(count / (count - 1)), because a resample's
    variance is the biased one. `weights` make it the ratio of sums `sum(w v) / sum(w)`, resampled together. Give one
    value per independent observation: where a prompt has several answers, their mean.
    """
    check_level(level)
    observed = finite_vector(values, "values")
    counted = np.ones_like(observed) if weights is None else finite_vector(weights, "weights")
    if counted.shape != observed.shape:
        raise ValueError(f"{len(counted)} weights for {len(observed)} values")
    if (counted < 0).any() or not counted.any():
        raise ValueError("weights must not be negative, nor all zero")
    value = float(observed @ counted / counted.sum())
    count = len(observed)
    if count == 1:
        return Estimate(value, math.nan, math.nan, 1)
    means = resampled_means(observed, counted, seed, resamples)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    widen = math.sqrt(count / (count - 1))
    return Estimate(value, value + widen * float(low - value), value + widen * float(high - value), count)


def bootstrap_difference(
    first: ArrayLike, second: ArrayLike, seed: int = 0, resamples: int = 2000, *, level: float = 0.95
) -> Estimate:
    """The mean of `first - second` over paired observations (the same prompts), with its bootstrap interval.

    Pairing removes what the two have in common, so that a difference shows which two separate intervals would hide.
    """
    left, right = finite_vector(first, "first"), finite_vector(second, "second")
    if left.shape != right.shape:
        raise ValueError(f"a paired difference needs as many values on both sides, got {len(left)} and {len(right)}")
    return bootstrap_mean(left - right, seed, resamples, level=level)


def bootstrap_statistic(
    statistic: Callable[[NDArray[np.int64]], float], count: int, seed: int = 0, resamples: int = 1000
) -> Estimate:
    """Any figure of `count` observations with its 95 % percentile bootstrap interval.

    `statistic` computes it from the indices of the observations, repeats among them. The widening is that of
    `bootstrap_mean`; resamples for which the figure does not exist (NaN) are left out.
    """
    if count < 1:
        raise ValueError("a bootstrap needs at least one observation")
    value = float(statistic(np.arange(count)))
    if count == 1:
        return Estimate(value, math.nan, math.nan, 1)
    generator = random_numbers(seed)
    drawn = np.array([statistic(generator.integers(count, size=count)) for _ in range(resamples)])
    kept = drawn[np.isfinite(drawn)]
    if not len(kept):
        return Estimate(value, math.nan, math.nan, count)
    low, high = np.quantile(kept, [0.025, 0.975])
    widen = math.sqrt(count / (count - 1))
    return Estimate(value, value + widen * float(low - value), value + widen * float(high - value), count)


def jackknife(value: float, without: ArrayLike) -> Estimate:
    """A figure with its 95 % normal interval from what it is without each observation (Tukey 1958).

    For figures that drawing an observation twice would change, such as how many different ones there are.
    """
    left = finite_vector(without, "without")
    count = len(left)
    if count == 1:
        return Estimate(value, math.nan, math.nan, 1)
    half = float(norm.ppf(0.975)) * math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
    return Estimate(value, value - half, value + half, count)


def weighted_mean(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """`sum_i w_i x_i / sum_i w_i` of independent estimates, with an interval made of theirs (`combined`)."""
    total = math.fsum(weights)
    if not total > 0 or min(weights) < 0:
        raise ValueError("weights must not be negative, nor all zero")
    return combined(estimates, [weight / total for weight in weights])


def difference(first: Estimate, second: Estimate) -> Estimate:
    """`first - second` of two independent estimates, with an interval made of theirs; of two shares, Newcombe's."""
    return combined([first, second], [1.0, -1.0])


def combined(estimates: Sequence[Estimate], factors: Sequence[float]) -> Estimate:
    """`sum_i f_i x_i` of independent estimates with the interval of Zou and Donner 2008 (MOVER).

    The distances of the estimates from their bounds are added in quadrature, below and above apart, so that Wilson's
    bounds keep their asymmetry. `count` is the number of all observations.
    """
    value = math.fsum(factor * one.value for factor, one in zip(factors, estimates, strict=True))
    below, above = [], []
    for factor, one in zip(factors, estimates, strict=True):
        down, up = factor * (one.value - one.low), factor * (one.high - one.value)
        below.append(down if factor >= 0 else -up)
        above.append(up if factor >= 0 else -down)
    count = sum(one.count for one in estimates)
    return Estimate(value, value - math.hypot(*below), value + math.hypot(*above), count)


def to_json(value: Any) -> Any:
    """Results as JSON has them: estimates and other dataclasses as objects, numbers that are not finite as null."""
    if isinstance(value, Estimate):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: to_json(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def share_difference(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Estimate:
    """The difference of two shares on the same observations, given as 0 and 1; its 95 % interval is never a point.

    Bonett and Price 2012: Wald's interval with one observation added to each of the two ways of differing. Where
    fractions are among the values, `bootstrap_difference`.
    """
    left, right = finite_vector(first, "first"), finite_vector(second, "second")
    if left.shape != right.shape or not (np.isin(left, (0, 1)).all() and np.isin(right, (0, 1)).all()):
        return bootstrap_difference(left, right, seed)
    count, value = len(left), float((left - right).mean())
    gained, lost = ((float((sign * (left - right) > 0).sum()) + 1) / (count + 2) for sign in (1, -1))
    half = float(norm.ppf(0.975)) * math.sqrt((gained + lost - (gained - lost) ** 2) / (count + 2))
    low, high = max(gained - lost - half, -1.0), min(gained - lost + half, 1.0)
    return Estimate(value, min(low, value), max(high, value), count)


def resampled_means(
    values: NDArray[np.float64], weights: NDArray[np.float64], seed: int, resamples: int
) -> NDArray[np.float64]:
    """The weighted means of `resamples` samples drawn with replacement, `[resamples]`."""
    generator = random_numbers(seed)
    chunk = max(1, CELLS_PER_CHUNK // len(values))
    means = []
    for start in range(0, resamples, chunk):
        drawn = generator.integers(len(values), size=(min(chunk, resamples - start), len(values)))
        weight = weights[drawn]
        total = weight.sum(-1)
        # A resample that drew nothing with weight says nothing; it is left out rather than divided by zero.
        means.append(((values[drawn] * weight).sum(-1)[total > 0]) / total[total > 0])
    return np.concatenate(means)


def random_numbers(seed: int) -> np.random.Generator:
    """The random numbers of a seed, which may be negative as everywhere else; NumPy takes none below zero."""
    return np.random.default_rng(seed % 2**64)


def finite_vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """The values as a float64 vector of at least one finite number."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name} must be a list of at least one number, got shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} must be finite, got {vector[~np.isfinite(vector)][0]}")
    return vector


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is a probability between 0 and 1 such as 0.95, got {level}")
