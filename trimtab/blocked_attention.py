"""Attention under a layout's mask on CPUs, a block of queries at a time, forward and backward.

torch's own kernel for CPUs spends most of a short training step's attention on calls of tiny products. Here a block's
queries, and as many sequences as fit, go into one batched product, the heads that share keys as rows of one matrix.
Scores exist for a block at a time and are computed again in the backward pass (Dao et al. 2022, "FlashAttention").

Scores, shares and sums are float32. For bf16 inputs the factors of every product round to bf16, as in torch's kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.precision import fast_products

BLOCK_ROWS = 128
"""Queries of a sequence at a time."""
BLOCK_SCORES = 2**20
"""About so many scores at a time: they should stay in the processor's cache."""

Heads = Float[Tensor, "S H L D"]
Block = tuple[slice, slice]
"""Sequences, and rows whose keys are those up to the last of them."""


def blocked_attention(query: Heads, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Heads:
    """softmax(scaling Q K^T + bias) V, where the K heads of keys and values, `[S, K, L, D]`, each serve H / K queries.

    `bias` `[S, 1, L, L]` is 0 where a token is seen and -inf where not. Tokens see none after them, and each sees one.
    """
    return _Blocked.apply(query, key, value, bias, scaling)


def blocks(query: Heads) -> Iterator[Block]:
    """What is computed at a time."""
    sequences, heads, length, _ = query.shape
    for start in range(0, length, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, length))
        together = max(1, BLOCK_SCORES // (heads * (rows.stop - start) * rows.stop))
        for first in range(0, sequences, together):
            yield slice(first, min(first + together, sequences)), rows


def stacked(heads: Heads, groups: int) -> Float[Tensor, "SK HL D"]:
    """What reads the same keys, in one float32 matrix: `[S * K, H / K * L, D]`."""
    sequences, _, _, size = heads.shape
    return heads.reshape(sequences * groups, -1, size).float()


def shares_of(asked: Tensor, keys: Tensor, bias: Tensor, heads: int) -> Float[Tensor, "SK HL N"]:
    """How much of each key every query takes, from stacked queries (scaled already) and keys."""
    scores = torch.bmm(asked, keys.transpose(1, 2))
    by_head = scores.view(len(bias), heads, *bias.shape[2:]).add_(bias)
    return torch.softmax(by_head, -1).view_as(scores)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Heads, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Heads:
        heads, groups = query.shape[1], key.shape[1]
        result = torch.empty_like(query)
        with fast_products(query.device, allowed=query.dtype != torch.float32):
            for some, rows in blocks(query):
                seen = slice(rows.stop)
                asked, keys, values = (
                    stacked(each, groups) for each in (query[some, :, rows], key[some, :, seen], value[some, :, seen])
                )
                shares = shares_of(asked * scaling, keys, bias[some, :, rows, seen], heads)
                result[some, :, rows] = torch.bmm(shares, values).view(result[some, :, rows].shape)
        ctx.save_for_backward(query, key, value, bias, result)
        ctx.scaling = scaling
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Heads):  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, bias, result = ctx.saved_tensors
        heads, groups = query.shape[1], key.shape[1]
        to_query = torch.empty_like(query)
        to_key, to_value = (torch.zeros_like(each, dtype=torch.float32) for each in (key, value))
        drift = (gradient.float() * result.float()).sum(-1)
        with fast_products(query.device, allowed=query.dtype != torch.float32):
            for some, rows in blocks(query):
                seen = slice(rows.stop)
                asked, keys, values, slope = (
                    stacked(each, groups)
                    for each in (
                        query[some, :, rows],
                        key[some, :, seen],
                        value[some, :, seen],
                        gradient[some, :, rows],
                    )
                )
                asked = asked * ctx.scaling
                shares = shares_of(asked, keys, bias[some, :, rows, seen], heads)
                to_value[some, :, seen] += torch.bmm(shares.transpose(1, 2), slope).view(to_value[some, :, seen].shape)
                to_scores = torch.bmm(slope, values.transpose(1, 2))
                to_scores.sub_(drift[some, :, rows].reshape(len(asked), -1, 1)).mul_(shares)
                to_query[some, :, rows] = (
                    torch.bmm(to_scores, keys).mul_(ctx.scaling).view(to_query[some, :, rows].shape)
                )
                to_key[some, :, seen] += torch.bmm(to_scores.transpose(1, 2), asked).view(to_key[some, :, seen].shape)
        return to_query, to_key.to(key.dtype), to_value.to(value.dtype), None, None
