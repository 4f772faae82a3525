"""How far a policy has moved from its reference: KL, entropy, perplexity, length, repetition, answers without end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.batches import PerToken, Tokens
from trimtab.evals.intervals import Estimate, bootstrap_mean, to_json, wilson
from trimtab.parallel import in_chunks
from trimtab.sampling import Samples

if TYPE_CHECKING:
    from trimtab.models import FrozenPolicy, Policy


@dataclass(frozen=True)
class Drift:
    """KL(policy || reference) in nats per answer and per token, tokens per answer, and the share without an end.

    The intervals of KL and length are over prompts, for the answers to one prompt are not independent.
    """

    kl: Estimate
    kl_per_token: Estimate
    length: Estimate
    unfinished: Estimate

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "kl": self.kl.to_dict(),
            "kl_per_token": self.kl_per_token.to_dict(),
            "length": self.length.to_dict(),
            "unfinished": self.unfinished.to_dict(),
        }


def drift(
    policy: Policy, reference: Policy | FrozenPolicy, samples: Samples, *, batch_rows: int = 16, seed: int = 0
) -> Drift:
    """The drift on answers that `policy` itself drew, plainly (temperature 1, no top-k, no top-p).

    KL of an answer is the sum over its tokens of the exact KL between the two next-token distributions: along the
    policy's own samples an unbiased estimate of the KL between the two distributions over answers, never negative
    and with less variance than log-ratios. Answers that stop at `max_new_tokens` count up to there. For samples drawn
    otherwise it is the mean along those samples, not a KL of the policy.
    """
    return drift_of(kl_per_token(policy, reference, samples, batch_rows), samples, seed)


def drift_of(kl: PerToken, samples: Samples, seed: int = 0) -> Drift:
    """The drift from the exact KL of every token, nats."""
    by_prompt, prompt_lengths = (
        per_prompt(kl.sum(-1), samples.n),
        per_prompt(samples.tokens.response_lengths, samples.n),
    )
    return Drift(
        kl=bootstrap_mean(by_prompt, seed),
        kl_per_token=per_token(by_prompt, prompt_lengths, seed),
        length=bootstrap_mean(prompt_lengths, seed),
        unfinished=wilson(int((~samples.finished).sum()), len(samples.finished)),
    )


def per_token(sums: Sequence[float], lengths: Sequence[float], seed: int) -> Estimate:
    """The mean over tokens from the sums and numbers of tokens of the answers to each prompt."""
    ratios = [total / tokens for total, tokens in zip(sums, lengths, strict=True)]
    return bootstrap_mean(ratios, seed, weights=lengths)


@dataclass(frozen=True)
class FullDrift:
    """`Drift` and what else tells that a policy has changed, all along its own samples.

    `sampled_kl` estimates the same KL from the log-ratios of the drawn tokens alone (nats per answer; noisier, and it
    may be negative). `entropy` is of the policy's next-token distributions, nats per token. `reference_perplexity` is
    exp of the reference's negative log-likelihood per token: what the reference makes of the answers. `repetition` is
    the mean share of an answer's 4-grams of tokens that it had before (seq-rep-4 of Welleck et al. 2020); None where no
    answer has four tokens.
    """

    drift: Drift
    sampled_kl: Estimate
    entropy: Estimate
    reference_perplexity: Estimate
    repetition: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, in one object."""
        others = {"sampled_kl", "entropy", "reference_perplexity", "repetition"}
        return {**self.drift.to_dict(), **{name: to_json(getattr(self, name)) for name in sorted(others)}}


def full_drift(
    policy: Policy, reference: Policy | FrozenPolicy, samples: Samples, *, batch_rows: int = 16, seed: int = 0
) -> FullDrift:
    """The drift with everything else that is measured on answers that `policy` drew plainly; intervals over prompts."""
    figures = token_figures(policy, reference, samples, batch_rows)
    log_ratio = (figures.logprobs - figures.ref_logprobs).sum(-1)
    lengths = per_prompt(samples.tokens.response_lengths, samples.n)
    surprise = per_token(per_prompt(-figures.ref_logprobs.sum(-1), samples.n), lengths, seed)
    return FullDrift(
        drift=drift_of(figures.kl, samples, seed),
        sampled_kl=bootstrap_mean(per_prompt(log_ratio, samples.n), seed),
        entropy=per_token(per_prompt(figures.entropy.sum(-1), samples.n), lengths, seed),
        reference_perplexity=Estimate(exp(surprise.value), exp(surprise.low), exp(surprise.high), surprise.count),
        repetition=repetition(samples, seed=seed),
    )


def exp(nats: float) -> float:
    """e to the power of some nats, infinite where that is too large for a float."""
    return math.exp(nats) if nats < 700 or math.isnan(nats) else math.inf


def repetition(samples: Samples, n: int = 4, *, seed: int = 0) -> Estimate | None:
    """The mean share of repeated n-grams of tokens of an answer; answers with fewer than n tokens are left out."""
    shares = [repeated_share(answer.ids, n) for answer in samples.answers]
    by_prompt = [[s for s in shares[i : i + samples.n] if s is not None] for i in range(0, len(shares), samples.n)]
    means = [fmean(found) for found in by_prompt if found]
    return bootstrap_mean(means, seed) if means else None


def repeated_share(ids: Sequence[int], n: int) -> float | None:
    """1 - (different n-grams) / (n-grams); None where there are none."""
    grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else None


@dataclass(frozen=True)
class TokenFigures:
    """What policy and reference say of every drawn token, `[B, T]` in nats, zero outside the answers."""

    kl: PerToken
    entropy: PerToken
    logprobs: PerToken
    ref_logprobs: PerToken


@torch.no_grad()
def token_figures(
    policy: Policy, reference: Policy | FrozenPolicy, samples: Samples, batch_rows: int = 16
) -> TokenFigures:
    """The figures of every token, from two passes of the reference and one of the policy."""
    found = TokenFigures(*(torch.zeros(samples.tokens.ids.shape) for _ in range(4)))
    for rows, tokens in batches_by_length(samples.tokens, batch_rows):
        both = policy.compare(tokens, reference)
        columns = samples.tokens.used_columns(rows)
        values = (both.kl, both.entropy, both.logprobs, reference.logprobs(tokens))
        for whole, part in zip((found.kl, found.entropy, found.logprobs, found.ref_logprobs), values, strict=True):
            whole[rows, columns] = part.float().cpu()
    return found


def batches_by_length(tokens: Tokens, batch_rows: int) -> Iterator[tuple[Tensor, Tokens]]:
    """Rows of similar length together, and which they are."""
    for rows in tokens.attention_mask.sum(-1).argsort(stable=True).split(batch_rows):
        yield rows, tokens.select(rows)


def kl_per_token(policy: Policy, reference: Policy | FrozenPolicy, samples: Samples, batch_rows: int = 16) -> PerToken:
    """The exact KL(policy || reference) of every next-token distribution, nats, zero outside the answers."""
    by_length = samples.tokens.attention_mask.sum(-1).argsort(stable=True)
    return in_chunks(partial(policy.kl, reference=reference), samples.tokens, batch_rows, order=by_length)


def per_prompt(values: Tensor, n: int) -> list[float]:
    """The mean over the `n` neighbouring rows of each prompt."""
    return values.view(-1, n).double().mean(-1).tolist()
