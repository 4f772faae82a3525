"""Advantages: how much better an answer, or a token of it, was than expected. Pure, without gradient.

Two kinds. Sequence-level ones map `Scores` to one number an answer, which `spread` puts on every token; the rows of a
group (the answers to one prompt) are neighbours. Token-level ones map rewards `[B, T]` to one number a token.

Alignment: index `t` is about token `t`. `rewards[t]` is what writing token `t` earned. `values[t]` is what a critic
expected *before* it saw token `t`, from the tokens in front of it, as `logprobs[t]` is the policy's prediction of token
`t` from the tokens in front of it. The value after the last token is 0. The tokens of a row are those of its mask, in
order; what stands between them is no token and takes no time, and nothing outside the mask is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.batches import Mask, PerSequence, PerToken
from trimtab.losses.arguments import Fraction, Positive, Range

LEAST_VARIANCE = 1e-8
SMALLEST_SPREAD = 1e-9


# ---- One number an answer


@dataclass(frozen=True)
class Scores:
    """What sequence-level advantages read, `[B]`: the score of every answer, with the price of its KL where that is in
    the reward, and what was expected of it.

    `valid` is False for answers that are left out because no reward could be given; their score may be anything.
    `baseline` is known before the answer is drawn: the greedy answer's score, a running mean, or 0. It is read by
    `remax` and `ema` only. Answers to one prompt are `group_size` neighbours.
    """

    scores: PerSequence
    valid: Bool[Tensor, " B"]
    baseline: PerSequence
    group_size: int

    def __post_init__(self) -> None:
        assert len(self.scores) % self.group_size == 0, "the last group has too few rows"


def centred(s: Scores) -> PerSequence:
    """The score minus the mean of its group (Liu et al. 2025, Dr. GRPO): the policy gradient times `(G - 1) / G`."""
    deviations, _ = group_deviations(s)
    return deviations.flatten().to(s.scores.dtype)


def batch_centred(s: Scores) -> PerSequence:
    """The score minus the mean of the batch: REINFORCE with a mean baseline (Williams 1992).

    An answer's own score is in that mean, so with B independent answers the gradient is `(B - 1) / B` times the exact
    one.
    """
    return centred(replace(s, group_size=len(s.scores)))


def rloo(s: Scores) -> PerSequence:
    """The score minus the mean of the *other* answers of its group (Kool et al. 2019; Ahmadian et al. 2024, RLOO).

    Unbiased: `G / (G - 1)` times `centred`. An answer whose siblings are all left out gets 0.
    """
    deviations, count = group_deviations(s)
    return (deviations * count / (count - 1).clamp(min=1)).flatten().to(s.scores.dtype)


def grpo(s: Scores, *, eps: Positive = 1e-4, correction: Literal[0, 1] = 1) -> PerSequence:
    """`(score - mean) / (std + eps)` over the group (Shao et al. 2024, GRPO, section 4.1.2).

    The paper says neither which standard deviation it takes nor how it keeps from dividing by 0. `correction=1` divides
    by `G - 1`, as the common implementations do, 0 by `G`; they add 1e-4 or 1e-6. A group without spread gets exactly
    0. The division makes nearly solved and nearly hopeless prompts weigh more: `centred` does not.
    """
    deviations, count = group_deviations(s)
    variance = (deviations**2).sum(-1, keepdim=True) / (count - correction).clamp(min=1)
    return (deviations / (variance.sqrt() + eps)).flatten().to(s.scores.dtype)


def remax(s: Scores) -> PerSequence:
    """The score minus that of the greedy answer to the same prompt (Li et al. 2024, ReMax). Unbiased."""
    return above_baseline(s)


def ema(s: Scores) -> PerSequence:
    """The score minus a running mean of earlier scores: REINFORCE with a moving baseline (Williams 1992). Unbiased,
    because the mean does not know these answers yet; `RunningBaseline` keeps it.
    """
    return above_baseline(s)


def above_baseline(s: Scores) -> PerSequence:
    """The score minus its baseline, 0 for answers that are left out."""
    return torch.where(s.valid, s.scores - s.baseline, 0)


def group_deviations(s: Scores) -> tuple[Float[Tensor, "P G"], Int[Tensor, "P 1"]]:
    """Scores minus the mean of their group, 0 where left out, and the number of answers that count.

    In float64, where the mean of equal float32 numbers is that number: a group without spread deviates by exactly 0.
    ValueError for groups of one.
    """
    if s.group_size < 2:
        raise ValueError(
            "these advantages compare answers with each other, and there is only one: give --group-size 2 or more "
            "(for batch_centred, --prompts-per-step 2 will do)"
        )
    valid = s.valid.view(-1, s.group_size)
    scores = torch.where(valid, s.scores.double().view(-1, s.group_size), 0)
    count = valid.sum(-1, keepdim=True)
    return torch.where(valid, scores - scores.sum(-1, keepdim=True) / count.clamp(min=1), 0), count


def spread(advantages: PerSequence, mask: Mask) -> PerToken:
    """Every answer's advantage at each of its tokens, zero outside the mask."""
    return torch.where(mask, advantages[:, None], 0)


@dataclass(frozen=True)
class RunningBaseline:
    """An exponential moving average of the mean score of a step; 0 before the first one.

    Corrected for its start: `decay` 1 is the mean of all steps so far, the moving-average baseline of Ahmadian et al.
    2024. The default of 0.95, which no paper prints, forgets scores of policies from long ago.
    """

    decay: Annotated[float, Range(0, 1, low_included=True, high_included=True)] = 0.95
    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        """What to expect of the next answers."""
        return self.total / self.weight if self.weight else 0.0

    def update(self, scores: PerSequence, valid: Bool[Tensor, " B"]) -> RunningBaseline:
        """The baseline after one more step; the same if all its answers are left out."""
        if not valid.any():
            return self
        mean = scores[valid].double().mean().item()
        return replace(self, total=self.decay * self.total + mean, weight=self.decay * self.weight + 1)


# ---- One number a token


def gae(
    rewards: PerToken, values: PerToken, mask: Mask, *, gamma: Fraction = 1.0, lam: Fraction = 0.95
) -> tuple[PerToken, PerToken]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), and the returns that a critic should predict.

    `A_t = delta_t + gamma lam A_(t+1)` with `delta_t = r_t + gamma V_(t+1) - V_t`; returns are `A + V`. `t + 1` is the
    next token of the mask, whatever stands between, and both are 0 after the last. Zero outside the mask.
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, next_advantage, 0)
    return advantages, advantages + values


def reward_to_go(rewards: PerToken, mask: Mask, *, gamma: Fraction = 1.0) -> PerToken:
    """The discounted sum of the rewards from each token of the mask to the last one; zero outside the mask.

    `gae` at lambda 1 with a critic that expects nothing.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def reinforce_pp(rewards: PerToken, mask: Mask, *, gamma: Fraction = 1.0) -> PerToken:
    """`reward_to_go`, whitened over all tokens of the batch (Hu et al. 2025, REINFORCE++): no critic and no groups."""
    return whiten(reward_to_go(rewards, mask, gamma=gamma), mask)


def whiten(values: PerToken, mask: Mask, *, shift_mean: bool = True) -> PerToken:
    """Values over their standard deviation, by default minus their mean, both over the mask only; zero elsewhere.

    Variance 0 counts as 1e-8, as in the released code of Ziegler et al. 2019; it is the mean of squared deviations.
    Advantages are shifted; rewards are not (`shift_mean=False`), for where their zero lies says when to end an answer.
    """
    if not mask.any():
        return torch.zeros_like(values)
    inside = values[mask].double()
    mean = inside.mean()
    scale = ((inside - mean).square().mean() + LEAST_VARIANCE).rsqrt()
    whitened = (torch.where(mask, values, 0) - (mean if shift_mean else 0)) * scale
    return torch.where(mask, whitened, 0).to(values.dtype)


# ---- Scores before they are credited


@dataclass(frozen=True)
class RunningMoments:
    """Mean and spread of all scores so far, the "historical" ones of PPO-max (Zheng et al. 2023, section 5.4).

    `squares` is the sum of squared deviations from the mean; batches are merged as Chan et al. 1983 do.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """The standard deviation, with `count - 1`; 1 as long as scores differ by rounding only."""
        std = math.sqrt(self.squares / max(self.count - 1, 1))
        return std if std > SMALLEST_SPREAD * abs(self.mean) else 1.0

    def update(self, scores: PerSequence, valid: Bool[Tensor, " B"]) -> RunningMoments:
        """The moments with these scores added; update first, normalize then, so that no score is divided by a guess."""
        if not valid.any():
            return self
        added = scores[valid].double()
        count, step = self.count + len(added), added.mean().item() - self.mean
        squares = (added - added.mean()).square().sum().item()
        return RunningMoments(
            count=count,
            mean=self.mean + step * len(added) / count,
            squares=self.squares + squares + step**2 * self.count * len(added) / count,
        )


def raw(scores: PerSequence, moments: RunningMoments, *, clip: Positive = math.inf) -> PerSequence:
    """The scores as they are, within plus or minus `clip`."""
    return scores.clamp(-clip, clip)


def normalized(scores: PerSequence, moments: RunningMoments, *, clip: Positive = 0.8) -> PerSequence:
    """`clip((score - mean) / std, -delta, delta)` with historical moments (Zheng et al. 2023, PPO-max).

    The paper tries delta 0.3 and 0.8; the smaller one only delays the collapse.
    """
    return ((scores - moments.mean) / moments.std).clamp(-clip, clip)


def scaled(scores: PerSequence, moments: RunningMoments, *, clip: Positive = math.inf) -> PerSequence:
    """`score / std` with historical moments, without a shift: what the released scripts of PPO-max switch on."""
    return (scores / moments.std).clamp(-clip, clip)


def with_unfinished_score(
    scores: PerSequence, finished: Bool[Tensor, " B"], unfinished_score: float | None
) -> PerSequence:
    """The scores, with one score for every answer that did not end by itself, however good it is, if one is given.

    The "EOS trick" of Stiennon et al. 2020's released code, which gives -1; it means something only where scores are
    centred around 0.
    """
    return scores if unfinished_score is None else torch.where(finished, scores, unfinished_score)


SCORE_SHAPES: dict[str, Callable[..., PerSequence]] = {"raw": raw, "normalized": normalized, "scaled": scaled}
"""What is done to scores with their history: `(scores, moments, clip=...)`."""

SEQUENCE_ADVANTAGES: dict[str, Callable[..., PerSequence]] = {
    "centred": centred,
    "batch_centred": batch_centred,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": centred,
    "remax": remax,
    "ema": ema,
}
"""`Scores` to one number an answer."""

TOKEN_ADVANTAGES: dict[str, Callable[..., PerToken | tuple[PerToken, PerToken]]] = {
    "reward_to_go": reward_to_go,
    "reinforce_pp": reinforce_pp,
    "gae": gae,
}
"""Rewards `[B, T]` and mask (for `gae`, values between them) to one number a token; `gae` gives the returns as well."""

ADVANTAGES: dict[str, Callable[..., object]] = {**SEQUENCE_ADVANTAGES, **TOKEN_ADVANTAGES}

COMPARING = frozenset({"centred", "rloo", "grpo", "dr_grpo"})
"""Advantages that compare answers to one prompt and so need groups of two or more."""
