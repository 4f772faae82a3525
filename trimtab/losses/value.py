"""Losses of the critic, and how well it predicts. Each loss maps `ValueTerms` to `[B, T]`.

`values[t]` is what the critic expects before it sees token `t`; see `trimtab.advantages`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trimtab.batches import Mask, Mean, PerToken
from trimtab.losses.arguments import NonNegative


@dataclass(frozen=True)
class ValueTerms:
    """What the value losses read, all `[B, T]`, reward units: predictions now and at sampling, what came, which tokens.

    Nothing outside the mask is read.
    """

    values: PerToken
    old_values: PerToken
    returns: PerToken
    mask: Mask

    @property
    def error(self) -> PerToken:
        """Predictions minus returns, zero outside the mask."""
        return torch.where(self.mask, self.values, 0) - torch.where(self.mask, self.returns, 0)


def squared_error(v: ValueTerms) -> PerToken:
    """`(V - R)^2 / 2`."""
    return 0.5 * v.error**2


def clipped(v: ValueTerms, *, epsilon: NonNegative = 0.2) -> PerToken:
    """`max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2) / 2`, the value loss of the released PPO code
    (Dhariwal et al. 2017, baselines' ppo2); no paper prints it.

    The larger of the two: a prediction that has already moved by epsilon towards its return passes no gradient. The
    half is part of the loss, as there; `epsilon` is in reward units, so it depends on how rewards are scaled.
    """
    return torch.maximum(squared_error(v), 0.5 * clipped_error(v, epsilon) ** 2)


def clipped_error(v: ValueTerms, epsilon: float) -> PerToken:
    """The error of predictions that are held within epsilon of the old ones, zero outside the mask."""
    old = torch.where(v.mask, v.old_values, 0)
    move = (torch.where(v.mask, v.values, 0) - old).clamp(-epsilon, epsilon)
    return old + move - torch.where(v.mask, v.returns, 0)


VALUE_LOSSES: dict[str, Callable[..., PerToken]] = {"squared_error": squared_error, "clipped": clipped}


def value_clip_fraction(v: ValueTerms, *, epsilon: float = 0.2) -> Mean:
    """The share of tokens whose prediction passes no gradient because it is clipped."""
    return Mean.of((clipped_error(v, epsilon) ** 2 > v.error**2).float(), v.mask)


def explained_variance(values: PerToken, returns: PerToken, mask: Mask) -> float:
    """`1 - Var(R - V) / Var(R)` over the mask: 1 is a perfect critic, 0 one that knows only the mean, below 0 worse.

    NaN where the returns do not vary or there are none.
    """
    predicted, came = values[mask].double(), returns[mask].double()
    spread = came.var(correction=0).item() if len(came) else 0.0
    return 1 - (came - predicted).var(correction=0).item() / spread if spread else float("nan")
