"""Rows of tokens <-> the sequences that a model runs. Pure: ids and masks in, ids and masks out.

Rows are the logical view: one prompt and one answer each, `[B, T]`. The physical view is `[S, L]`: neighbouring rows
with the same prompt become one *group*, the prompt once and then each row's other tokens (its *branch*); several groups
stand one after the other in a sequence. A token sees the earlier tokens of its group that belong to the prompt or to
its own branch, and positions restart after the prompt for every branch, so each row is computed as if it stood alone.

Packing demonstrations is the same thing with groups of one row.

Prompts and branches are stretches of a sequence, so what sees what is one number a token: the last place from which it
is seen (`Layout.until`), the end of its group for a prompt's token and the end of its branch for others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from trimtab.batches import Mask, Tokens

WORTH_IT = 0.9
"""A layout is used where it costs at most this share of what padded rows cost."""

ATTENTION_COST = 4.0
"""How much longer a multiplication takes in attention under an explicit mask than in a layer's matrix products.

Forward and backward on one core with AVX-512: 5 to 6 times in bf16, 1.2 to 1.4 times in float32, for sequences of 256
to 1,024 tokens; hardly less without the mask.
"""

RowLengths = Int[Tensor, " B"]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(sequence, head, query, key) -> whether the query sees the key: indices in, a boolean out, elementwise."""


@dataclass(frozen=True)
class Arrangement:
    """How rows may be laid out: `share` equal prompts of neighbours, fill sequences up to `capacity` tokens.

    With capacity 0 sequences are as long as is cheapest, and rows stay as they are where that is cheaper.
    """

    share: bool = True
    capacity: int = 0


@dataclass(frozen=True)
class Layout:
    """Sequences, what may see what in them, and where every token of the rows went.

    A token is seen from its own place to `until`, a place in its sequence. `place[b, t]` is the index of token `t` of
    row `b` in the flattened sequences; it is 0 for padding.
    """

    ids: Int[Tensor, "S L"]
    positions: Int[Tensor, "S L"]
    until: Int[Tensor, "S L"]
    place: Int[Tensor, "B T"]

    @no_type_check  # compilers trace the inner function, and its indices may be of any shape
    def mask_mod(self, window: int | None = None) -> MaskMod:
        """Whether a query sees a key, as a pure function of indices; within `window` positions where one is given.

        A token of padding sees itself, so no query is without keys.
        """
        until, positions = self.until, self.positions

        def sees(sequence, head, query, key):
            return (key <= query) & (query <= until[sequence, key])

        def sees_near(sequence, head, query, key):
            near = positions[sequence, query] < positions[sequence, key] + window
            return sees(sequence, head, query, key) & near

        return sees_near if window else sees

    def mask(self, window: int | None = None) -> Bool[Tensor, "S 1 L L"]:
        """Whether a query (third axis) sees a key (fourth axis)."""
        sequences, length = self.ids.shape
        sequence = torch.arange(sequences, device=self.ids.device)[:, None, None, None]
        token = torch.arange(length, device=self.ids.device)
        return self.mask_mod(window)(sequence, torch.zeros_like(sequence), token[:, None], token)


@dataclass(frozen=True)
class Groups:
    """Which neighbouring rows stand together: row `b` is in group `number[b]`, of `lengths[number[b]]` tokens.

    The first `shared[b]` tokens of a row are its group's and run once; `own[b]` tokens are its branch.
    """

    number: RowLengths
    shared: RowLengths
    own: RowLengths
    lengths: list[int]


def positions_of(attention_mask: Mask) -> Int[Tensor, "B T"]:
    """Each real token's number in its row, from 0, whichever side the padding is on."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def pair_price(width: int) -> float:
    """The price of one (query, key) pair of the attention, in tokens, of a transformer with this hidden size.

    A layer's matrices hold about 12 width^2 numbers, so a token takes 12 width^2 multiplications; a pair takes 2 width
    (its logit, and its share of the output), each `ATTENTION_COST` times as long.
    """
    return ATTENTION_COST / (6 * width)


def cost(shape: tuple[int, ...], pair_price: float) -> float:
    """What running sequences `[S, L]` costs, in tokens. The attention looks at every pair, seen or not."""
    sequences, length = shape
    return sequences * length * (1 + pair_price * length)


def arrange(tokens: Tokens, arrangement: Arrangement, pair_price: float) -> Layout | None:
    """The layout of some rows; None where padded rows cost hardly more. An explicit capacity is always used."""
    groups = find_groups(tokens, share=arrangement.share)
    bins = fill_bins(groups.lengths, arrangement.capacity, pair_price)
    shape = len(bins), fullest(bins, groups.lengths)
    worth_it = cost(shape, pair_price) <= WORTH_IT * cost(tokens.ids.shape, pair_price)
    return place_groups(tokens, groups, bins) if worth_it or arrangement.capacity else None


def lay_out(tokens: Tokens, *, share: bool, capacity: int = 0, pair_price: float = 0.0) -> Layout:
    """Rows as the cheapest sequences, of at most `capacity` tokens (or the longest group) unless it is 0.

    With `share`, neighbouring rows with the same prompt run it once. Where pairs cost nothing, since attention skips
    those that are not seen, one sequence holds everything and no padding.
    """
    groups = find_groups(tokens, share=share)
    return place_groups(tokens, groups, fill_bins(groups.lengths, capacity, pair_price))


def find_groups(tokens: Tokens, *, share: bool) -> Groups:
    """Neighbouring rows with equal prompts as groups; a group of one row for each without `share`."""
    real, answered = tokens.attention_mask, tokens.response_mask
    before_answer = (real & (answered.cumsum(-1) == 0)).sum(-1)
    prompts = torch.where(answered.any(-1), before_answer, 0)
    starts = torch.ones_like(prompts, dtype=torch.bool)
    if share:
        starts[1:] = ~continues(flush_left(tokens.ids, real), prompts)
    number = starts.cumsum(0) - 1
    shared = torch.where(number.bincount()[number] > 1, prompts, 0)
    own = real.sum(-1) - shared
    lengths = shared[starts].index_add(0, number, own)
    return Groups(number, shared, own, lengths.tolist())


def flush_left(ids: Int[Tensor, "B T"], real: Mask) -> Int[Tensor, "B T"]:
    """Each row's real tokens first, then its padding."""
    return ids.gather(1, (~real).byte().argsort(dim=1, stable=True))


def continues(ids: Int[Tensor, "B T"], prompts: RowLengths) -> Bool[Tensor, " _"]:
    """Whether each row but the first has a prompt, and the one of the row before it."""
    differs = (ids[1:] != ids[:-1]) & (torch.arange(ids.shape[1], device=ids.device) < prompts[1:, None])
    return (prompts[1:] == prompts[:-1]) & (prompts[1:] > 0) & ~differs.any(-1)


def place_groups(tokens: Tokens, groups: Groups, bins: Sequence[Sequence[int]]) -> Layout:
    """The layout in which sequence `s` holds the groups `bins[s]`, one after the other."""
    device = tokens.ids.device
    shape = len(bins), fullest(bins, groups.lengths)
    starts = group_starts(bins, groups.lengths, shape[1]).to(device)[groups.number]
    ends = starts + torch.tensor(groups.lengths, device=device)[groups.number]
    branches = starts + groups.shared + earlier_branches(groups)
    positions = positions_of(tokens.attention_mask)
    in_prompt = positions < groups.shared[:, None]
    place = torch.where(in_prompt, starts[:, None], (branches - groups.shared)[:, None]) + positions
    until = torch.where(in_prompt, ends[:, None], (branches + groups.own)[:, None]) - 1

    def spread(values: Tensor, background: Tensor) -> Tensor:
        # Rows of a group write the same values to the places of their prompt.
        real = tokens.attention_mask
        return background.index_put((place[real],), values[real]).view(shape)

    columns = torch.arange(shape[1], device=device).repeat(shape[0])
    return Layout(
        ids=spread(tokens.ids, torch.zeros_like(columns)),
        positions=spread(positions, torch.zeros_like(columns)),
        until=spread(until % shape[1], columns),
        place=torch.where(tokens.attention_mask, place, 0),
    )


def group_starts(bins: Sequence[Sequence[int]], lengths: Sequence[int], length: int) -> Int[Tensor, " G"]:
    """Where each group starts in the flattened sequences of `length` tokens."""
    starts = [0] * len(lengths)
    for sequence, members in enumerate(bins):
        at = sequence * length
        for g in members:
            starts[g] = at
            at += lengths[g]
    return torch.tensor(starts)


def earlier_branches(groups: Groups) -> RowLengths:
    """Tokens in the branches of each group's rows that stand before a row."""
    before = groups.own.cumsum(0) - groups.own
    is_first = groups.number.diff(prepend=groups.number.new_tensor([-1])) > 0
    return before - before[is_first][groups.number]


def fill_bins(lengths: Sequence[int], capacity: int, pair_price: float) -> list[list[int]]:
    """Which items go into which bin: of the even partitions into 1, 2, 3, ... bins the cheapest to run.

    No bin holds more than `capacity`, or the longest item where that is more; 0 allows any.
    """
    longest = max(lengths)
    allowed = max(capacity, longest) if capacity else sum(lengths)
    best: list[list[int]] = []
    for number in range(1, len(lengths) + 1):
        bins = even_bins(lengths, number)
        fill = fullest(bins, lengths)
        if fill <= allowed and (
            not best or cost((number, fill), pair_price) < cost((len(best), fullest(best, lengths)), pair_price)
        ):
            best = bins
        if fill == longest:
            break  # more bins would be more padding
    return best


def even_bins(lengths: Sequence[int], number: int) -> list[list[int]]:
    """Items in bins of similar fill: the longest first, each into the bin with the most room."""
    bins: list[list[int]] = [[] for _ in range(number)]
    fills = [(0, b) for b in range(number)]
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fill, b = fills[0]
        bins[b].append(item)
        heapq.heapreplace(fills, (fill + lengths[item], b))
    return bins


def fullest(bins: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """What the fullest bin holds."""
    return max(sum(lengths[item] for item in members) for members in bins)
