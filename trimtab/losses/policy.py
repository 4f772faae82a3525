"""Losses on tokens that a policy drew: REINFORCE and the clipped objectives. Each maps `PolicyTerms` to `[B, T]`.

Notation of the docstrings: `A` is the advantage; `r = pi / pi_old` is a token's ratio to the policy that drew it, 1
before the first update. Losses are what is minimized, so every one of them is the negative of its paper's objective.
How tokens are averaged is said elsewhere (`mean_over` in `trimtab.batches`), and matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch

from trimtab.batches import Mask, Mean, PerToken
from trimtab.kl import bounded_exp, k3, log_ratio
from trimtab.losses.arguments import NonNegative, Positive, Range

AboveOne = Annotated[float, Range(1)]


@dataclass(frozen=True)
class PolicyTerms:
    """What the policy losses read, all `[B, T]`: log-probabilities of the drawn tokens (nats) now and when they were
    drawn, their advantages, and which tokens the policy wrote.

    Nothing outside the mask is read: there, losses and their gradients are zero whatever stands there.
    """

    logprobs: PerToken
    old_logprobs: PerToken
    advantages: PerToken
    mask: Mask

    @property
    def log_ratio(self) -> PerToken:
        """`log r`, in nats, zero outside the mask."""
        return log_ratio(self.logprobs, self.old_logprobs, self.mask)

    @property
    def gain(self) -> PerToken:
        """The advantages, zero outside the mask."""
        return torch.where(self.mask, self.advantages, 0)


def reinforce(p: PolicyTerms) -> PerToken:
    """`-A log pi` (Williams 1992): the policy gradient of answers that the present policy drew. No ratio, so one
    update a batch: a second one would need `ppo_clip`.
    """
    return -p.gain * torch.where(p.mask, p.logprobs, 0)


def ppo_clip(
    p: PolicyTerms,
    *,
    epsilon: NonNegative = 0.2,
    epsilon_high: NonNegative | None = None,
    dual_clip: AboveOne = math.inf,
) -> PerToken:
    """`-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)` (Schulman et al. 2017, PPO, eq. 7).

    `epsilon_high` is `epsilon` unless given; DAPO gives 0.28 ("clip-higher", Yu et al. 2025, section 3.1). Where A < 0,
    `dual_clip` bounds the loss by `-dual_clip A` (Ye et al. 2020, dual-clip PPO, whose c is 3); off by default.
    """
    return clipped_loss(token_ratio(p), p.gain, epsilon, epsilon_high, dual_clip)


def gspo(p: PolicyTerms, *, epsilon: NonNegative = 3e-4, epsilon_high: NonNegative = 4e-4) -> PerToken:
    """`-min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A)` with the ratio `s` of the whole answer, to the power of
    1 / its length (Zheng et al. 2025, GSPO, eqs. 5 and 7).

    In the paper's token form (eq. 13), in which a token carries the gradient of its own log-probability; averaged over
    `sequences`, value and gradient are those of the sequence form wherever an answer has one advantage.
    """
    return clipped_loss(sequence_ratio(p), p.gain, epsilon, epsilon_high)


def cispo(p: PolicyTerms, *, max_ratio: Positive = 5.0) -> PerToken:
    """`-sg(min(r, max_ratio)) A log pi` (MiniMax-M1 2025, CISPO, eqs. 4 and 5): the weight is clipped, not the update,
    so every token keeps its gradient.

    The paper uses no lower bound and prints no upper one; 5 is that of Khatri et al. 2025, ScaleRL.
    """
    weight = token_ratio(p).detach().clamp(max=max_ratio)
    return -weight * p.gain * torch.where(p.mask, p.logprobs, 0)


def clipped_loss(
    ratio: PerToken, gain: PerToken, epsilon: float, epsilon_high: float | None, dual_clip: float = math.inf
) -> PerToken:
    """PPO's pessimistic objective for any ratio, negated."""
    objective = torch.minimum(ratio * gain, clip_ratio(ratio, epsilon, epsilon_high) * gain)
    if dual_clip < math.inf:
        objective = torch.where(gain < 0, torch.maximum(objective, dual_clip * gain), objective)
    return -objective


def clip_ratio(ratio: PerToken, epsilon: float, epsilon_high: float | None) -> PerToken:
    """The ratio within `[1 - epsilon, 1 + epsilon_high]`."""
    return ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))


def token_ratio(p: PolicyTerms) -> PerToken:
    """`pi / pi_old` of every token, 1 outside the mask."""
    return bounded_exp(p.log_ratio)


def sequence_ratio(p: PolicyTerms) -> PerToken:
    """`(pi(y) / pi_old(y))^(1 / |y|)` at every token of the answer, with the gradient of the token's own ratio."""
    own = p.log_ratio
    mean = own.sum(-1, keepdim=True) / p.mask.sum(-1, keepdim=True).clamp(min=1)
    return bounded_exp(mean.detach() + own - own.detach())


POLICY_LOSSES: dict[str, Callable[..., PerToken]] = {
    function.__name__: function for function in (reinforce, ppo_clip, gspo, cispo)
}

RATIO_FREE = frozenset({"reinforce"})
"""Losses that do not read the old log-probabilities, and so allow one update for each batch of answers."""

# ---- Figures


def clip_fraction(p: PolicyTerms, ratio: PerToken, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> Mean:
    """The share of tokens whose objective is the clipped one, so that they pass no gradient.

    `ratio` is `token_ratio(p)`, or `sequence_ratio(p)` for `gspo`.
    """
    clipped = clip_ratio(ratio, epsilon, epsilon_high) * p.gain < ratio * p.gain
    return Mean.of(clipped.float(), p.mask)


def ratio_statistics(p: PolicyTerms) -> dict[str, Mean]:
    """How far the policy is from the one that drew the tokens; means over tokens.

    `ratio` is r, `ratio_spread` is `(r - 1)^2`, `old_kl` estimates KL(pi_old || pi) in nats by k3. Before the first
    update they are 1, 0 and 0, up to rounding.
    """
    ratio = token_ratio(p).detach()
    figures = {
        "ratio": ratio,
        "ratio_spread": (ratio - 1) ** 2,
        "old_kl": k3(-p.log_ratio.detach()),
    }
    return {name: Mean.of(values, p.mask) for name, values in figures.items()}
