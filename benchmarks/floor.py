"""The matrix products that a step cannot do without, counted and timed alone.

A step's floor runs every linear layer of the body on the work's real tokens (each prompt once, no padding) and the head
on the predicted positions: one product forward, two backward. Attention, norms, activations, casts, the softmax, the
optimizer and every copy are left out, so no implementation reaches it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

FLOOR_REPEATS = 3


@dataclass(frozen=True)
class Counts:
    """Tokens through the body and predicted positions of a step, and those of the rows that take no gradient.

    `seen` is how many earlier tokens (itself included) the trained tokens attend to, all together.
    """

    tokens: int
    predicted: int
    looked_at: int = 0
    looked_at_predicted: int = 0
    seen: int = 0

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Counts:
        """The counts in a `Result` of this side."""
        return cls(facts["distinct"], facts["predicted"], facts["looked_at"], facts["looked_at_predicted"])


def shapes(folder: str) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Outputs and inputs of every linear layer of the body, and of the head."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head = network.get_output_embeddings()
    body = [module for module in network.modules() if isinstance(module, nn.Linear) and module is not head]
    return [size(module) for module in body], size(head)


def size(linear: nn.Linear) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    return linear.out_features, linear.in_features


def flops(folder: str, counts: Counts) -> float:
    """Floating-point operations of a step: 2 a weight and token forward, 4 backward; attention's own products too."""
    body, (words, width) = shapes(folder)
    weights = sum(outputs * inputs for outputs, inputs in body)
    trained = 6 * (weights * counts.tokens + words * width * counts.predicted)
    looked_at = 2 * (weights * counts.looked_at + words * width * counts.looked_at_predicted)
    return trained + looked_at + 12 * attention_width(folder) * counts.seen


def attention_width(folder: str) -> int:
    """Layers times heads times the size of a head: multiply-adds of a query with one key, in all layers."""
    config = AutoConfig.from_pretrained(folder).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_attention_heads * head


def seconds(folder: str, counts: Counts, dtype: torch.dtype) -> float:
    """The median time of the floor's products on the CPU, after one pass to warm up."""
    body, head = shapes(folder)
    weights = [torch.randn(shape, dtype=dtype) for shape in body]
    heads = [torch.randn(head, dtype=dtype)] if counts.predicted else []
    passes = [
        Pass.of(weights, counts.tokens, backward=True),
        Pass.of(heads, counts.predicted, backward=True),
        Pass.of(weights, counts.looked_at, backward=False),
        Pass.of(heads, counts.looked_at_predicted, backward=False),
    ]
    taken = []
    for _ in range(1 + FLOOR_REPEATS):
        began = time.perf_counter()
        for one in passes:
            one.run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


@dataclass(frozen=True)
class Buffers:
    """What a layer's products read besides its weight (random), and where they write."""

    inputs: Tensor
    gradients: Tensor
    outputs: Tensor
    to_inputs: Tensor
    to_weight: Tensor

    @classmethod
    def of(cls, weight: Tensor, tokens: int) -> Buffers:
        outputs, inputs = weight.shape
        read = (torch.randn(tokens, inputs, dtype=weight.dtype), torch.randn(tokens, outputs, dtype=weight.dtype))
        return cls(*read, torch.empty_like(read[1]), torch.empty_like(read[0]), torch.empty_like(weight))


@dataclass(frozen=True)
class Pass:
    """Some weights' products with some tokens, into memory that is there: forward, and backward where that is asked."""

    weights: Sequence[Tensor]
    backward: bool
    memory: Mapping[torch.Size, Buffers]

    @classmethod
    def of(cls, weights: Sequence[Tensor], tokens: int, *, backward: bool) -> Pass:
        """Products with random inputs and gradients; weights of one shape share them. Nothing without tokens."""
        if not tokens:
            return cls([], backward, {})
        different = {weight.shape: weight for weight in weights}
        return cls(weights, backward, {shape: Buffers.of(weight, tokens) for shape, weight in different.items()})

    def run(self) -> None:
        """The products, layer by layer."""
        for weight in self.weights:
            buffers = self.memory[weight.shape]
            torch.mm(buffers.inputs, weight.t(), out=buffers.outputs)
            if self.backward:
                torch.mm(buffers.gradients, weight, out=buffers.to_inputs)
                torch.mm(buffers.gradients.t(), buffers.inputs, out=buffers.to_weight)


def product_rate(device: str, size: int = 8192) -> float:
    """Floating-point operations a second of one large bf16 product: the rate that MFU is measured against."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(taken[1:])
