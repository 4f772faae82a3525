"""Whether a reward's margins mean what Bradley and Terry say: sigmoid(margin) = P(the better answer scores higher)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from trimtab.evals.intervals import Estimate, bootstrap_statistic, wilson


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence: how sure the reward was of them, and how often it was right."""

    low: float
    high: float
    confidence: float
    accuracy: Estimate


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error and the bins that it is made of; empty bins are left out.

    The interval of the error is a bootstrap over pairs. The error itself is biased upwards in small samples: chance
    alone parts accuracy from confidence.
    """

    error: Estimate
    bins: tuple[Bin, ...]


def calibration(margins: Sequence[float], bins: int = 10, *, seed: int = 0) -> Calibration:
    """The calibration of margins, each the better answer's score minus the other's.

    A reward is as confident of a pair as sigmoid(|margin|), from 0.5 to 1, and right where the margin is positive;
    equal scores are right half the time. The error is `sum_b n_b / N |accuracy_b - confidence_b|` (Naeini et al. 2015,
    eq. 3) over `bins` of equal width between 0.5 and 1.
    """
    if bins < 1 or not len(margins):
        raise ValueError(f"calibration needs at least one bin and one pair, given {bins} and {len(margins)}")
    found = np.asarray(margins, dtype=np.float64)
    confidence, right = expit(np.abs(found)), (np.sign(found) + 1) / 2
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    error = bootstrap_statistic(
        lambda rows: calibration_error(confidence[rows], right[rows], place[rows]), len(found), seed
    )
    edges = [0.5 + i / (2 * bins) for i in range(bins + 1)]
    return Calibration(
        error,
        tuple(
            Bin(
                edges[i],
                edges[i + 1],
                float(confidence[here].mean()),
                wilson(float(right[here].sum()), int(here.sum())),
            )
            for i in range(bins)
            if (here := place == i).any()
        ),
    )


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.float64], place: NDArray[np.int64]) -> float:
    """The mean over bins of |accuracy - confidence|, weighted by their pairs; `place` says which bin a pair is in."""
    return float(np.abs(np.bincount(place, right - confidence)).sum() / len(place))
