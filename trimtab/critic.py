"""A policy and its critic, trained together: what PPO's objective and learner see as one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from trimtab.batches import PerToken, Tokens
from trimtab.bodies import at_responses, predicting
from trimtab.models import Policy, ScalarModel


@dataclass(frozen=True)
class PolicyWithCritic:
    """The policy's log-probabilities and the critic's values. They share no weights, and `save` writes the policy."""

    policy: Policy
    critic: ScalarModel

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def logprobs(self, tokens: Tokens) -> PerToken:
        """As `Policy.logprobs`."""
        return self.policy.logprobs(tokens)

    def values(self, tokens: Tokens) -> PerToken:
        """What the critic expects *before* each response token, reward units, zero elsewhere."""
        return values_before(self.critic, tokens)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All weights of both, the critic's under `critic.`."""
        yield from self.policy.named_parameters()
        yield from ((f"critic.{name}", weight) for name, weight in self.critic.named_parameters())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The policy's weights; the critic's are `critic.trainable_parameters()` and learn at another rate."""
        return self.policy.trainable_parameters()

    def save(self, path: str | Path) -> None:
        """Write the policy as a standard model folder."""
        self.policy.save(path)


def values_before(critic: ScalarModel, tokens: Tokens) -> PerToken:
    """A critic's output after reading everything in front of each response token, `[B, T]`, zero elsewhere."""
    rows, columns = predicting(tokens)
    return at_responses(tokens, critic.values(tokens).to(tokens.ids.device)[rows, columns])
