"""Losses on pairs of answers: the DPO family. Each maps `Pairs` to one number a pair and never reduces.

Notation of the docstrings: `p` and `f` are log pi(y) and log pi_ref(y), summed over the tokens of an answer (nats);
`_w` is the chosen answer, `_l` the rejected one; `r = beta (p - f)`; `D = (p_w - f_w) - (p_l - f_l)`; `|y|` counts
tokens; `bar p = p / |y|`; `s` is the logistic function. Hyperparameters carry their paper's symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from trimtab.batches import Pairs, PerPair
from trimtab.losses.arguments import FLIPS, FlipRate, Fraction, NonNegative, Positive, Range

SOME_FLIPS = Range(0, 0.5)
LARGEST_EXPONENT = 30.0
LARGEST_MEAN_LOGPROB = -1e-6


@dataclass(frozen=True)
class LengthSplitPairs:
    """What `ld_dpo` reads, all `[P]`, in nats: summed log-probabilities of heads and tails.

    A head is the first tokens of an answer, as many as the shorter answer of its pair has; a tail is what follows, 0
    for the shorter answer.
    """

    chosen_head: PerPair
    rejected_head: PerPair
    chosen_tail: PerPair
    rejected_tail: PerPair
    ref_chosen_head: PerPair
    ref_rejected_head: PerPair
    ref_chosen_tail: PerPair
    ref_rejected_tail: PerPair


@dataclass(frozen=True)
class WeightedPairs:
    """What `wpo` reads: pairs, and the weight of each of their answers, `[P]`, without units."""

    pairs: Pairs
    chosen_weight: PerPair
    rejected_weight: PerPair


def dpo(p: Pairs, *, beta: Positive = 0.1, label_smoothing: FlipRate = 0.0) -> PerPair:
    """`-log s(beta D)` (Rafailov et al. 2023, eq. 7). With label smoothing e, conservative DPO (Mitchell 2023):
    `-(1 - e) log s(beta D) - e log s(-beta D)`.
    """
    return logistic(beta * p.margin, label_smoothing)


def robust(p: Pairs, *, beta: Positive = 0.1, label_smoothing: FlipRate = 0.1) -> PerPair:
    """`[-(1 - e) log s(beta D) + e log s(-beta D)] / (1 - 2 e)` (Chowdhury et al. 2024): when labels are flipped with
    probability e, its expectation is the DPO loss of the clean labels. Unbounded below for large beta D.
    """
    FLIPS.check("label_smoothing", label_smoothing)
    kept, flipped = F.logsigmoid(beta * p.margin), F.logsigmoid(-beta * p.margin)
    return (-(1 - label_smoothing) * kept + label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(p: Pairs, *, tau: Positive = 0.1, average: bool = True) -> PerPair:
    """`(D - 1 / (2 tau))^2` (Azar et al. 2024, eq. 17), where by default D is the difference of the log-ratios per
    token, as its authors ran it; `average=False` takes the sums, as the paper prints it.
    """
    margin = mean_chosen_ratio(p) - mean_rejected_ratio(p) if average else p.margin
    return (margin - 1 / (2 * tau)) ** 2


def hinge(p: Pairs, *, beta: Positive = 0.05) -> PerPair:
    """`max(0, 1 - beta D)` (Liu et al. 2024, RSO, "hinge-norm", whose gamma is our beta): SLiC's hinge on log-ratios.

    RSO draws its pairs by rejection sampling; here they are what the data holds.
    """
    return F.relu(1 - beta * p.margin)


def slic(p: Pairs, *, delta: NonNegative = 1.0, lam: NonNegative = 0.1) -> PerPair:
    """`max(0, delta - p_w + p_l) - lambda p_w` (Zhao et al. 2023, SLiC-HF). No reference.

    Deviation: the answer that keeps the policy fluent is the chosen one, where the paper takes a third, from SFT data.
    """
    return F.relu(delta - p.chosen + p.rejected) - lam * p.chosen


def simpo(p: Pairs, *, beta: Positive = 2.0, gamma: float = 1.0) -> PerPair:
    """`-log s(beta (bar p_w - bar p_l) - gamma)` (Meng et al. 2024, eq. 6). No reference.

    gamma is the margin itself, not its ratio to beta; the paper tunes gamma / beta within 0.1 to 0.8, and 0.5 is its
    starting point.
    """
    return -F.logsigmoid(beta * (mean_chosen(p) - mean_rejected(p)) - gamma)


def orpo(p: Pairs, *, lam: NonNegative = 0.1) -> PerPair:
    """`-bar p_w - lambda log s(log odds_w - log odds_l)` with `odds = P / (1 - P)` and `P = exp(bar p)` (Hong et al.
    2024, eqs. 6 and 7). No reference.

    The first term is the negative log-likelihood per token of the chosen answer, as in the paper. P = 1 has infinite
    odds, so bar p is at most -1e-6 here.
    """
    return -mean_chosen(p) - lam * F.logsigmoid(log_odds(mean_chosen(p)) - log_odds(mean_rejected(p)))


def cpo(p: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 1.0, average: bool = True) -> PerPair:
    """`-log s(beta (p_w - p_l)) + alpha NLL(y_w)` (Xu et al. 2024, CPO). No reference.

    By default the second term is per token, as its authors ran it; `average=False` takes the sum, as printed.
    """
    likelihood = mean_chosen(p) if average else p.chosen
    return -F.logsigmoid(beta * (p.chosen - p.rejected)) - alpha * likelihood


def alphapo(p: Pairs, *, alpha: float = 0.25, beta: Positive = 2.5, gamma: float = 0.1) -> PerPair:
    """SimPO with the reward `(1 - P^-alpha) / alpha` in place of `log P`, `P = exp(bar p)` (Gupta et al. 2025). No
    reference. alpha = 0 is SimPO.

    Where alpha |bar p| is above 30, P^-alpha is continued by its tangent, so that it cannot overflow.
    """
    return -F.logsigmoid(beta * (shaped(mean_chosen(p), alpha) - shaped(mean_rejected(p), alpha)) - gamma)


def length_normalized_dpo(p: Pairs, *, beta: Positive = 5.0) -> PerPair:
    """`-log s(beta [(p_w - f_w) / |y_w| - (p_l - f_l) / |y_l|])`: DPO on log-ratios per token (Lambert et al. 2024,
    Tulu 3).
    """
    return -F.logsigmoid(beta * (mean_chosen_ratio(p) - mean_rejected_ratio(p)))


def r_dpo(p: Pairs, *, beta: Positive = 0.1, alpha: float = 0.05) -> PerPair:
    """`-log s(beta D + alpha (|y_w| - |y_l|))` (Park et al. 2024, "Disentangling length from quality").

    A longer chosen answer counts as won already, so its pair pushes less; a shorter one pushes more. The optimum is
    that of the reward minus alpha per token.
    """
    return -F.logsigmoid(beta * p.margin + alpha * (p.chosen_length - p.rejected_length))


def dpop(p: Pairs, *, beta: Positive = 0.3, lam: NonNegative = 50.0) -> PerPair:
    """`-log s(beta [D - lambda max(0, f_w - p_w)])` (Pal et al. 2024, Smaug, "DPO-positive"): the chosen answer must
    not become less likely than under the reference.
    """
    return -F.logsigmoid(beta * (p.margin - lam * F.relu(p.ref_chosen - p.chosen)))


def rpo(p: Pairs, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> PerPair:
    """`-log s(beta D) - alpha bar p_w`: DPO plus the chosen answer's negative log-likelihood per token (Pang et al.
    2024, iterative RPO; Liu et al. 2024 derive the same sum as pessimism, with alpha 0.005).

    Pang et al. weigh the DPO term instead and divide by the length of prompt and answer; at their weight of 1 the two
    differ by the prompt's length only.
    """
    return logistic(beta * p.margin) - alpha * mean_chosen(p)


def exo(p: Pairs, *, beta: Positive = 0.1, label_smoothing: Annotated[float, SOME_FLIPS] = 1e-3) -> PerPair:
    """`KL((s(beta D), s(-beta D)) || (1 - e, e))` (Ji et al. 2024, EXO-pref): DPO with the divergence reversed.

    ValueError for e = 0, where it is infinite.
    """
    SOME_FLIPS.check("label_smoothing", label_smoothing)
    kept, flipped = F.logsigmoid(beta * p.margin), F.logsigmoid(-beta * p.margin)
    agree = kept.exp() * (kept - math.log1p(-label_smoothing))
    return agree + flipped.exp() * (flipped - math.log(label_smoothing))


def nca(p: Pairs, *, beta: Positive = 0.01) -> PerPair:
    """`-log s(r_w) - (1/2) log s(-r_w) - (1/2) log s(-r_l)` (Chen et al. 2024, NCA for pairs): unlike DPO it looks at
    each log-ratio by itself, which keeps the chosen answer from becoming unlikely.
    """
    chosen, rejected = rewards(p, beta)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(p: Pairs, *, beta: Positive = 0.01, delta: float = 0.0) -> PerPair:
    """`-log s(r_w - delta) - log s(-(r_l - delta))` (Jung et al. 2024, BCO on pairs).

    Deviation: delta is a constant, 0 unless given, where the paper subtracts a running mean of the rewards.
    """
    chosen, rejected = rewards(p, beta)
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


def apo_zero(p: Pairs, *, beta: Positive = 0.1) -> PerPair:
    """`1 - s(r_w) + s(r_l)` (D'Oosterlinck et al. 2024): for chosen answers that are better than the policy's own;
    they become likelier, the rejected ones less likely.
    """
    chosen, rejected = rewards(p, beta)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(p: Pairs, *, beta: Positive = 0.1) -> PerPair:
    """`s(r_w) + 1 - s(r_w - r_l)` (D'Oosterlinck et al. 2024): for chosen answers that are worse than the policy's
    own; both become less likely, the rejected ones more so.
    """
    chosen, rejected = rewards(p, beta)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop(p: Pairs, *, beta: Positive = 0.05, tau: Positive = 0.05) -> PerPair:
    """`(1 - s(rho / tau)) (-log s(rho)) + s(rho / tau) exp(-rho)` with `rho = beta D` (Lu et al. 2024, DiscoPOP, the
    "log-ratio modulated loss" that a language model found). Not convex.

    For tau > 1 the second term grows without bound; where its exponent is above 30 it is continued by its tangent.
    """
    rho = beta * p.margin
    exponential = tangent_expm1(F.logsigmoid(rho / tau) - rho) + 1
    return torch.sigmoid(-rho / tau) * logistic(rho) + exponential


def sppo(p: Pairs, *, eta: Positive = 1000.0) -> PerPair:
    """`(p_w - f_w - eta / 2)^2 + (p_l - f_l + eta / 2)^2` (Wu et al. 2024, SPPO, with hard win rates of 1 and
    0). The reference is meant to be the previous iterate, and eta the paper's 1 / beta.
    """
    return (p.chosen - p.ref_chosen - eta / 2) ** 2 + (p.rejected - p.ref_rejected + eta / 2) ** 2


def aot(p: Pairs, *, beta: Positive = 0.01) -> PerPair:
    """`-log s(beta (u_(i) - v_(i)))` with `u = p_w - p_l`, `v = f_w - f_l`, and `_(i)` the i-th smallest of the batch
    (Melnyk et al. 2024, AOT for paired data): the policy's margins are to dominate the reference's as a distribution.

    A pair's value is that of its own u, set against the v of the same rank. Needs the whole batch.
    """
    return by_rank(p.chosen - p.rejected, p.ref_chosen - p.ref_rejected, beta)


def aot_unpaired(p: Pairs, *, beta: Positive = 0.01) -> PerPair:
    """`-log s(beta (u_(i) - v_(i)))` with `u = p_w - f_w`, `v = p_l - f_l`, and `_(i)` the i-th smallest of the batch
    (Melnyk et al. 2024, AOT for unpaired data): which rejected answer belongs to which chosen one does not matter.

    A pair's value is that of its own u, set against the v of the same rank. Needs the whole batch.
    """
    return by_rank(p.chosen - p.ref_chosen, p.rejected - p.ref_rejected, beta)


def f_dpo(
    p: Pairs,
    *,
    beta: Positive = 0.1,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
    alpha: Fraction = 0.5,
) -> PerPair:
    """`-log s(beta (f'(t_w) - f'(t_l)))` with `t = pi / pi_ref` (Wang et al. 2024, f-DPO): the policy is held
    near the reference by another divergence than the reverse KL, which gives DPO.

    `f'` up to a constant, which cancels: reverse KL `log t`, forward KL `-1/t`, Jensen-Shannon `log s(log t)`, alpha
    `(t^(alpha - 1) - 1) / (alpha - 1)`, whose limits are reverse KL at 1 and forward KL at 0 (the paper's alpha is 1
    minus ours). `alpha` is read by the alpha divergence only. Where an exponent is above 30, the exponential is
    continued by its tangent, so that neither it nor its gradient overflows.
    """
    slope = divergence_slope(divergence, alpha)
    return logistic(beta * (slope(p.chosen - p.ref_chosen) - slope(p.rejected - p.ref_rejected)))


def divergence_slope(divergence: str, alpha: float) -> Callable[[PerPair], PerPair]:
    """`f'` as a function of `log t`, up to a constant."""
    slopes: dict[str, Callable[[PerPair], PerPair]] = {
        "reverse_kl": lambda log_t: log_t,
        "forward_kl": lambda log_t: -tangent_expm1(-log_t),
        "js": F.logsigmoid,
        "alpha": lambda log_t: -shaped(-log_t, alpha - 1),
    }
    if divergence not in slopes:
        raise ValueError(f"divergence must be one of {', '.join(slopes)}, given {divergence!r}")
    return slopes[divergence]


def chi_po(p: Pairs, *, beta: Positive = 0.05, r_max: Positive = math.inf) -> PerPair:
    """`-log s(clip(beta [phi(t_w) - phi(t_l)], -2 R_max, 2 R_max))` with `phi(t) = t + log t` and `t = pi / pi_ref`
    (Huang et al. 2024, chi-PO, algorithm 1): the added chi-squared divergence keeps the policy off answers that the
    data hardly covers.

    `r_max` is the paper's bound on rewards, off by default; a pair whose difference is outside it passes no gradient.
    As in the paper's experiments, log t is clipped to [-88, 20] before it is exponentiated.
    """
    chosen, rejected = p.chosen - p.ref_chosen, p.rejected - p.ref_rejected
    difference = chosen.clamp(-88, 20).exp() - rejected.clamp(-88, 20).exp() + (chosen - rejected)
    return logistic((beta * difference).clamp(-2 * r_max, 2 * r_max))


def unlikelihood(p: Pairs, *, alpha: Fraction = 0.1) -> PerPair:
    """`-p_w + alpha p_l` (a baseline of Rafailov et al. 2023, after Welleck et al. 2020): likelier chosen answers, less
    likely rejected ones. No reference, and nothing stops it: unbounded below, text degenerates.
    """
    return -p.chosen + alpha * p.rejected


def preferred_ft(p: Pairs, *, average: bool = False) -> PerPair:
    """`-p_w`, the negative log-likelihood of the chosen answer (the "Preferred-FT" of Rafailov et al. 2023). No
    reference. `average=True` takes it per token, which is the scale to add to another loss.
    """
    return -mean_chosen(p) if average else -p.chosen


def ld_dpo(p: LengthSplitPairs, *, beta: Positive = 0.1, alpha: Fraction = 0.5) -> PerPair:
    """DPO in which every log-probability is `head + alpha tail` (Liu et al. 2024, LD-DPO): what the longer answer says
    after the shorter one has ended counts less. alpha = 1 is DPO.

    The reference's log-probabilities are split as well, so that the loss is ln 2 where policy and reference agree.
    """
    chosen = p.chosen_head - p.ref_chosen_head + alpha * (p.chosen_tail - p.ref_chosen_tail)
    rejected = p.rejected_head - p.ref_rejected_head + alpha * (p.rejected_tail - p.ref_rejected_tail)
    return logistic(beta * (chosen - rejected))


def wpo(p: WeightedPairs, *, beta: Positive = 0.01) -> PerPair:
    """`-w(y_w) w(y_l) log s(beta D)` (Zhou et al. 2024, WPO): pairs that the policy would write itself count more.

    `w(y)` is the exponential of the mean over the tokens of `log pi(y_t) - log sum_v pi(v)^2`; no gradient passes
    through it.
    """
    return (p.chosen_weight * p.rejected_weight).detach() * dpo(p.pairs, beta=beta)


def logistic(logits: PerPair, label_smoothing: float = 0.0) -> PerPair:
    """`-(1 - e) log s(x) - e log s(-x)`."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def rewards(p: Pairs, beta: float) -> tuple[PerPair, PerPair]:
    """The implicit rewards `beta (p - f)` of the chosen and of the rejected answers."""
    return beta * (p.chosen - p.ref_chosen), beta * (p.rejected - p.ref_rejected)


def mean_chosen(p: Pairs) -> PerPair:
    """The chosen answers' log-probability per token."""
    return p.chosen / p.chosen_length


def mean_rejected(p: Pairs) -> PerPair:
    """The rejected answers' log-probability per token."""
    return p.rejected / p.rejected_length


def mean_chosen_ratio(p: Pairs) -> PerPair:
    """The chosen answers' log-ratio per token."""
    return (p.chosen - p.ref_chosen) / p.chosen_length


def mean_rejected_ratio(p: Pairs) -> PerPair:
    """The rejected answers' log-ratio per token."""
    return (p.rejected - p.ref_rejected) / p.rejected_length


def log_odds(logprob: PerPair) -> PerPair:
    """`log(P / (1 - P))` of `P = exp(logprob)`, for P up to 1 - 1e-6."""
    logprob = logprob.clamp(max=LARGEST_MEAN_LOGPROB)
    return logprob - torch.log(-torch.expm1(logprob))


def shaped(logprob: PerPair, alpha: float) -> PerPair:
    """`(1 - P^-alpha) / alpha` of `P = exp(logprob)`; its limit `log P` at alpha = 0."""
    return -tangent_expm1(-alpha * logprob) / alpha if alpha else logprob


def tangent_expm1(x: PerPair) -> PerPair:
    """`exp(x) - 1`, continued by its tangent above 30, where float32 has still room for products and gradients."""
    beyond = (x - LARGEST_EXPONENT).clamp(min=0)
    return torch.expm1(x.clamp(max=LARGEST_EXPONENT)) + math.exp(LARGEST_EXPONENT) * beyond


def by_rank(u: PerPair, v: PerPair, beta: float) -> PerPair:
    """`-log s(beta (u_(i) - v_(i)))` for values of the same rank, in the order of `u`."""
    ranks = u.argsort().argsort()
    return -F.logsigmoid(beta * (u - v.sort().values[ranks]))


PREFERENCE_LOSSES: dict[str, Callable[..., PerPair]] = {
    function.__name__: function
    for function in (
        *(dpo, robust, ipo, hinge, slic, simpo, orpo, cpo, alphapo, length_normalized_dpo, r_dpo, dpop, rpo),
        *(exo, nca, bco_pair, apo_zero, apo_down, discopop, sppo, aot, aot_unpaired, f_dpo, chi_po),
        *(unlikelihood, preferred_ft),
    )
}
LENGTH_SPLIT_LOSSES: dict[str, Callable[..., PerPair]] = {"ld_dpo": ld_dpo}
WEIGHTED_LOSSES: dict[str, Callable[..., PerPair]] = {"wpo": wpo}
ALL_LOSSES: dict[str, Callable[..., PerPair]] = {**PREFERENCE_LOSSES, **LENGTH_SPLIT_LOSSES, **WEIGHTED_LOSSES}

REFERENCE_FREE = frozenset({"slic", "simpo", "orpo", "cpo", "alphapo", "unlikelihood", "preferred_ft"})
"""Losses that do not read the reference's log-probabilities."""

ACROSS = frozenset({"aot", "aot_unpaired"})
"""Losses whose value for one pair depends on the other pairs of the batch."""
