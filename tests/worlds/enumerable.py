"""A world of short strings with a tabular policy: probabilities of all strings, Z, the optimum and KL, all exact.

A string has `length` tokens out of `vocabulary`; string `i` of the list spells `i` in base `vocabulary`. `N` is the
number of prompts, `S` the number of strings. Everything is float64.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """How many tokens there are, how long strings are, and how many prompts."""

    vocabulary: int = 3
    length: int = 3
    prompts: int = 1

    @property
    def num_strings(self) -> int:
        return self.vocabulary**self.length

    def strings(self) -> Tensor:
        """All strings, `[S, length]`, in the order of every other function here."""
        return torch.tensor(list(itertools.product(range(self.vocabulary), repeat=self.length)))

    def rewards(self, seed: int) -> Tensor:
        """A reward for every prompt and string, `[N, S]`, standard normal."""
        return torch.randn(self.prompts, self.num_strings, generator=seeded(seed), dtype=torch.float64)


class TabularPolicy(nn.Module):
    """Free logits for the next token after every prompt and prefix: any distribution over strings can be learned."""

    def __init__(self, world: World, seed: int | None = None) -> None:
        super().__init__()
        self.world = world
        shapes = [(world.prompts, world.vocabulary**t, world.vocabulary) for t in range(world.length)]
        generator = seeded(seed or 0)
        self.logits = nn.ParameterList(
            torch.zeros(shape, dtype=torch.float64)
            if seed is None
            else torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in shapes
        )

    def all_logprobs(self) -> Tensor:
        """The log-probability of every string after every prompt, `[N, S]`."""
        total = torch.zeros(self.world.prompts, 1, dtype=torch.float64)
        for logits in self.logits:
            total = (total[..., None] + logits.log_softmax(-1)).flatten(1)
        return total

    def token_logprobs(self, prompts: Tensor, strings: Tensor) -> Tensor:
        """The log-probability of every token of some strings `[n, length]` after some prompts `[n]`: `[n, length]`."""
        columns, prefix = [], torch.zeros_like(prompts)
        for t, logits in enumerate(self.logits):
            columns.append(logits.log_softmax(-1)[prompts, prefix, strings[:, t]])
            prefix = prefix * self.world.vocabulary + strings[:, t]
        return torch.stack(columns, dim=1)

    def logprobs(self, prompts: Tensor, strings: Tensor) -> Tensor:
        """The log-probability of some strings after some prompts, `[n]`."""
        return self.token_logprobs(prompts, strings).sum(1)

    @torch.no_grad()
    def sample(self, prompts: Tensor, seed: int) -> Tensor:
        """One string after each prompt, `[n, length]`, drawn token by token."""
        generator, prefix, columns = seeded(seed), torch.zeros_like(prompts), []
        for logits in self.logits:
            tokens = torch.multinomial(logits.softmax(-1)[prompts, prefix], 1, generator=generator)[:, 0]
            columns.append(tokens)
            prefix = prefix * self.world.vocabulary + tokens
        return torch.stack(columns, dim=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def index_of(strings: Tensor, vocabulary: int) -> Tensor:
    """The places of some strings `[n, length]` in the list of all, `[n]`."""
    weights = vocabulary ** torch.arange(strings.shape[1] - 1, -1, -1)
    return (strings * weights).sum(1)


def log_partition(ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z of every prompt, `[N]`: `Z = sum_y pi_ref(y) exp(r(y) / beta)`."""
    return (ref_logprobs + rewards / beta).logsumexp(-1)


def optimum(ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi*, `[N, S]`: what maximizes `E r - beta KL(pi || pi_ref)`."""
    return ref_logprobs + rewards / beta - log_partition(ref_logprobs, rewards, beta)[:, None]


def kl(logprobs: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of every prompt, `[N]`, in nats, from the log-probabilities of all strings."""
    return (logprobs.exp() * (logprobs - other)).sum(-1)


def total_variation(logprobs: Tensor, other: Tensor) -> Tensor:
    """Half the sum of absolute differences of probabilities, `[N]`."""
    return 0.5 * (logprobs.exp() - other.exp()).abs().sum(-1)
