"""How often a reward scores the answer that people chose above the one they rejected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.evals.intervals import Estimate, bootstrap_mean, wilson
from trimtab.records import Preference, answers_of
from trimtab.rewards import Reward, every_score

TIE = 0.5
"""The confidence of a pair in which neither answer is the better one."""


@dataclass(frozen=True)
class RewardAccuracy:
    """The share of pairs in which the better answer scores strictly higher, overall and by subset.

    `ties` counts pairs with equal scores, which are wrong here: a reward that cannot tell has not told. `longer` is
    the accuracy of choosing the answer with more characters (equal lengths are wrong too). `margin` is the mean of the
    better answer's score minus the other's, in the reward's units. `excluded` counts pairs of confidence 0.5, which
    have no better answer.
    """

    reward: str
    accuracy: Estimate
    ties: int
    longer: Estimate
    margin: Estimate
    excluded: int
    subsets: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "reward": self.reward,
            "pairs": self.accuracy.count,
            "accuracy": self.accuracy.to_dict(),
            "ties": self.ties,
            "longer": self.longer.to_dict(),
            "margin": self.margin.to_dict(),
            "excluded": self.excluded,
            "subsets": {name: estimate.to_dict() for name, estimate in self.subsets.items()},
        }


def reward_accuracy(
    reward: Reward, preferences: Sequence[Preference], by: str = "subset", *, seed: int = 0
) -> RewardAccuracy:
    """The accuracy of `reward` on pairs that people labelled, by the column `by` of their prompts where they have it.

    A pair of confidence below 0.5 counts with its answers exchanged. ValueError if no pair has a better answer.
    """
    pairs = [oriented(preference) for preference in preferences if preference.confidence != TIE]
    if not pairs:
        raise ValueError(f"none of {len(preferences)} pairs has a better answer (confidence other than {TIE}) to find")
    margins = score_margins(reward, pairs)
    groups: dict[str, list[float]] = {}
    for pair, margin in zip(pairs, margins, strict=True):
        if by in pair.prompt.columns:
            groups.setdefault(str(pair.prompt.columns[by]), []).append(margin)
    return RewardAccuracy(
        reward=reward.name,
        accuracy=share_positive(margins),
        ties=sum(margin == 0 for margin in margins),
        longer=share_positive([len(pair.chosen) - len(pair.rejected) for pair in pairs]),
        margin=bootstrap_mean(margins, seed),
        excluded=len(preferences) - len(pairs),
        subsets={name: share_positive(groups[name]) for name in sorted(groups)},
    )


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
