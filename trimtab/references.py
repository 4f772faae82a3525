"""The reference policy's log-probabilities: stored once, computed live, or from a reference that moves.

All three `attach` to a batch; an objective cannot tell them apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.batches import Referenced, move
from trimtab.losses.arguments import Range
from trimtab.parallel import first_tells, in_chunks, is_first, over_ranks
from trimtab.progress import console, progress_bar
from trimtab.reference_cache import WINDOW_ITEMS, ReferenceCache, Rows, read_window, window_file, write_window
from trimtab.tokens import Encoded, pad

if TYPE_CHECKING:
    from trimtab.models import Scorer


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

    def attach(self, batch: Any, items: Sequence[int]) -> Referenced:
        return Referenced(batch, in_chunks(self.scorer.logprobs, batch.tokens, self.max_rows))


@dataclass(frozen=True)
class NoReference:
    """Zeros, for losses that do not read a reference."""

    def attach(self, batch: Any, items: Sequence[int]) -> Referenced:
        return Referenced(batch, torch.zeros(batch.tokens.ids.shape))


def store(
    scorer: Scorer,
    items: Sequence[Encoded],
    *,
    pad_id: int,
    max_rows: int,
    wanted: Sequence[int] | None = None,
    cache: ReferenceCache | None = None,
) -> StoredReference:
    """Score every row of every item, or of the `wanted` ones, once; with a cache, once for all runs.

    Items go by windows in the order of `wanted`. Within a window, items of similar length run together, and the rows
    of an item always do. So a value depends on its window alone, whatever the cache holds already.
    """
    order = list(range(len(items)) if wanted is None else dict.fromkeys(wanted))
    windows = [order[start : start + WINDOW_ITEMS] for start in range(0, len(order), WINDOW_ITEMS)]
    found: dict[int, Rows] = {}
    if cache:
        found = first_tells(partial(recall, cache, scorer, items, windows, pad_id=pad_id, max_rows=max_rows))
    missing = [window for window in windows if window[0] not in found]
    with progress_bar("reference log-probabilities", sum(map(len, missing))) as advance:
        for window in missing:
            batches = list(scoring_batches(items, window, max_rows))
            for some in over_ranks(lambda own: [score(scorer, items, chosen, pad_id) for chosen in own], batches):
                found |= some
            advance(len(window))
            if cache and is_first():
                some = [items[i] for i in window]
                write_window(window_file(cache.folder, some), some, [found[i] for i in window])
    return StoredReference(found)


def recall(
    cache: ReferenceCache,
    scorer: Scorer,
    items: Sequence[Encoded],
    windows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    max_rows: int,
) -> dict[int, Rows]:
    """What a cache holds of some windows of items, by item; says how much that is.

    One batch of it is computed again; if it does not agree, nothing of it is used.
    """
    found: dict[int, Rows] = {}
    for window in windows:
        some = [items[i] for i in window]
        values = read_window(window_file(cache.folder, some), some)
        if values is not None:
            found |= zip(window, values, strict=True)
    draw = random.Random(cache.seed)
    if known := [window for window in windows if window[0] in found]:
        chosen = draw.choice(list(scoring_batches(items, draw.choice(known), max_rows)))
        if not agree(score(scorer, items, chosen, pad_id), found, cache.tolerance):
            console.print(f"{cache.folder}: the reference gives other log-probabilities now; all are computed again")
            found = {}
    wanted = sum(map(len, windows))
    console.print(f"reference log-probabilities: {len(found)} of {wanted} from {cache.folder}")
    return found


@torch.no_grad()
def score(scorer: Scorer, items: Sequence[Encoded], chosen: Sequence[int], pad_id: int) -> dict[int, Rows]:
    """The log-probabilities of some items, run together."""
    rows = [(i, row) for i in chosen for row in items[i].rows]
    logprobs = scorer.logprobs(move(pad([row for _, row in rows], pad_id), scorer.device)).cpu()
    found: dict[int, Rows] = {i: [] for i in chosen}
    for (i, row), values in zip(rows, logprobs, strict=True):
        found[i].append(values[: len(row.ids)].clone())
    return found


def agree(now: Mapping[int, Rows], known: Mapping[int, Rows], tolerance: float) -> bool:
    """Whether log-probabilities computed now are the known ones of the same items, but for rounding."""
    ours, theirs = (torch.cat([row for i in now for row in values[i]]) for values in (now, known))
    return bool(((ours - theirs).abs() <= tolerance * ours.abs().clamp_min(1)).all())


def scoring_batches(items: Sequence[Encoded], window: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """The items of a window that run together, short ones first; the order of the window settles ties."""
    return item_batches(items, sorted(window, key=lambda i: items[i].longest), max_rows)


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
    start: int = 0,
    *,
    alpha: Annotated[float, Range(0, 1, high_included=True)] = 0.6,
    every: Annotated[int, Range(0)] = 512,
) -> Iterator[Any]:
    """Batches whose reference moves towards the policy: TR-DPO (Gorbatovski et al. 2024), defaults of its soft update.

    Before every `every`-th step after the first, `update(alpha)` sets reference <- alpha * policy + (1 - alpha) *
    reference; `alpha=1` is the hard update. `batches` must compute the reference live and lazily; `start` steps were
    taken before them.
    """
    drawn = iter(batches)
    step = start
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
