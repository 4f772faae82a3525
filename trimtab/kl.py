"""The KL divergence of the policy from its reference: estimators, losses, a price in the reward, and its control.

Notation of the docstrings: `d = log pi(y_t) - log pi_ref(y_t)` is the log-ratio of one token that the policy drew, in
nats; `KL` is KL(pi || pi_ref), the reverse KL. "Of a token" means of the next-token distribution at its place, given
what stands before it; the KL of an answer is the sum over its tokens. `sg` lets no gradient through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.batches import Mask, PerSequence, PerToken

LARGEST_EXPONENT = 20.0

# ---- Log-ratios


def log_ratio(logprobs: PerToken, other: PerToken, mask: Mask) -> PerToken:
    """`log pi - log pi_other` of every token of the mask, zero elsewhere, in nats.

    What stands outside the mask may be anything, infinities included: it reaches neither the value nor the gradient.
    """
    return torch.where(mask, logprobs, 0) - torch.where(mask, other, 0)


def bounded_exp(x: Tensor) -> Tensor:
    """`exp(x)`, continued by its tangent above 20 (a ratio of 5e8), so that no ratio and no gradient overflows."""
    return x.clamp(max=LARGEST_EXPONENT).exp() + beyond_largest(x)


def beyond_largest(x: Tensor) -> Tensor:
    """What the tangent of `exp` at 20 adds above 20; zero below."""
    return math.exp(LARGEST_EXPONENT) * (x - LARGEST_EXPONENT).clamp(min=0)


# ---- Estimators, to be read and to be put in the reward


def k1(log_ratio: PerToken) -> PerToken:
    """`d` (Schulman 2020, "Approximating KL divergence"): unbiased, often negative, much variance."""
    return log_ratio


def k2(log_ratio: PerToken) -> PerToken:
    """`d^2 / 2` (Schulman 2020): biased upwards or downwards by a third-order term, never negative, little variance."""
    return log_ratio**2 / 2


def k3(log_ratio: PerToken) -> PerToken:
    """`exp(-d) - 1 + d` (Schulman 2020): unbiased where the policy covers the reference, never negative.

    Explodes where the policy finds a token much less likely than the reference does, so `exp` is `bounded_exp`.
    """
    return torch.expm1((-log_ratio).clamp(max=LARGEST_EXPONENT)) + beyond_largest(-log_ratio) + log_ratio


KL_ESTIMATORS: dict[str, Callable[[PerToken], PerToken]] = {"k1": k1, "k2": k2, "k3": k3}


def exact_kl(logprobs: Float[Tensor, "N V"], ref_logprobs: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """`sum_v pi(v) (log pi(v) - log pi_ref(v))`, the KL of whole next-token distributions, nats, with its gradient.

    Summed along an answer that the policy drew it is an unbiased estimate of the answer's KL, never negative and with
    less variance than `k1`, which it is the conditional expectation of. Its gradient is that of the KL at the tokens
    before it as they are; that the policy also chooses where it goes is left to the reward. A token that the policy
    rules out (probability 0, as a number) adds nothing; one that only the reference rules out makes the KL infinite.
    """
    shares = logprobs.exp()
    possible = shares > 0
    difference = torch.where(possible, logprobs, 0) - torch.where(possible, ref_logprobs, 0)
    return (shares * difference).sum(-1)


# ---- Estimators as losses: what counts is their gradient


@dataclass(frozen=True)
class KlTerms:
    """What the KL losses read, all `[B, T]`, nats: log-probabilities of drawn tokens under three models, and a mask.

    `old_logprobs` belong to the policy that drew the tokens. Nothing outside the mask is read.
    """

    logprobs: PerToken
    old_logprobs: PerToken
    ref_logprobs: PerToken
    mask: Mask

    @property
    def log_ratio(self) -> PerToken:
        """`d`: the log-ratio to the reference, zero outside the mask."""
        return log_ratio(self.logprobs, self.ref_logprobs, self.mask)

    @property
    def importance(self) -> PerToken:
        """`pi / pi_old` of every token, 1 outside the mask."""
        return bounded_exp(log_ratio(self.logprobs, self.old_logprobs, self.mask))


def k1_loss(k: KlTerms) -> PerToken:
    """`log pi sg(d)`, the score-function gradient of the KL (Tang and Munos 2025, "On a few pitfalls in KL divergence
    gradient estimation for RL"), with the value of `k1`.

    Differentiating `k1` itself gives `grad log pi`, whose expectation is zero. The gradient here is `d grad log pi`;
    its expectation over tokens that the policy drew is the gradient of the KL of each token. It is that of the answer's
    KL only for answers of one token: a token's effect on later ones is left out, as in every loss of this table, and
    putting `k1` in the reward is what takes it in.
    """
    d = k.log_ratio
    fixed = d.detach()
    return fixed + fixed * (d - fixed)


def k2_loss(k: KlTerms) -> PerToken:
    """`d^2 / 2`: its gradient, `d grad log pi`, is that of `k1_loss` token by token, so that of the reverse KL (Liu et
    al. 2025, "Rethinking KL regularization in RLHF"). Only the value differs.
    """
    return k2(k.log_ratio)


def k3_loss(k: KlTerms) -> PerToken:
    """`exp(-d) - 1 + d`, as GRPO adds it (Shao et al. 2024, eq. 4). Its gradient, `(1 - exp(-d)) grad log pi`, is in
    expectation that of the *forward* KL, KL(pi_ref || pi), of each token; the value estimates the reverse one.
    """
    return k3(k.log_ratio)


def k3_weighted(k: KlTerms) -> PerToken:
    """`(pi / pi_old) (exp(-d) - 1 + d)` (DeepSeek-V3.2 2025, "unbiased KL estimate"): the importance weight makes value
    and gradient those of the reverse KL of each token, also for tokens that an older policy drew.

    On policy its gradient is that of `k1_loss`, token by token.
    """
    return k.importance * k3(k.log_ratio)


KL_LOSSES: dict[str, Callable[[KlTerms], PerToken]] = {
    "k1": k1_loss,
    "k2": k2_loss,
    "k3": k3_loss,
    "k3_weighted": k3_weighted,
}

# ---- KL as a reward


def last_tokens(mask: Mask) -> Mask:
    """The last token of every row of the mask; nothing in a row whose mask is empty."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def shaped_rewards(scores: PerSequence, kl: PerToken, mask: Mask, *, coefficient: float) -> PerToken:
    """`-coefficient kl_t` at every token of the mask, plus the score at its last token (Ziegler et al. 2019, eq. 2).

    The mask alone says which token is the last: no id is compared, so an answer may end with or without an
    end-of-sequence token, and padding may look like one. KL is not clamped at 0, for `k1` is unbiased only with its
    negative values. A row with an empty mask gets no reward at all; zero outside the mask.
    """
    terminal = torch.where(last_tokens(mask), scores[:, None], 0)
    return terminal - coefficient * torch.where(mask, kl, 0)


# ---- Control: the price of KL, and how much there may be of it


def check_kl(kl: float) -> None:
    """ValueError unless a measured KL is a number."""
    if not math.isfinite(kl):
        raise ValueError(f"the KL of the policy from its reference is {kl}: the policy has diverged")


@dataclass(frozen=True)
class FixedCoefficient:
    """A price of KL, in reward units per nat, that stays what it is."""

    value: float

    def update(self, kl: float, answers: int) -> FixedCoefficient:
        """Itself."""
        return self


@dataclass(frozen=True)
class AdaptiveCoefficient:
    """A price of KL, in reward units per nat, that moves until KL is `target` nats per answer (Ziegler et al. 2019,
    section 2.2): a proportional controller of its logarithm.

    `value <- value (1 + e answers / horizon)` with `e = clip(KL / target - 1, -max_error, max_error)`. The paper prints
    a gain of 0.1 an update; its code, followed here, divides the answers of the update by a horizon of 10,000. With
    small batches and short runs a smaller horizon answers faster. ValueError for constants that are not positive.
    """

    value: float = 0.15
    target: float = 6.0
    horizon: float = 10_000
    max_error: float = 0.2

    def __post_init__(self) -> None:
        for name in ("value", "target", "horizon", "max_error"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"the {name} of the adaptive KL coefficient is {getattr(self, name)}: give one above 0"
                )

    def update(self, kl: float, answers: int) -> AdaptiveCoefficient:
        """The coefficient after `answers` answers whose mean KL was `kl` nats per answer.

        ValueError where one update could turn the coefficient negative: too many answers for the horizon.
        """
        check_kl(kl)
        if answers * self.max_error >= self.horizon:
            raise ValueError(
                f"{answers} answers an update are too many for a horizon of {self.horizon:g} answers: the coefficient "
                f"could turn negative; give a horizon above {answers * self.max_error:g}"
            )
        error = min(max(kl / self.target - 1, -self.max_error), self.max_error)
        return replace(self, value=self.value * (1 + error * answers / self.horizon))


@dataclass(frozen=True)
class KlBudget:
    """How far a run may go: `limit` nats per answer, of which `spent` is the last KL that was measured.

    ValueError for a limit that is not above 0.
    """

    limit: float
    warn_share: float = 0.8
    spent: float = 0.0
    warned: bool = False

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"the KL budget is {self.limit}: give a number of nats per answer above 0")

    @property
    def is_near(self) -> bool:
        """Whether the share at which to warn is reached."""
        return self.spent >= self.warn_share * self.limit

    @property
    def should_warn(self) -> bool:
        """Whether it is reached for the first time."""
        return self.is_near and not self.warned

    @property
    def is_spent(self) -> bool:
        """Whether the run should stop."""
        return self.spent >= self.limit

    def update(self, kl: float) -> KlBudget:
        """The budget after a measurement of `kl` nats per answer."""
        check_kl(kl)
        return replace(self, spent=kl, warned=self.warned or self.is_near)
