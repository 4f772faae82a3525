"""How far a policy has moved from its reference: KL, length, and answers that do not end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trimtab.batches import PerToken
from trimtab.evals.intervals import Estimate, bootstrap_mean, wilson
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
    kl = kl_per_token(policy, reference, samples, batch_rows).sum(-1)
    lengths = samples.tokens.response_lengths
    by_prompt, prompt_lengths = per_prompt(kl, samples.n), per_prompt(lengths, samples.n)
    ratios = [nats / tokens for nats, tokens in zip(by_prompt, prompt_lengths, strict=True)]
    return Drift(
        kl=bootstrap_mean(by_prompt, seed),
        kl_per_token=bootstrap_mean(ratios, seed, weights=prompt_lengths),
        length=bootstrap_mean(prompt_lengths, seed),
        unfinished=wilson(int((~samples.finished).sum()), len(samples.finished)),
    )


def kl_per_token(policy: Policy, reference: Policy | FrozenPolicy, samples: Samples, batch_rows: int = 16) -> PerToken:
    """The exact KL(policy || reference) of every next-token distribution, nats, zero outside the answers."""
    by_length = samples.tokens.attention_mask.sum(-1).argsort(stable=True)
    return in_chunks(partial(policy.kl, reference=reference), samples.tokens, batch_rows, order=by_length)


def per_prompt(values: Tensor, n: int) -> list[float]:
    """The mean over the `n` neighbouring rows of each prompt."""
    return values.view(-1, n).double().mean(-1).tolist()
