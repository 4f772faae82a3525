"""From hidden states to log-probabilities of tokens, in float32 and a few rows at a time.

The logits of one long answer are hundreds of megabytes. They exist for `CHUNK_ROWS` positions at a time and are
computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.kl import exact_kl
from trimtab.precision import fast_products

CHUNK_ROWS = 256
CACHED_ROWS = 16
"""Rows of logits that a CPU passes over several times while its cache holds them."""

States = Float[Tensor, "N D"]
Chosen = Float[Tensor, " N"]

Measure = Callable[[Tensor, slice], Tensor]
"""One number about each of some next-token distributions: their log-probabilities `[n, V]`, and which rows they are."""


@dataclass(frozen=True)
class TokenStatistics:
    """Three numbers about each next-token distribution: all in one shape, in nats.

    `logprobs` is of the token that stands there; `log_sum_squares` is log sum_v p_v^2 and `entropy` -sum_v p_v log p_v
    of the whole distribution. Only `logprobs` carries a gradient.
    """

    logprobs: Tensor
    log_sum_squares: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class ComparedStatistics:
    """The same about two models, in nats: `kl` is KL(policy || reference) over the whole vocabulary.

    `logprobs` and `entropy` are the policy's. Only `logprobs` carries a gradient.
    """

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Head:
    """Hidden states -> logits: a linear map, then the family's scale and soft cap (`cap * tanh(z / cap)`)."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, states: States, memory: Tensor | None = None) -> Float[Tensor, "N V"]:
        """Float32 logits of some positions, in the first rows of `memory` if that is given."""
        states, weight = states.to(self.weight.dtype), self.weight.t()
        into = None if memory is None else memory[: len(states)]
        if self.bias is None:
            return self.shaped(torch.mm(states, weight, out=into))
        return self.shaped(torch.addmm(self.bias, states, weight, out=into))

    def shaped(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Logits from what the linear map gave."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def tempered(self, temperature: float) -> Head:
        """The head that gives the same logits divided by `temperature`: scale and cap shrink together."""
        return replace(self, scale=self.scale / temperature, cap=self.cap and self.cap / temperature)


def head_of(network: PreTrainedModel) -> Head | None:
    """The head of a causal language model; None if it is not one linear map."""
    linear = network.get_output_embeddings()
    if type(linear) is not nn.Linear:
        return None
    config = network.config.get_text_config()
    # Cohere multiplies by logit_scale, Granite divides by logits_scaling, Gemma 2 and 3 cap.
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(linear.weight, linear.bias, scale, getattr(config, "final_logit_softcapping", None))


def log_distributions(head: Head | None, states: States, *, fast: bool) -> Float[Tensor, "N V"]:
    """The log-probabilities of the whole vocabulary; without a head, states are logits already."""
    with fast_products(states.device, allowed=fast):
        logits = states.float() if head is None else head.logits(states)
    # The arithmetic of `measured`, bit for bit, so that a policy's KL from itself is exactly zero.
    return logits - normalizers_of(logits)[:, None]


def normalizers_of(logits: Float[Tensor, "N V"]) -> Chosen:
    """log sum_v exp(logits)."""
    return torch.cat([some.logsumexp(-1) for some in logits.split(cached_rows(logits))])


def cached_rows(logits: Tensor) -> int:
    """How many rows of logits to pass over at a time."""
    return CACHED_ROWS if logits.device.type == "cpu" else max(1, len(logits))


def logprobs_of(head: Head | None, states: States, targets: Int[Tensor, " N"], *, fast: bool) -> Chosen:
    """Log-probabilities of `targets` under the distributions that these states predict, in nats."""
    return measured(head, states, targets, (), fast=fast)[0]


def statistics_of(head: Head | None, states: States, targets: Int[Tensor, " N"], *, fast: bool) -> TokenStatistics:
    """Log-probabilities of `targets`, and entropy and squares of the distributions that predict them, each `[N]`."""
    return TokenStatistics(*measured(head, states, targets, (log_sum_squares, entropy), fast=fast))


def measured(
    head: Head | None, states: States, targets: Int[Tensor, " N"], measures: Sequence[Measure], *, fast: bool
) -> tuple[Chosen, ...]:
    """Log-probabilities of `targets`, with gradient, and what each of `measures` gives on the way, each `[N]`.

    A measure that is not asked for costs nothing, and one that is never holds more than a chunk of distributions.
    """
    if head is not None:
        return _ProjectInChunks.apply(states, head.weight, head.bias, targets, head, fast, tuple(measures))
    whole = log_distributions(None, states, fast=fast)
    others = (measure(whole.detach(), slice(0, len(whole))) for measure in measures)
    return (whole.gather(1, targets[:, None])[:, 0], *others)


def log_sum_squares(logprobs: Float[Tensor, "N V"], rows: slice) -> Chosen:
    """log sum_v p_v^2: the log-probability that two draws are the same token."""
    return (2 * logprobs).logsumexp(-1)


def entropy(logprobs: Float[Tensor, "N V"], rows: slice) -> Chosen:
    """-sum_v p_v log p_v in nats."""
    # An impossible token (log-probability -inf) adds nothing to the entropy, but 0 * -inf is not a number.
    return -(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)


def divergence_from(others: Callable[[slice], Float[Tensor, "N V"]]) -> Measure:
    """KL(p || q) in nats, where `others` gives the log-probabilities q of some rows."""

    def measure(logprobs: Float[Tensor, "N V"], rows: slice) -> Chosen:
        return exact_kl(logprobs, others(rows).to(logprobs.device))

    return measure


class _ProjectInChunks(torch.autograd.Function):
    """log softmax(head(states))[targets], its logits recomputed in the backward pass.

    Twice as fast as torch's own checkpointing here: products run in the mode of `fast_products` in both directions,
    and the gradient of the logits, g (onehot - p), is written over the logits.
    """

    @staticmethod
    def forward(ctx: Any, states, weight, bias, targets, head: Head, fast: bool, measures):  # noqa: PLR0917
        normalizers, chosen, memory = [], [], logits_memory(head, states)
        others: list[list[Tensor]] = [[states.new_empty(0, dtype=torch.float32)] for _ in measures]
        for start in range(0, max(len(states), 1), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            with fast_products(states.device, allowed=fast):
                logits = head.logits(states[rows], memory)
            normalizers.append(normalizers_of(logits))
            chosen.append(logits.gather(1, targets[rows, None])[:, 0] - normalizers[-1])
            if measures:
                logits.sub_(normalizers[-1][:, None])
            for found, measure in zip(others, measures, strict=True):
                found.append(measure(logits, rows))
        ctx.save_for_backward(states, weight, bias, targets, torch.cat(normalizers))
        ctx.head, ctx.fast = head, fast
        values = [torch.cat(found) for found in others]
        ctx.mark_non_differentiable(*values)
        return torch.cat(chosen), *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        states, weight, bias, targets, normalizers = ctx.saved_tensors
        head = Head(weight, bias, ctx.head.scale, ctx.head.cap)
        memory = logits_memory(head, states)
        to_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        with fast_products(states.device, allowed=ctx.fast):
            for start in range(0, max(len(states), 1), CHUNK_ROWS):
                rows = slice(start, start + CHUNK_ROWS)
                logits = head.logits(states[rows], memory)
                to_logits = _gradient_of_logits(head, logits, targets[rows], normalizers[rows], gradient[rows])
                if to_states is not None:
                    to_states[rows] = to_logits @ weight
                if to_weight is not None:
                    to_weight.addmm_(to_logits.t(), states[rows].to(weight.dtype), beta=min(start, 1))
                if to_bias is not None:
                    to_bias += to_logits.sum(0)
        return to_states, to_weight, to_bias, None, None, None, None


def logits_memory(head: Head, states: States) -> Tensor:
    """Room for a chunk's logits, taken once: new memory of that size costs as much as what is written to it."""
    return head.weight.new_empty(min(len(states), CHUNK_ROWS), len(head.weight))


def _gradient_of_logits(
    head: Head, logits: Float[Tensor, "N V"], targets: Tensor, normalizers: Chosen, gradient: Chosen
) -> Tensor:
    """d(gradient . logprobs) / d(the linear map's output), written over the logits unless they were capped."""
    size = cached_rows(logits)
    parts = [each.split(size) for each in (logits, targets, normalizers, gradient)]
    for some, chosen, normalizer, slope in zip(*parts, strict=True):
        shape = (1 - (some / head.cap).square()) * head.scale if head.cap else head.scale
        some.sub_(normalizer[:, None]).exp_().mul_(-slope[:, None])
        some.scatter_add_(1, chosen[:, None], slope[:, None])
        if head.cap or head.scale != 1.0:
            some.mul_(shape)
    return logits
