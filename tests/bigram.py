"""A policy, reward model and data so small that a test can say everything about them: next-token bigrams."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.batches import (
    DemonstrationBatch,
    FeedbackBatch,
    PairBatch,
    PolicyBatch,
    RankingBatch,
    Referenced,
    Tokens,
)

VOCABULARY = 6


@dataclass
class Statistics:
    """What a policy reports about its next-token distributions, `[B, T]` each."""

    logprobs: Tensor
    log_sum_squares: Tensor
    entropy: Tensor


class Bigram(nn.Module):
    """Next-token logits and a score that depend on the previous token alone."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=dtype))
        self.value = nn.Parameter(torch.randn(VOCABULARY, generator=generator, dtype=dtype))
        self.device = torch.device("cpu")

    def trainable_parameters(self) -> list[Tensor]:
        return list(self.parameters())

    def distributions(self, tokens: Tokens) -> Tensor:
        """Log-probabilities over the vocabulary before each token, `[B, T, V]`."""
        return self.logits.log_softmax(-1)[tokens.ids.roll(1, dims=1)]

    def logprobs(self, tokens: Tokens) -> Tensor:
        picked = self.distributions(tokens).gather(-1, tokens.ids[..., None])[..., 0]
        return torch.where(tokens.response_mask, picked, 0)

    def statistics(self, tokens: Tokens) -> Statistics:
        logs = self.distributions(tokens)
        squares, entropy = (2 * logs).logsumexp(-1), -(logs.exp() * logs).sum(-1)
        return Statistics(self.logprobs(tokens), squares, entropy)

    def scores(self, tokens: Tokens) -> Tensor:
        return torch.where(tokens.response_mask, self.value[tokens.ids], 0).sum(-1)

    def values(self, tokens: Tokens) -> Tensor:
        """What is expected before each token, from the token in front of it."""
        return torch.where(tokens.response_mask, self.value[tokens.ids.roll(1, dims=1)], 0)


def random_tokens(rows: int, seed: int, longest: int = 7) -> Tokens:
    """Rows with prompts of 2 tokens and answers of 1 to `longest - 2`, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, longest), generator=generator)
    lengths = torch.randint(3, longest + 1, (rows, 1), generator=generator)
    real = torch.arange(longest) < lengths
    answered = real & (torch.arange(longest) >= 2)
    return Tokens(torch.where(real, ids, 0), real, answered)


def uneven(count: int) -> Tensor:
    """Weights that differ, so that a mean of means is not the mean."""
    return torch.linspace(0.5, 2, count)


def demonstrations(seed: int = 0) -> DemonstrationBatch:
    return DemonstrationBatch(random_tokens(8, seed), uneven(8))


def pairs(seed: int = 0, confidence: float = 1.0) -> Referenced[PairBatch]:
    tokens = random_tokens(16, seed)
    batch = PairBatch(tokens, uneven(8), torch.full((8,), confidence), torch.linspace(0, 1, 8))
    with torch.no_grad():
        return Referenced(batch, Bigram(seed + 100).logprobs(tokens))


def rankings(seed: int = 0) -> RankingBatch:
    return RankingBatch(random_tokens(16, seed), torch.tensor([2, 4, 3, 3, 4]), uneven(5))


def feedback(seed: int = 0) -> Referenced[FeedbackBatch]:
    tokens = random_tokens(16, seed)
    batch = FeedbackBatch(tokens, torch.tensor([True, False, True, True, False, True, False, True]), uneven(8))
    with torch.no_grad():
        return Referenced(batch, Bigram(seed + 100).logprobs(tokens))


def drawn(seed: int = 0, *, distance: float = 0.3) -> PolicyBatch:
    """Eight groups of two answers, as a policy near `Bigram(1)` may have drawn and somebody credited them.

    One answer has no score. `distance` is that of all other log-probabilities and values from those of `Bigram(1)`.
    """
    tokens = random_tokens(16, seed)
    mask, generator = tokens.response_mask, torch.Generator().manual_seed(seed + 1)

    def near(values: Tensor) -> Tensor:
        noise = distance * torch.randn(mask.shape, generator=generator)
        return torch.where(mask, values + noise, 0)

    policy = Bigram(1)
    with torch.no_grad():
        logprobs, values = policy.logprobs(tokens), policy.values(tokens)
    weights = torch.ones(16)
    weights[5] = 0
    return PolicyBatch(
        tokens=tokens,
        sampled_logprobs=near(logprobs),
        old_logprobs=near(logprobs),
        ref_logprobs=near(logprobs),
        advantages=near(torch.randn(16, 1, generator=generator)),
        returns=near(values),
        old_values=near(values),
        scores=torch.randn(16, generator=generator),
        weights=weights,
        finished=torch.arange(16) % 3 > 0,
        group_size=2,
    )
