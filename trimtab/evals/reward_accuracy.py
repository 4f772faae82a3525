"""How often a reward scores the answer that people chose above the one they rejected."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.evals.calibration import Calibration, calibration
from trimtab.evals.intervals import Estimate, bootstrap_mean, to_json, wilson
from trimtab.records import Preference, answers_of
from trimtab.rewards import Reward, every_score

TIE = 0.5
"""The confidence of a pair in which neither answer is the better one."""


LENGTH_BUCKETS = {
    "at most half as long": 0.5,
    "shorter": 0.9,
    "about as long": 1.1,
    "longer": 2.0,
    "more than twice as long": math.inf,
}
"""The better answer beside the other: each bucket and the largest ratio of their characters in it."""

MARGIN_BUCKETS = ("smallest quarter", "second quarter", "third quarter", "largest quarter")


@dataclass(frozen=True)
class RewardAccuracy:
    """The share of pairs in which the better answer scores strictly higher, overall and by subset.

    `ties` counts pairs with equal scores, which are wrong here: a reward that cannot tell has not told. `longer` is
    the accuracy of choosing the answer with more characters (equal lengths are wrong too). `margin` is the mean of the
    better answer's score minus the other's, in the reward's units. `excluded` counts pairs of confidence 0.5, which
    have no better answer. `by_length` is by how long the better answer is beside the other (`LENGTH_BUCKETS`),
    `by_margin` by how far apart the reward puts the two: a useful reward is right where it is sure.
    """

    reward: str
    accuracy: Estimate
    ties: int
    longer: Estimate
    margin: Estimate
    excluded: int
    subsets: dict[str, Estimate]
    by_length: dict[str, Estimate]
    by_margin: dict[str, Estimate]
    calibration: Calibration

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"reward": self.reward, "pairs": self.accuracy.count, **to_json(self)}


def reward_accuracy(
    reward: Reward, preferences: Sequence[Preference], by: str = "subset", *, seed: int = 0
) -> RewardAccuracy:
    """The accuracy of `reward` on pairs that people labelled, by the column `by` of their prompts where they have it.

    A pair of confidence below 0.5 counts with its answers exchanged. ValueError if no pair has a better answer.
    """
    pairs = decided(preferences)
    margins = score_margins(reward, pairs)
    names = [str(pair.prompt.columns[by]) if by in pair.prompt.columns else None for pair in pairs]
    return RewardAccuracy(
        reward=reward.name,
        accuracy=share_positive(margins),
        ties=sum(margin == 0 for margin in margins),
        longer=share_positive([len(pair.chosen) - len(pair.rejected) for pair in pairs]),
        margin=bootstrap_mean(margins, seed),
        excluded=len(preferences) - len(pairs),
        subsets=by_name(margins, names, sorted({name for name in names if name is not None})),
        by_length=by_name(margins, [length_bucket(pair) for pair in pairs], LENGTH_BUCKETS),
        by_margin=by_name(margins, margin_buckets(margins), MARGIN_BUCKETS),
        calibration=calibration(margins, seed=seed),
    )


def decided(preferences: Sequence[Preference]) -> list[Preference]:
    """The pairs with a better answer, that one as `chosen`. ValueError if there are none."""
    pairs = [oriented(preference) for preference in preferences if preference.confidence != TIE]
    if not pairs:
        raise ValueError(f"none of {len(preferences)} pairs has a better answer (confidence other than {TIE}) to find")
    return pairs


def by_name(margins: Sequence[float], names: Sequence[str | None], order: Iterable[str]) -> dict[str, Estimate]:
    """The accuracy of the pairs of each name, in the order given; names without pairs are left out."""
    groups: dict[str, list[float]] = {name: [] for name in order}
    for margin, name in zip(margins, names, strict=True):
        if name is not None:
            groups[name].append(margin)
    return {name: share_positive(found) for name, found in groups.items() if found}


def length_bucket(pair: Preference) -> str:
    """How long the better answer is beside the other; an empty one counts as one character."""
    ratio = max(len(pair.chosen), 1) / max(len(pair.rejected), 1)
    return next(name for name, bound in LENGTH_BUCKETS.items() if ratio <= bound)


def margin_buckets(margins: Sequence[float]) -> list[str]:
    """The quarter of the pairs that each belongs to when they are ordered by |margin|; equal ones stay together."""
    sizes = sorted(map(abs, margins))
    return [MARGIN_BUCKETS[4 * bisect_left(sizes, abs(margin)) // len(sizes)] for margin in margins]


def oriented(preference: Preference) -> Preference:
    """The same pair with the answer that is probably better as `chosen`."""
    if preference.confidence > TIE:
        return preference
    return replace(
        preference,
        chosen=preference.rejected,
        rejected=preference.chosen,
        confidence=1 - preference.confidence,
        chosen_finished=preference.rejected_finished,
        rejected_finished=preference.chosen_finished,
    )


def score_margins(reward: Reward, pairs: Sequence[Preference]) -> list[float]:
    """The chosen answer's score minus the rejected one's, for every pair; one call, so that batches are full."""
    answers = [answer for pair in pairs for answer in answers_of(pair)]
    scores = every_score(reward, [pair.prompt for pair in pairs for _ in range(2)], answers)
    return [better - worse for better, worse in zip(scores[::2], scores[1::2], strict=True)]


def share_positive(margins: Sequence[float]) -> Estimate:
    """The share of margins above 0, with Wilson's interval."""
    return wilson(sum(margin > 0 for margin in margins), len(margins))
