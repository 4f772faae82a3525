"""Rows of tokens <-> the sequences that a model runs. Pure: ids and masks in, ids and masks out.

Rows are the logical view: one prompt and one answer each, `[B, T]`. The physical view is `[S, L]`: neighbouring rows
with the same prompt become one *group*, the prompt once and then its answers (its *branches*); several groups stand
one after the other in a sequence. A token sees the earlier tokens of its group that belong to the prompt or to its own
branch, and positions restart after the prompt for every branch, so each row is computed as if it stood alone.

Packing demonstrations is the same thing with groups of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from trimtab.batches import Tokens

PROMPT_BRANCH = 0
PADDING_GROUP = -1
WORTH_IT = 0.9
"""A layout is used where it runs at most this share of the tokens that padded rows would."""


@dataclass(frozen=True)
class Arrangement:
    """How rows may be laid out: `share` equal prompts of neighbours, fill sequences up to `capacity` tokens.

    With capacity 0 a sequence is as long as the longest group, which only fills up what would be padding.
    """

    share: bool = True
    capacity: int = 0


@dataclass(frozen=True)
class Layout:
    """Sequences, what may see what in them, and where every token of the rows went.

    `group` and `branch` number the tokens' owners (`PADDING_GROUP` is padding, `PROMPT_BRANCH` a shared prompt).
    `place[b, t]` is the index of token `t` of row `b` in the flattened sequences; it is 0 for padding.
    """

    ids: Int[Tensor, "S L"]
    positions: Int[Tensor, "S L"]
    group: Int[Tensor, "S L"]
    branch: Int[Tensor, "S L"]
    place: Int[Tensor, "B T"]

    def mask(self) -> Bool[Tensor, "S 1 L L"]:
        """Whether a query (third axis) sees a key (fourth axis). Padding sees padding, so no row is empty."""
        same_group = self.group[:, :, None] == self.group[:, None, :]
        same_branch = self.branch[:, :, None] == self.branch[:, None, :]
        in_prompt = (self.branch == PROMPT_BRANCH)[:, None, :]
        length = self.ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        return (same_group & (same_branch | in_prompt) & earlier)[:, None]


@dataclass(frozen=True)
class Group:
    """Neighbouring rows that share their first `shared` tokens; `rows` holds each row's columns in `Tokens`."""

    first_row: int
    columns: Sequence[Tensor]
    shared: int

    @property
    def length(self) -> int:
        """Tokens of the group when its prompt stands once."""
        return self.shared + sum(len(columns) - self.shared for columns in self.columns)


def arrange(tokens: Tokens, arrangement: Arrangement) -> Layout | None:
    """The layout of some rows; None where plain rows run hardly more tokens. An explicit capacity is always used."""
    layout = lay_out(tokens, share=arrangement.share, capacity=arrangement.capacity)
    worth_it = layout.ids.numel() <= WORTH_IT * tokens.ids.numel()
    return layout if worth_it or arrangement.capacity else None


def lay_out(tokens: Tokens, *, share: bool, capacity: int = 0) -> Layout:
    """Rows as sequences of at most `capacity` tokens (or of the longest group, where that is more).

    With `share`, neighbouring rows with the same prompt run it once.
    """
    groups = find_groups(tokens, share=share)
    bins = fill_bins([group.length for group in groups], capacity)
    length = max(sum(groups[g].length for g in members) for members in bins)
    shape = (len(bins), length)
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    owner, branch = torch.full(shape, PADDING_GROUP), torch.full(shape, PROMPT_BRANCH)
    place = torch.zeros(tokens.ids.shape, dtype=torch.long)
    for sequence, members in enumerate(bins):
        at = 0
        for g in members:
            for number, (start, row, columns, first) in enumerate(branches(groups[g], at), start=1):
                span = slice(start, start + len(columns))
                ids[sequence, span] = tokens.ids[row, columns]
                positions[sequence, span] = torch.arange(first, first + len(columns))
                owner[sequence, span] = g
                branch[sequence, span] = number if first or not groups[g].shared else PROMPT_BRANCH
            for offset, columns in enumerate(groups[g].columns):
                place[groups[g].first_row + offset, columns] = sequence * length + at + row_places(groups[g], offset)
            at += groups[g].length
    device = tokens.ids.device
    return Layout(*(values.to(device) for values in (ids, positions, owner, branch, place)))


def branches(group: Group, at: int) -> list[tuple[int, int, Tensor, int]]:
    """The stretches of a group that starts at `at`: (start, row, columns, first position), the shared prompt first."""
    stretches = []
    if group.shared:
        stretches.append((at, group.first_row, group.columns[0][: group.shared], 0))
        at += group.shared
    for offset, columns in enumerate(group.columns):
        own = columns[group.shared :]
        stretches.append((at, group.first_row + offset, own, group.shared))
        at += len(own)
    return stretches


def row_places(group: Group, offset: int) -> Tensor:
    """Where the tokens of a group's row stand, counted from the group's start."""
    before = sum(len(columns) - group.shared for columns in group.columns[:offset])
    own = len(group.columns[offset]) - group.shared
    return torch.cat([torch.arange(group.shared), group.shared + before + torch.arange(own)])


def find_groups(tokens: Tokens, *, share: bool) -> list[Group]:
    """Neighbouring rows with equal prompts as groups; a group of one row for each without `share`."""
    ids, real = tokens.ids.cpu(), tokens.attention_mask.cpu()
    answered = tokens.response_mask.cpu()
    columns = [row.nonzero()[:, 0] for row in real]
    prompts = []
    for row, present in enumerate(columns):
        marked = answered[row, present].nonzero()
        prompts.append(ids[row, present][: int(marked[0, 0])] if len(marked) else ids[row, present][:0])
    groups: list[Group] = []
    start = 0
    for row in range(1, len(columns) + 1):
        if row < len(columns) and share and len(prompts[row]) and torch.equal(prompts[row], prompts[start]):
            continue
        shared = len(prompts[start]) if row - start > 1 else 0
        groups.append(Group(start, columns[start:row], shared))
        start = row
    return groups


def fill_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: which items go into which bin of `capacity` (or the longest item, where that is more)."""
    capacity = max(capacity, *lengths, 1)
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((b for b, left in enumerate(room) if left >= lengths[item]), None)
        if fitting is None:
            bins.append([])
            room.append(capacity)
            fitting = len(bins) - 1
        bins[fitting].append(item)
        room[fitting] -= lengths[item]
    return bins
