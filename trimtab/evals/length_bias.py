"""Whether a reward favours long answers beyond what people do: its mistakes on pairs, by which answer is longer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trimtab.evals.intervals import Estimate, bootstrap_statistic, difference, to_json, wilson
from trimtab.evals.reward_accuracy import decided, score_margins, share_positive
from trimtab.records import Preference
from trimtab.rewards import Reward


@dataclass(frozen=True)
class LengthBias:
    """Accuracy where people chose the longer answer minus accuracy where they chose the shorter one: `bias`.

    A reward that judges by something else is as often right on both kinds, however often people prefer the longer one;
    one that favours length is right where length helps. `prefers_longer` and `people_prefer_longer` are shares of the
    pairs of different length (characters). `slope` is in reward units per doubling of the better answer's length
    beside the other's, from a regression of the margins with an intercept; None where all ratios are equal.
    """

    reward: str
    bias: Estimate
    right_where_longer: Estimate
    right_where_shorter: Estimate
    prefers_longer: Estimate
    people_prefer_longer: Estimate
    slope: Estimate | None

    @property
    def favours(self) -> Literal["longer", "shorter", "neither"]:
        """What the interval of the bias lies clear of zero for."""
        if self.bias.low > 0:
            return "longer"
        return "shorter" if self.bias.high < 0 else "neither"

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**to_json(self), "favours": self.favours}


def length_bias(reward: Reward, preferences: Sequence[Preference], *, seed: int = 0) -> LengthBias:
    """The length bias of a reward on pairs that people labelled. ValueError without pairs of both kinds."""
    pairs = decided(preferences)
    ratios = [log_ratio(pair) for pair in pairs]
    margins = score_margins(reward, pairs)
    longer = [margin for margin, ratio in zip(margins, ratios, strict=True) if ratio > 0]
    shorter = [margin for margin, ratio in zip(margins, ratios, strict=True) if ratio < 0]
    if not longer or not shorter:
        raise ValueError(
            f"{len(longer)} pairs have a longer and {len(shorter)} a shorter better answer: "
            "a length bias shows only beside pairs of the other kind"
        )
    right_longer, right_shorter = share_positive(longer), share_positive(shorter)
    liked = sum(margin > 0 for margin in longer) + sum(margin < 0 for margin in shorter)
    return LengthBias(
        reward=reward.name,
        bias=difference(right_longer, right_shorter),
        right_where_longer=right_longer,
        right_where_shorter=right_shorter,
        prefers_longer=wilson(liked, len(longer) + len(shorter)),
        people_prefer_longer=wilson(len(longer), len(longer) + len(shorter)),
        slope=slope(ratios, margins, seed),
    )


def log_ratio(pair: Preference) -> float:
    """log2 of the better answer's characters over the other's; an empty answer counts as one character."""
    return math.log2(max(len(pair.chosen), 1) / max(len(pair.rejected), 1))


def slope(ratios: Sequence[float], margins: Sequence[float], seed: int = 0) -> Estimate | None:
    """The least-squares slope of margins on log-ratios of length with an intercept, bootstrapped over pairs."""
    x, y = np.asarray(ratios), np.asarray(margins)

    def fitted(rows: np.ndarray) -> float:
        centred = x[rows] - x[rows].mean()
        spread = float(centred @ centred)
        return float(centred @ y[rows]) / spread if spread else math.nan

    return None if len(set(ratios)) < 2 else bootstrap_statistic(fitted, len(x), seed)
