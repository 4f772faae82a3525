"""Losses of reward models. `REWARD_LOSSES` map `PairScores` to one number a pair, `RANKING_LOSSES` map the scores of
all answers of several rankings to one number a ranking.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.batches import PerPair, PerSequence
from trimtab.losses.arguments import FlipRate, NonNegative, Range

Sizes = Int[Tensor, " P"]
Ranked = Float[Tensor, "P K"]


@dataclass(frozen=True)
class PairScores:
    """What the pairwise reward losses read, all `[P]`.

    `confidence` is the probability that chosen is the better one (0.5 is a tie), `margin` by how much, in units of
    reward.
    """

    chosen: PerPair
    rejected: PerPair
    confidence: PerPair
    margin: PerPair


def bradley_terry(
    s: PairScores, *, label_smoothing: FlipRate = 0.0, centring: NonNegative = 0.0, margin_scale: NonNegative = 1.0
) -> PerPair:
    """The cross-entropy of `P(chosen is better) = s(r_w - r_l - m)` (Bradley and Terry 1952; m: Touvron et al. 2023,
    eq. 2) with the confidence `c` of the label: `-c log s(.) - (1 - c) log s(-.)`.

    `label_smoothing` e moves every confidence to `c (1 - e) + (1 - c) e`. `centring` eta adds `eta (r_w + r_l)^2`,
    which settles the free constant of the scores (Eisenstein et al. 2023, who use 0.01). `m` is `margin_scale` times
    the pair's margin, 0 where the data has none.
    """
    difference = shifted_difference(s, margin_scale)
    confidence = s.confidence * (1 - label_smoothing) + (1 - s.confidence) * label_smoothing
    agree, disagree = -F.logsigmoid(difference), -F.logsigmoid(-difference)
    return confidence * agree + (1 - confidence) * disagree + centring * (s.chosen + s.rejected) ** 2


def ties(
    s: PairScores,
    *,
    theta: Annotated[float, Range(1)] = 2.0,
    centring: NonNegative = 0.0,
    margin_scale: NonNegative = 1.0,
) -> PerPair:
    """The negative log-likelihood of win, loss or tie in the model of Rao and Kupper (1967).

    With `d = r_w - r_l - m` and `h = log theta`: P(win) = s(d - h), P(loss) = s(-d - h), and a tie is what remains,
    `(theta^2 - 1) P(win) P(loss)`. The default theta makes win, loss and tie equally likely between equals.
    A confidence of 0.5 is a tie, 1 a win and 0 a loss; in between, the label is read as the mixture of the tie and the
    nearer outcome, a deviation that keeps soft labels usable. `m` and `centring` as in `bradley_terry`.
    """
    difference, threshold = shifted_difference(s, margin_scale), math.log(theta)
    win, loss = -F.logsigmoid(difference - threshold), -F.logsigmoid(-difference - threshold)
    tie = win + loss - math.log(math.expm1(2 * threshold))
    lean = 2 * s.confidence - 1
    decided = lean.clamp(min=0) * win + (-lean).clamp(min=0) * loss
    return decided + (1 - lean.abs()) * tie + centring * (s.chosen + s.rejected) ** 2


def hinge(s: PairScores, *, delta: Annotated[float, Range(0)] = 1.0, margin_scale: NonNegative = 1.0) -> PerPair:
    """The ranking hinge `max(0, delta - (r_w - r_l - m))` (Herbrich et al. 2000; Joachims 2002).

    With soft labels, `c` times that plus `1 - c` times the hinge of the opposite order.
    """
    difference = shifted_difference(s, margin_scale)
    agree, disagree = F.relu(delta - difference), F.relu(delta + difference)
    return s.confidence * agree + (1 - s.confidence) * disagree


def shifted_difference(s: PairScores, margin_scale: float) -> PerPair:
    """`r_w - r_l - m`, which a loss wants to be positive."""
    return s.chosen - s.rejected - margin_scale * s.margin


def grouped(scores: PerSequence, sizes: Sizes) -> PerPair:
    """InstructGPT's loss (Ouyang et al. 2022, eq. 1): the mean of `-log s(r_better - r_worse)` over the C(K, 2) pairs
    of a ranking, so that long rankings count no more than short ones.

    `scores` holds the rankings one after the other, best answer first, and `sizes` their numbers of answers.
    """
    ranked, real = padded(scores, sizes)
    losses = -F.logsigmoid(ranked[:, :, None] - ranked[:, None, :])
    pairs = (real[:, :, None] & real[:, None, :]).triu(diagonal=1)
    return torch.where(pairs, losses, 0).sum((1, 2)) / pairs.sum((1, 2))


def plackett_luce(scores: PerSequence, sizes: Sizes) -> PerPair:
    """The negative log-likelihood of a whole ranking (Plackett 1975; Luce 1959): each answer is chosen, best first,
    from those that are left, `-sum_k [r_k - log sum_{j >= k} exp r_j]`. For two answers, Bradley-Terry.
    """
    ranked, real = padded(scores, sizes)
    # The padding is a number so small that no score notices it: minus infinity would make NaN gradients.
    left = torch.where(real, ranked, torch.finfo(ranked.dtype).min / 4).flip(1).logcumsumexp(1).flip(1)
    return torch.where(real, left - ranked, 0).sum(1)


def choice(scores: PerSequence, sizes: Sizes) -> PerPair:
    """The negative log-likelihood of choosing the first answer among all (Ziegler et al. 2019, eq. 1, where the minus
    sign is missing): the order of the others carries no information.
    """
    ranked, real = padded(scores, sizes)
    return ranked.masked_fill(~real, -torch.inf).logsumexp(1) - ranked[:, 0]


def padded(scores: PerSequence, sizes: Sizes) -> tuple[Ranked, Bool[Tensor, "P K"]]:
    """The scores of each ranking in a row of its own, zeros behind them, and where the scores are."""
    assert int(sizes.sum()) == len(scores), f"{int(sizes.sum())} answers in the rankings, {len(scores)} scores"
    assert bool((sizes >= 2).all()), "a ranking of fewer than two answers says nothing"
    columns = torch.arange(int(sizes.max()) if len(sizes) else 0, device=scores.device)
    real = columns < sizes[:, None]
    return scores.new_zeros(real.shape).masked_scatter(real, scores), real


REWARD_LOSSES: dict[str, Callable[..., PerPair]] = {
    function.__name__: function for function in (bradley_terry, ties, hinge)
}
RANKING_LOSSES: dict[str, Callable[..., PerPair]] = {
    function.__name__: function for function in (grouped, plackett_luce, choice)
}
