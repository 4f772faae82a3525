"""Best-of-n: choosing the answer with the highest proxy score, what that costs in KL, and what it is worth in gold."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

Scores = Float[Tensor, "*P N"]


def best_of(scores: Float[Tensor, "P n"]) -> Int[Tensor, " P"]:
    """The index of the best of each prompt's answers; the first of them where several share the highest score.

    Answers are drawn independently, so that taking the first is as good as taking one of the tied ones at random.
    """
    check_finite(scores, "scores")
    # argmax leaves open which of equal values it returns; the maximum of a bool mask found from the left does not.
    is_best = scores == scores.amax(-1, keepdim=True)
    return is_best.int().cumsum(-1).eq(0).sum(-1)


def kl_bound(n: int) -> float:
    """KL(best-of-n policy || its own policy) in nats: log n - (n - 1) / n.

    Exact where no two answers tie (Stiennon et al. 2020), an upper bound for discrete answers with repeats (Beirami et
    al. 2024).
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def expected_best_of_n(proxy: Scores, gold: Scores, n: int) -> Float[Tensor, "*P"]:
    """The unbiased estimate, from `N >= n` answers of a prompt, of the gold score of its best-of-n by proxy score.

    The mean over all subsets of n answers: with answers sorted ascending by proxy score,
    `sum_{i=n..N} C(i-1, n-1) / C(N, n) gold_(i)` (Nakano et al. 2021, appendix I). The binomials are formed from
    log-gammas, and answers with equal proxy scores share their mean gold score, as if ties were broken at random.
    Leading dimensions are prompts; float64 inside and out.
    """
    if proxy.shape != gold.shape:
        raise ValueError(f"proxy and gold scores must have one shape, got {tuple(proxy.shape)} and {tuple(gold.shape)}")
    total = proxy.shape[-1]
    if not 1 <= n <= total:
        raise ValueError(f"best-of-n of n = {n} needs 1 <= n <= N, and there are N = {total} answers a prompt")
    check_finite(proxy, "proxy scores")
    check_finite(gold, "gold scores")
    ranked, order = proxy.sort(-1)
    gold = average_over_ties(ranked, gold.double().gather(-1, order))
    return gold @ rank_weights(n, total).to(gold.device)


def rank_weights(n: int, total: int) -> Float[Tensor, " N"]:
    """The probability that the i-th smallest of `total` answers is the best of n drawn without replacement."""
    rank = torch.arange(n, total + 1, dtype=torch.float64)
    log_weight = log_choose(rank - 1, n - 1) - log_choose(torch.tensor(float(total), dtype=torch.float64), n)
    return torch.cat([torch.zeros(n - 1, dtype=torch.float64), log_weight.exp()])


def log_choose(total: Tensor, n: int) -> Tensor:
    """log of the binomial coefficient `total` over `n`."""
    return torch.lgamma(total + 1) - math.lgamma(n + 1) - torch.lgamma(total - n + 1)


def average_over_ties(ranked: Scores, values: Scores) -> Scores:
    """`values` with those of equal neighbours in `ranked` replaced by their mean."""
    starts = torch.ones_like(ranked, dtype=torch.bool)
    starts[..., 1:] = ranked[..., 1:] != ranked[..., :-1]
    group = starts.long().cumsum(-1) - 1
    sums = torch.zeros_like(values).scatter_add_(-1, group, values)
    counts = torch.zeros_like(values).scatter_add_(-1, group, torch.ones_like(values))
    return (sums / counts.clamp(min=1)).gather(-1, group)


def check_finite(scores: Tensor, name: str) -> None:
    if not scores.isfinite().all():
        raise ValueError(f"{name} must be finite, got {scores[~scores.isfinite()][0].item()}")
