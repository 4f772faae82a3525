"""Several rewards as one: weighted sums, and ensembles that distrust what their members disagree about."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, pvariance
from typing import Any

from trimtab.records import Answer, Prompt
from trimtab.rewards.scores import Reward, checked

Parts = Mapping[str, Sequence[float | None]]
"""The scores of the same answers by several rewards, by their names."""


@dataclass(frozen=True)
class Mixture:
    """Several rewards and a function that makes one number of their scores of an answer; None if any score is None.

    Who logs the parts calls `parts` and then `combine`, so that no model scores an answer twice.
    """

    name: str
    rewards: tuple[Reward, ...]
    rule: Callable[[Sequence[float]], float]

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float | None]:
        return checked(self.name, prompts, answers, self.combine(self.parts(prompts, answers)))

    def parts(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Parts:
        """What each reward says by itself, before any weight."""
        return {reward.name: reward(prompts, answers) for reward in self.rewards}

    def combine(self, parts: Parts) -> list[float | None]:
        """One number an answer from the scores of all rewards."""
        columns = zip(*(parts[reward.name] for reward in self.rewards), strict=True)
        return [None if None in scores else self.rule([s for s in scores if s is not None]) for scores in columns]


# ---- Weighted sums


def mixture(rewards: Sequence[Reward], weights: Sequence[float]) -> Mixture:
    """The weighted sum of rewards. ValueError for weights that mean nothing and for a reward given twice."""
    names = [reward.name for reward in rewards]
    check_weights(names, weights)
    name = " + ".join(f"{weight:g}*{name}" for weight, name in zip(weights, names, strict=True))
    return Mixture(name, tuple(rewards), partial(weighted_sum, weights=tuple(weights)))


def weighted_sum(scores: Sequence[float], *, weights: Sequence[float]) -> float:
    """`sum_i w_i r_i`."""
    return math.fsum(weight * score for weight, score in zip(weights, scores, strict=True))


def check_weights(names: Sequence[str], weights: Sequence[float]) -> None:
    """ValueError unless there is one finite weight other than 0 for every reward, and every reward is another one."""
    check_distinct(names)
    if len(weights) != len(names):
        raise ValueError(f"--reward-weights has {len(weights)} numbers for {len(names)} rewards: give one each")
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight) or not weight:
            raise ValueError(
                f"--reward-weights: {weight} for {name} means nothing; give a number other than 0, or leave it out"
            )


def check_distinct(names: Sequence[str]) -> None:
    """ValueError for a reward that stands there twice: its scores would be told apart by nothing."""
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise ValueError(f"reward {name} is given {count} times: give it once, with a larger weight if need be")


# ---- Ensembles


def mean(scores: Sequence[float]) -> float:
    """The mean of the members' scores (Coste et al. 2023, section 3.2)."""
    return fmean(scores)


def worst(scores: Sequence[float]) -> float:
    """The lowest score of any member: worst-case optimization (Coste et al. 2023, section 3.2)."""
    return min(scores)


def uwo(scores: Sequence[float], *, lam: float = 0.5) -> float:
    """Mean minus `lam` times variance: uncertainty-weighted optimization (Coste et al. 2023, section 3.2).

    The variance is over the members (divided by their number, k), in squared units of reward. The default is the
    paper's for best-of-n; with PPO it uses 0.1.
    """
    return fmean(scores) - lam * pvariance(scores)


ENSEMBLES: dict[str, Callable[..., float]] = {"mean": mean, "min": worst, "uwo": uwo}


def ensemble(kind: str, rewards: Sequence[Reward], **settings: Any) -> Mixture:
    """Rewards that answer the same question, as one: `mean`, `min` or `uwo` (`lam=0.5`).

    ValueError for an unknown kind, for a `lam` that is negative or without effect, for fewer than two members.
    """
    names = [reward.name for reward in rewards]
    check_ensemble(kind, names, **settings)
    shown = "".join(f":lambda={value:g}" for value in settings.values())
    rule = partial(ENSEMBLES[kind], **settings) if settings else ENSEMBLES[kind]
    return Mixture(f"ensemble:{kind}{shown}({','.join(names)})", tuple(rewards), rule)


def check_ensemble(kind: str, names: Sequence[str], lam: float | None = None) -> None:
    """ValueError for an ensemble that means nothing."""
    if kind not in ENSEMBLES:
        raise ValueError(f"there is no ensemble {kind!r}: give one of {', '.join(ENSEMBLES)}")
    if lam is not None and kind != "uwo":
        raise ValueError(f"ensemble:{kind} has no lambda; ensemble:uwo:lambda={lam:g}(...) has")
    if lam is not None and not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"ensemble:uwo: lambda must be a number of at least 0, given {lam}")
    if len(names) < 2:
        raise ValueError(f"ensemble:{kind} needs at least two rewards, and there are {len(names)}")
    check_distinct(names)
