"""Linear maps whose weights are made ready once for many products: joined, rounded, laid out as the processor wants.

oneDNN multiplies blocks of a weight. Given an ordinary matrix it rearranges it at every product, which for the few rows
of a decoding step costs a third of the product itself; `torch.compile` packs the weights of frozen models the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.precision import fast_products
from trimtab.projection import Head
from trimtab.weights import merged_weight

EXPECTED_ROWS = 32
"""Rows for which the layout is chosen; it is right for any number."""

Product = Callable[[Tensor], Tensor]
"""States `[..., D]` -> what a linear map makes of them."""


def can_pack(device: torch.device) -> bool:
    """Whether torch offers packed weights here: its oneDNN operators, on a processor that multiplies bf16."""
    operators = torch.ops.mkldnn
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(operators, "_reorder_linear_weight")
        and hasattr(operators, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def packed(weight: Tensor) -> Tensor:
    """A copy of a weight in the processor's layout; only `PackedProduct` can read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), EXPECTED_ROWS)


@dataclass(frozen=True)
class PlainProduct:
    """One linear map, or several of one input side by side, of ordinary weights."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    def __call__(self, states: Tensor) -> Tensor:
        states = states.to(self.weights[0].dtype)
        if len(self.weights) == 1:
            return F.linear(states, self.weights[0], self.biases[0])
        parts = zip(self.weights, self.biases, strict=True)
        return torch.cat([F.linear(states, weight, bias) for weight, bias in parts], -1)


@dataclass(frozen=True)
class PackedProduct:
    """One linear map of a packed weight."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, states: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(states.to(self.weight.dtype), self.weight, self.bias, "none", [], "")


def product_of(*layers: nn.Module, dtype: torch.dtype) -> Product:
    """Linear layers that read the same input as one product in `dtype`, their adapters merged.

    Weights of that type already are used as they are, others copied: one below the other, and packed where torch can.
    """
    weights = tuple(merged_weight(layer) for layer in layers)
    biases = tuple(getattr(layer, "bias", None) for layer in layers)
    if dtype == weights[0].dtype:
        return PlainProduct(weights, biases)
    weight, bias = joined(weights, dtype), joined_biases(biases, dtype)
    return PackedProduct(packed(weight), bias) if can_pack(weight.device) else PlainProduct((weight,), (bias,))


def joined(weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Weights one below the other, in another type."""
    sizes = [len(weight) for weight in weights]
    result = weights[0].new_empty(sum(sizes), weights[0].shape[1], dtype=dtype)
    for place, weight in zip(result.split(sizes), weights, strict=True):
        place.copy_(weight)
    return result


def joined_biases(biases: tuple[Tensor | None, ...], dtype: torch.dtype) -> Tensor | None:
    """The biases one after the other; None if there are none."""
    given = [bias for bias in biases if bias is not None]
    assert len(given) in (0, len(biases)), "either all of the joined products have a bias or none"
    return torch.cat(given).to(dtype) if given else None


def projection_of(head: Head, device: torch.device, *, fast: bool) -> Product:
    """States `[B, D]` -> float32 logits, as `Policy.logprobs` makes them; with `fast`, factors are rounded to bf16."""
    product: Product = PlainProduct((head.weight,), (head.bias,))
    if fast and can_pack(device):
        with fast_products(device, allowed=True):
            product = PackedProduct(packed(head.weight), head.bias)

    def project(states: Tensor) -> Tensor:
        with fast_products(device, allowed=fast):
            return head.shaped(product(states))

    return project
