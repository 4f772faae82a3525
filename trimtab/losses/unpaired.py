"""Losses on single answers that were wanted or not: no pairs needed. Each maps `Unpaired` to one number an answer.

Every loss here looks across the batch, so callers hand over the whole batch's numbers, never a micro-batch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from trimtab.batches import PerPair
from trimtab.losses.arguments import NonNegative, Positive


@dataclass(frozen=True)
class Unpaired:
    """What the unpaired losses read, all `[P]`: summed log-probabilities (nats per answer) and whether it was wanted.

    `mismatched` is about another row's answer after this row's prompt.
    """

    logprob: PerPair
    ref_logprob: PerPair
    mismatched: PerPair
    ref_mismatched: PerPair
    desirable: Bool[Tensor, " P"]

    @property
    def log_ratio(self) -> PerPair:
        """The log-ratio to the reference, in nats."""
        return self.logprob - self.ref_logprob


def kto(
    u: Unpaired, *, beta: Positive = 0.1, desirable_weight: NonNegative = 1.0, undesirable_weight: NonNegative = 1.0
) -> PerPair:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024): `lambda_y (1 - v)`.

    `v` is `s(beta (log-ratio - z0))` for wanted answers and `s(beta (z0 - log-ratio))` for unwanted ones. The
    reference point `z0` estimates KL(policy || reference) by the batch mean of the log-ratios of mismatched answers,
    at least 0, and passes no gradient. The weights are the paper's lambda_D and lambda_U; with unequal numbers of
    answers it wants `lambda_D n_D / (lambda_U n_U)` in [1, 4/3].
    """
    z0 = (u.mismatched - u.ref_mismatched).mean().clamp(min=0).detach()
    gain = torch.where(u.desirable, u.log_ratio - z0, z0 - u.log_ratio)
    losses = torch.sigmoid(-beta * gain)
    return torch.where(u.desirable, desirable_weight * losses, undesirable_weight * losses)


def bco(u: Unpaired, *, beta: Positive = 0.01) -> PerPair:
    """Binary classifier optimization (Jung et al. 2024): `-log s(r - delta)` wanted, `-log s(delta - r)` not.

    `r` is beta times the log-ratio. Deviations: delta, without gradient, is the mean of `r` over this batch, where the
    paper keeps a running mean, so that a step is a function of its batch alone; and the paper's density-ratio weights
    for prompts of different origin are left out.
    """
    rewards = beta * u.log_ratio
    gain = rewards - rewards.mean().detach()
    return -F.logsigmoid(torch.where(u.desirable, gain, -gain))


UNPAIRED_LOSSES: dict[str, Callable[..., PerPair]] = {"kto": kto, "bco": bco}

ACROSS = frozenset(UNPAIRED_LOSSES)
"""Losses whose value for one answer depends on the other answers of the batch."""
