"""The reference policy's log-probabilities: stored once, computed live, or from a reference that moves.

All three `attach` to a batch; an objective cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.batches import PerToken, Referenced, Tokens, move
from trimtab.losses.arguments import Range
from trimtab.progress import progress_bar
from trimtab.tokens import Encoded, pad


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

    logprobs: Mapping[int, Sequence[Tensor]]

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
def store(
    scorer: Scorer, items: Sequence[Encoded], *, pad_id: int, max_rows: int, wanted: Collection[int] | None = None
) -> StoredReference:
    """Score every row of every item, or of the `wanted` ones, once.

    Items of similar length run together, and the rows of an item always do.
    """
    by_length = sorted(range(len(items)) if wanted is None else wanted, key=lambda i: (items[i].longest, i))
    found: dict[int, list[Tensor]] = {i: [] for i in by_length}
    with progress_bar("reference log-probabilities", len(by_length)) as advance:
        for chosen in item_batches(items, by_length, max_rows):
            rows = [(i, row) for i in chosen for row in items[i].rows]
            logprobs = scorer.logprobs(move(pad([row for _, row in rows], pad_id), scorer.device)).cpu()
            for (i, row), values in zip(rows, logprobs, strict=True):
                found[i].append(values[: len(row.ids)].clone())
            advance(len(chosen))
    return StoredReference(found)


def item_batches(items: Sequence[Encoded], order: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Consecutive items of `order` with at most `max_rows` rows together (or one item, where it has more)."""
    batch: list[int] = []
    for i in order:
        if batch and sum(len(items[k].rows) for k in [*batch, i]) > max_rows:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def moving(
    batches: Iterable[Any],
    update: Callable[[float], None],
    *,
    alpha: Annotated[float, Range(0, 1, high_included=True)] = 0.6,
    every: Annotated[int, Range(0)] = 512,
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
