"""The nouns of the tensor world: means, padded rows, and the batches that objectives read.

Shape glossary: `B` rows (sequences), `T` tokens, `P` items (prompts, pairs, rankings), `V` vocabulary.

- Index `t` of every per-token tensor `[B, T]` is about token `t`; the next-token shift happens in one function only
  (`trimtab.bodies.predicting`).
- Related rows are neighbours: the rows of a pair are chosen, rejected, chosen, rejected, ...
- The items of a batch are what `--batch-size` counts; `select` takes items, never rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PerToken = Float[Tensor, "B T"]
PerSequence = Float[Tensor, " B"]
PerPair = Float[Tensor, " P"]
Ids = Int[Tensor, "B T"]
Mask = Bool[Tensor, "B T"]
Average = Literal["sequences", "tokens", "constant", "sums"]


@dataclass(frozen=True)
class Mean:
    """A mean that is not divided yet: micro-batches and ranks add, and only the end divides."""

    total: Tensor
    count: Tensor

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def __mul__(self, factor: float) -> Mean:
        return Mean(self.total * factor, self.count)

    def detach(self) -> Mean:
        """The same numbers without their graph."""
        return Mean(self.total.detach(), self.count.detach())

    def item(self) -> float:
        """The mean as a Python number; NaN when nothing was counted."""
        count = self.count.item()
        return self.total.item() / count if count else float("nan")

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None = None) -> Mean:
        """The mean of `values`, each counted `weights` times (once by default; a mask will do)."""
        if weights is None:
            return cls(values.sum(), torch.tensor(float(values.numel()), device=values.device))
        # where() rather than a product: a masked-out value may be infinite, and 0 * inf is not a number.
        weights = weights.to(values.dtype)
        return cls(torch.where(weights != 0, values * weights, 0).sum(), weights.sum())


def mean_over(kind: Average, losses: PerToken, mask: Mask, *, length: float) -> Mean:
    """Per-token losses as one `Mean`; the four ways give tokens of long and short answers different weights.

    - `sequences`: the mean over an answer's tokens, then over answers (GRPO); a token of a long answer counts less
    - `tokens`: over all tokens of the batch (PPO, DAPO); every token counts the same, a long answer more
    - `constant`: an answer's sum over `length` tokens, which nothing else reads, then over answers (Dr. GRPO)
    - `sums`: an answer's sum, then over answers (REINFORCE, RLOO): with the advantage of the answer at every token,
      the policy gradient itself. `constant` is that by another scale, the first two are not for answers of unequal
      lengths.

    Micro-batches add to the same mean. Rows with an empty mask do not count; nothing outside the mask is read.
    """
    losses, lengths = torch.where(mask, losses, 0), mask.sum(-1)
    rows = (lengths > 0).sum().to(losses.dtype)
    totals = {
        "sequences": lambda: Mean((losses.sum(-1) / lengths.clamp(min=1)).sum(), rows),
        "tokens": lambda: Mean(losses.sum(), lengths.sum().to(losses.dtype)),
        "constant": lambda: Mean(losses.sum(), rows * length),
        "sums": lambda: Mean(losses.sum(), rows),
    }
    return totals[kind]()


def move(batch: Any, device: torch.device | str) -> Any:
    """The same batch with every tensor on `device`."""
    changes = {}
    for entry in fields(batch):
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor):
            changes[entry.name] = value.to(device)
        elif is_dataclass(value):
            changes[entry.name] = move(value, device)
    return replace(batch, **changes)


@dataclass(frozen=True)
class Tokens:
    """Padded rows of token ids.

    `attention_mask` marks real tokens; `response_mask` marks the tokens that the policy wrote or is to imitate, the
    closing end-of-sequence token included, never `t = 0`. Both come from lengths, never from comparing ids.
    """

    ids: Ids
    attention_mask: Mask
    response_mask: Mask

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def response_lengths(self) -> PerSequence:
        """Tokens that carry loss, per row, as floats."""
        return self.response_mask.sum(-1).float()

    def used_columns(self, rows: Tensor) -> slice:
        """The columns that are not padding in all of these rows."""
        used = self.attention_mask[rows].any(0).nonzero()
        return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)

    def select(self, rows: Tensor) -> Tokens:
        """Some rows, without the columns that are padding in all of them."""
        columns = self.used_columns(rows)
        return Tokens(
            self.ids[rows][:, columns], self.attention_mask[rows][:, columns], self.response_mask[rows][:, columns]
        )


class Batch(Protocol):
    """What a batch can do: count its items and hand out some of them."""

    @property
    def tokens(self) -> Tokens: ...

    @property
    def size(self) -> int: ...

    def item_rows(self) -> Tensor:
        """How many rows of `tokens` each item has, `[P]`. Rows of an item are neighbours."""
        ...

    def select(self, items: Tensor) -> Any: ...


@dataclass(frozen=True)
class DemonstrationBatch:
    """Answers to imitate: one row an item."""

    tokens: Tokens
    weights: PerSequence

    @property
    def size(self) -> int:
        return len(self.tokens)

    def item_rows(self) -> Tensor:
        return torch.ones(self.size, dtype=torch.long)

    def select(self, items: Tensor) -> DemonstrationBatch:
        return DemonstrationBatch(self.tokens.select(items), self.weights[items])


@dataclass(frozen=True)
class PairBatch:
    """Pairs: rows chosen, rejected, chosen, rejected, ...; everything else is per pair, `[P]`.

    `confidence` is the probability that chosen is the better one (0.5 is a tie).
    """

    tokens: Tokens
    weights: PerPair
    confidence: PerPair
    margin: PerPair

    @property
    def size(self) -> int:
        return len(self.weights)

    def item_rows(self) -> Tensor:
        return torch.full((self.size,), 2)

    def select(self, items: Tensor) -> PairBatch:
        return PairBatch(
            self.tokens.select(rows_of(items, self.item_rows())),
            self.weights[items],
            self.confidence[items],
            self.margin[items],
        )


@dataclass(frozen=True)
class RankingBatch:
    """Rankings: the `sizes[i]` rows of ranking `i` are neighbours, best first."""

    tokens: Tokens
    sizes: Int[Tensor, " P"]
    weights: PerPair

    @property
    def size(self) -> int:
        return len(self.sizes)

    def item_rows(self) -> Tensor:
        return self.sizes

    def select(self, items: Tensor) -> RankingBatch:
        rows = rows_of(items, self.sizes)
        return RankingBatch(self.tokens.select(rows), self.sizes[items], self.weights[items])


@dataclass(frozen=True)
class FeedbackBatch:
    """Unpaired feedback: rows are answer, mismatched answer, answer, mismatched answer, ...

    A mismatched row is another row's answer after this row's prompt; KTO estimates its KL term on them.
    """

    tokens: Tokens
    desirable: Bool[Tensor, " P"]
    weights: PerPair

    @property
    def size(self) -> int:
        return len(self.weights)

    def item_rows(self) -> Tensor:
        return torch.full((self.size,), 2)

    def select(self, items: Tensor) -> FeedbackBatch:
        rows = rows_of(items, self.item_rows())
        return FeedbackBatch(self.tokens.select(rows), self.desirable[items], self.weights[items])


@dataclass(frozen=True)
class Rollouts:
    """Answers that the policy drew, with what is needed to credit them. The answers to a prompt are neighbours.

    Log-probabilities of the drawn tokens: `sampled_logprobs` as sampling computed them, `logprobs` under the same
    policy as training computes them (or the same again, where one update makes that needless), `ref_logprobs` under the
    reference. `kl` is what each token's distance from the reference is taken to be (see `trimtab.kl`). All in nats, and
    zero outside the answers. `valid` is false for an answer that no reward could be given; its score is 0 and means
    nothing. `baseline` is what was expected of an answer before it was drawn.
    """

    tokens: Tokens
    sampled_logprobs: PerToken
    logprobs: PerToken
    ref_logprobs: PerToken
    kl: PerToken
    scores: PerSequence
    baseline: PerSequence
    valid: Bool[Tensor, " B"]
    finished: Bool[Tensor, " B"]
    group_size: int

    @property
    def mask(self) -> Mask:
        """The tokens that count: those of answers that have a score."""
        return self.tokens.response_mask & self.valid[:, None]

    @property
    def mean_kl(self) -> float:
        """The mean log-ratio of an answer to the reference, nats: an unbiased estimate of KL(policy || reference).

        NaN where no answer has a score.
        """
        return (torch.where(self.mask, self.logprobs - self.ref_logprobs, 0).sum() / self.valid.sum()).item()


@dataclass(frozen=True)
class PolicyBatch:
    """Answers that the policy drew, credited. An item is a group: the `group_size` answers to one prompt.

    `sampled_logprobs` and `old_logprobs` are the `sampled_logprobs` and `logprobs` of `Rollouts`. `old_values` are what
    the critic expected before each token (zeros without a critic) and `returns` what it should have. Rows whose
    `weights` are 0 count for nothing.
    """

    tokens: Tokens
    sampled_logprobs: PerToken
    old_logprobs: PerToken
    ref_logprobs: PerToken
    advantages: PerToken
    returns: PerToken
    old_values: PerToken
    scores: PerSequence
    weights: PerSequence
    finished: Bool[Tensor, " B"]
    group_size: int

    @property
    def mask(self) -> Mask:
        """The tokens that count."""
        return self.tokens.response_mask & (self.weights != 0)[:, None]

    @property
    def size(self) -> int:
        return len(self.tokens) // self.group_size

    def item_rows(self) -> Tensor:
        return torch.full((self.size,), self.group_size)

    def select(self, items: Tensor) -> PolicyBatch:
        rows = rows_of(items, self.item_rows())
        columns = self.tokens.used_columns(rows)
        per_token = ("sampled_logprobs", "old_logprobs", "ref_logprobs", "advantages", "returns", "old_values")
        per_row = ("scores", "weights", "finished")
        return replace(
            self,
            tokens=self.tokens.select(rows),
            **{name: getattr(self, name)[rows][:, columns] for name in per_token},
            **{name: getattr(self, name)[rows] for name in per_row},
        )


@dataclass(frozen=True)
class MixedBatch:
    """Answers that the policy drew and, beside them, demonstrations to imitate: items are the groups, then those.

    `weight` multiplies the summed loss of the demonstrations and makes their mean commensurate with that of the
    answers. It comes from the counts of the whole batch, so micro-batches add up to the same gradient.
    """

    answers: PolicyBatch
    demonstrations: DemonstrationBatch
    weight: float

    @property
    def tokens(self) -> Tokens:
        return stacked(self.answers.tokens, self.demonstrations.tokens)

    @property
    def size(self) -> int:
        return self.answers.size + self.demonstrations.size

    def item_rows(self) -> Tensor:
        return torch.cat([self.answers.item_rows(), self.demonstrations.item_rows()])

    def select(self, items: Tensor) -> MixedBatch:
        groups = self.answers.size
        drawn, shown = items[items < groups], items[items >= groups] - groups
        return MixedBatch(self.answers.select(drawn), self.demonstrations.select(shown), self.weight)


def stacked(first: Tokens, second: Tokens) -> Tokens:
    """The rows of both, padded on the right to one width."""
    width = max(first.ids.shape[1], second.ids.shape[1])

    def both(name: str) -> Tensor:
        parts = (getattr(tokens, name) for tokens in (first, second))
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    return Tokens(both("ids"), both("attention_mask"), both("response_mask"))


B = TypeVar("B", bound=Any)


@dataclass(frozen=True)
class Around(Generic[B]):
    """A batch inside another, which has the same rows and items."""

    batch: B

    @property
    def tokens(self) -> Tokens:
        return self.batch.tokens

    @property
    def size(self) -> int:
        return self.batch.size

    def item_rows(self) -> Tensor:
        return self.batch.item_rows()


@dataclass(frozen=True)
class Referenced(Around[B]):
    """A batch with the reference's log-probabilities, one per token of its rows, zero outside the responses."""

    logprobs: PerToken

    def select(self, items: Tensor) -> Referenced[B]:
        rows = rows_of(items, self.item_rows())
        return Referenced(self.batch.select(items), self.logprobs[rows][:, self.tokens.used_columns(rows)])


@dataclass(frozen=True)
class FreshBatch(Around[DemonstrationBatch | Referenced[PairBatch]]):
    """A batch made of answers that the policy just drew, and figures about everything that was drawn for it.

    Every part of the batch carries all of the figures: they are means, and adding a mean to itself leaves it as it is.
    """

    figures: Mapping[str, Mean]

    def select(self, items: Tensor) -> FreshBatch:
        return FreshBatch(self.batch.select(items), self.figures)


@dataclass(frozen=True)
class Pairs:
    """What the preference losses read: summed log-probabilities (nats per answer) and lengths (tokens), all `[P]`."""

    chosen: PerPair
    rejected: PerPair
    ref_chosen: PerPair
    ref_rejected: PerPair
    chosen_length: PerPair
    rejected_length: PerPair

    @property
    def margin(self) -> PerPair:
        """The difference of the log-ratios to the reference, chosen minus rejected, in nats."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


def rows_of(items: Tensor, item_rows: Tensor) -> Tensor:
    """The rows of some items, in the order of the items, where item `i` owns `item_rows[i]` neighbouring rows."""
    ends = item_rows.cumsum(0)
    return torch.cat(
        [torch.arange(int(ends[i] - item_rows[i]), int(ends[i]), device=items.device) for i in items.tolist()]
        or [items.new_zeros(0)]
    )


def split(batch: Any, max_rows: int) -> Iterator[Any]:
    """Consecutive micro-batches of at most `max_rows` rows each; an item is never torn apart.

    An item with more rows than `max_rows` is a micro-batch of its own.
    """
    for piece in pieces(batch.item_rows().tolist(), max_rows):
        yield batch.select(torch.arange(piece.start, piece.stop))


def pieces(item_rows: Sequence[int], max_rows: int) -> Iterator[range]:
    """Consecutive items, where item `i` has `item_rows[i]` rows, in pieces of at most `max_rows` rows or one item."""
    start, rows = 0, 0
    for i, count in enumerate(item_rows):
        if rows and rows + count > max_rows:
            yield range(start, i)
            start, rows = i, 0
        rows += count
    if item_rows:
        yield range(start, len(item_rows))


@lru_cache(maxsize=2)
def epoch_order(size: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the items in an epoch: a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return tuple(torch.randperm(size, generator=generator).tolist())


def batch_starts(size: int, batch_size: int) -> range:
    """Where the batches of an epoch start. A single item left over joins the batch before it.

    Losses that compare the items of a batch need two.
    """
    single = size % batch_size == 1 and size > batch_size
    return range(0, size - 1 if single else size, batch_size)


def batch_indices(size: int, batch_size: int, *, seed: int, steps: int, start: int = 0) -> Iterator[list[int]]:
    """The items of each step: epoch after epoch, each in its own order; an epoch's last batch may differ in size.

    With `start`, those of the steps after that one, as if the steps up to it had been drawn.
    """
    starts = batch_starts(size, batch_size)
    ends = [*starts[1:], size]
    for step in range(start, steps):
        epoch, place = divmod(step, len(starts))
        yield list(epoch_order(size, seed=seed, epoch=epoch)[starts[place] : ends[place]])
