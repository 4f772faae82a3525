"""The reference policy's log-probabilities: stored once, computed live, or from a reference that moves.

All three `attach` to a batch; an objective cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.batches import PerToken, Referenced, Tokens, move
from trimtab.progress import progress_bar
from trimtab.tokens import Encoded, Row, pad


class Scorer(Protocol):
    """Log-probabilities of rows, nats per token, without gradient."""

    @property
    def device(self) -> torch.device: ...

    def logprobs(self, tokens: Tokens) -> PerToken: ...


class Reference(Protocol):
    """Adds the reference's log-probabilities to the batch made of these items."""

    def attach(self, batch: Any, items: Sequence[int]) -> Referenced: ...


@dataclass(frozen=True)
class StoredReference:
    """Log-probabilities computed once: `logprobs[i]` holds one tensor per row of item `i`."""

    logprobs: Sequence[Sequence[Tensor]]

    def attach(self, batch: Any, items: Sequence[int]) -> Referenced:
        rows = [row for item in items for row in self.logprobs[item]]
        return Referenced(batch, pad_sequence(rows, batch_first=True))


@dataclass(frozen=True)
class LiveReference:
    """Log-probabilities computed when a batch is drawn, `max_rows` rows at a time."""

    scorer: Scorer
    max_rows: int

    @torch.no_grad()
    def attach(self, batch: Any, items: Sequence[int]) -> Referenced:
        logprobs = torch.zeros(batch.tokens.ids.shape)
        for rows in torch.arange(len(batch.tokens)).split(self.max_rows):
            tokens = move(batch.tokens.select(rows), self.scorer.device)
            logprobs[rows, batch.tokens.used_columns(rows)] = self.scorer.logprobs(tokens).cpu()
        return Referenced(batch, logprobs)


@dataclass(frozen=True)
class NoReference:
    """Zeros, for losses that do not read a reference."""

    def attach(self, batch: Any, items: Sequence[int]) -> Referenced:
        return Referenced(batch, torch.zeros(batch.tokens.ids.shape))


@torch.no_grad()
def store(scorer: Scorer, items: Sequence[Encoded], *, pad_id: int, max_rows: int) -> StoredReference:
    """Score every row of every item once, rows of similar length together."""
    rows: list[Row] = [row for item in items for row in item.rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with progress_bar("reference log-probabilities", len(rows)) as advance:
        for start in range(0, len(rows), max_rows):
            chosen = by_length[start : start + max_rows]
            logprobs = scorer.logprobs(move(pad([rows[i] for i in chosen], pad_id), scorer.device)).cpu()
            for i, values in zip(chosen, logprobs, strict=True):
                found[i] = values[: len(rows[i].ids)].clone()
            advance(len(chosen))
    remaining = iter(found)
    return StoredReference([[next(remaining) for _ in item.rows] for item in items])


def moving(
    batches: Iterable[Any], update: Callable[[float], None], *, alpha: float = 0.6, every: int = 512
) -> Iterator[Any]:
    """Batches whose reference moves towards the policy: TR-DPO (Gorbatovski et al. 2024), defaults of its soft update.

    Before every `every`-th step after the first, `update(alpha)` sets reference <- alpha * policy + (1 - alpha) *
    reference; `alpha=1` is the hard update. `batches` must compute the reference live and lazily.
    """
    drawn = iter(batches)
    step = 0
    while True:
        if step and step % every == 0:
            update(alpha)
        try:
            batch = next(drawn)
        except StopIteration:
            return
        yield batch
        step += 1


@torch.no_grad()
def blend(reference: torch.nn.Module, policy: torch.nn.Module, alpha: float) -> None:
    """reference <- alpha * policy + (1 - alpha) * reference, weight by weight."""
    for moved, target in zip(reference.parameters(), policy.parameters(), strict=True):
        moved.lerp_(target, alpha)
