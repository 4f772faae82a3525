"""Keys and values of rows that grow token by token, and attention to them; a prompt's are kept once for all its rows.

Reading keys and values from memory is a good part of a decoding step, so what rows share is read once a step: the heads
and rows that look at the same keys are the rows of one matrix product.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from trimtab.batches import Mask

CACHE_BLOCK = 32
"""Tokens by which the room for keys and values grows; appending by concatenation would copy it at every token."""


def with_room(states: Float[Tensor, "... T W"], length: int) -> Float[Tensor, "... R W"]:
    """A copy with at least `length` columns, whole blocks of them; the new ones are zero."""
    columns = (length + CACHE_BLOCK - 1) // CACHE_BLOCK * CACHE_BLOCK
    room = states.new_zeros(*states.shape[:-2], columns, states.shape[-1])
    room[..., : states.shape[-2], :] = states
    return room


def blocked(hidden: Bool[Tensor, ...], dtype: torch.dtype) -> Float[Tensor, ...]:
    """What is added to scores: -inf where a column is hidden, else zero."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def causal(attended: Mask) -> Bool[Tensor, "P 1 T T"]:
    """What each token of padded rows looks at: itself, and the real tokens before it."""
    before = torch.ones(attended.shape[1], attended.shape[1], dtype=torch.bool, device=attended.device).tril()
    # Padding looks at itself, or its softmax would be over nothing.
    itself = torch.eye(attended.shape[1], dtype=torch.bool, device=attended.device)
    return (before & attended[:, None, :] | itself)[:, None]


class KeyValues:
    """What the rows of a batch have read, in every layer; each of a row's `K` heads of keys is a line of its own.

    `prompts` holds the keys and values of `P` prompts, `[P * K, T, W]` each; `own` those of each row's tokens since,
    `[B * K, R, W]` each, in rooms of `R` columns of which `length` are filled. Masks are added to scores.
    """

    def __init__(self, attended: Mask) -> None:
        self.attended = attended
        self.causal = causal(attended)
        self.prompts: list[tuple[Tensor, Tensor]] = []
        self.heads = 0
        self.length = 0

    def read_prompts(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention within the prompts, whose keys and values are kept."""
        assert layer == len(self.prompts), "prompts are read once"
        queries, keys, values = (part.transpose(1, 2).to(values.dtype) for part in (queries, keys, values))
        self.heads = keys.shape[1]
        self.prompts.append((keys.flatten(0, 1).contiguous(), values.flatten(0, 1).contiguous()))
        group = queries.shape[1] // self.heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.causal, scale=scale)
        return found.transpose(1, 2).flatten(2)

    def continue_from(self, prompt_of: Int[Tensor, " B"]) -> None:
        """Begin the rows, each after its prompt."""
        keys = self.prompts[0][0]
        room = (len(prompt_of) * self.heads, CACHE_BLOCK, keys.shape[-1])
        self.own = [(keys.new_zeros(room), keys.new_zeros(room)) for _ in self.prompts]
        self.mask = blocked(torch.ones(CACHE_BLOCK, dtype=torch.bool, device=keys.device), keys.dtype)
        self.prompt_of = prompt_of
        self._seat()

    def next_column(self) -> None:
        """Make room for one more token a row."""
        if self.length == len(self.mask):
            more = self.length + 1
            self.own = [(with_room(keys, more), with_room(values, more)) for keys, values in self.own]
            self.mask = F.pad(self.mask, (0, CACHE_BLOCK), value=float("-inf"))
        self.mask[self.length] = 0
        self.length += 1

    def read_token(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention of one new token a row, to its prompt and to the row's own tokens."""
        prompt_keys, prompt_values = self.prompts[layer]
        own_keys, own_values = self.own[layer]
        own_keys[:, self.length - 1] = keys.flatten(0, 2)
        own_values[:, self.length - 1] = values.flatten(0, 2)
        grouped = queries.to(own_keys.dtype).reshape(len(own_keys), -1, queries.shape[-1])

        seated = self._seated(grouped)
        to_prompt = self._unseated(torch.baddbmm(self.prompt_mask, seated, prompt_keys.mT, alpha=scale))
        to_own = torch.baddbmm(self.mask, grouped, own_keys.mT, alpha=scale)
        shares = torch.cat([to_prompt, to_own], -1).softmax(-1, dtype=torch.float32).to(own_keys.dtype)
        to_prompt, to_own = shares.split([prompt_keys.shape[1], own_keys.shape[1]], -1)
        from_prompt = self._unseated(torch.bmm(self._seated(to_prompt), prompt_values))
        return torch.baddbmm(from_prompt, to_own, own_values).view(len(keys), 1, -1)

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        """Forget all rows but these, and the prompts that none of them continues."""
        prompts, self.prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        lines = self._lines(rows)
        self.own = [(keys[lines], values[lines]) for keys, values in self.own]
        if len(prompts) < len(self.attended):
            self.attended, lines = self.attended[prompts], self._lines(prompts)
            self.prompts = [(keys[lines], values[lines]) for keys, values in self.prompts]
        self._seat()

    def _lines(self, items: Int[Tensor, " N"]) -> Int[Tensor, " NK"]:
        """Where the heads of some rows or prompts are."""
        return (items[:, None] * self.heads + torch.arange(self.heads, device=items.device)).flatten()

    def _seat(self) -> None:
        """Give each row a seat beside the others of its prompt: `S` seats a prompt and head, some of them empty.

        `seats` says who sits where, `[P * K * S]`, and `seat_of` where a row's heads sit, `[B * K]`. In an empty seat
        sits a copy of the first row; nobody reads what comes of it.
        """
        number = (self.prompt_of[:, None] == self.prompt_of).tril(-1).sum(1)
        seats = int(number.max()) + 1
        self.seat_of = self._lines(self.prompt_of) * seats + number.repeat_interleave(self.heads)
        self.seats = self.seat_of.new_zeros(len(self.attended) * self.heads * seats)
        self.seats[self.seat_of] = torch.arange(len(self.seat_of), device=self.seats.device)
        hidden = ~self.attended.repeat_interleave(self.heads, 0)
        self.prompt_mask = blocked(hidden, self.own[0][0].dtype)[:, None]

    def _seated(self, lines: Float[Tensor, "BK G N"]) -> Float[Tensor, "PK SG N"]:
        """Those that look at the same prompt and head together."""
        return lines.index_select(0, self.seats).view(len(self.prompt_mask), -1, lines.shape[-1])

    def _unseated(self, seated: Float[Tensor, "PK SG N"]) -> Float[Tensor, "BK G N"]:
        """Back in the order of the rows."""
        return seated.view(len(self.seats), -1, seated.shape[-1]).index_select(0, self.seat_of)
