"""Activation memory: how much a body keeps for its backward pass, and computing it again instead.

Gradient checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost") keeps only the input of every
layer and runs the layer again in the backward pass: about a third more work, for a fraction of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from trimtab.batches import Tokens
from trimtab.bodies import LanguageModel
from trimtab.projection import CHUNK_ROWS

if TYPE_CHECKING:
    from trimtab.models import Policy, ScalarModel

ENOUGH = 0.8
"""Activations are kept while they take at most this share of the memory that is left for them."""
PROBE_TOKENS = (16, 48)
"""Lengths of the two rows on which activations are measured."""
ADAM_BYTES = 12
"""What a trained weight brings with its first step: a gradient and AdamW's two means, in float32."""
CHUNK_COPIES = 3
"""Float32 copies of a chunk of logits that the projection holds at a time."""
GIB = 2**30


@dataclass(frozen=True)
class Checkpointing:
    """Whether layers are run again in the backward pass, and in words why."""

    on: bool
    why: str


def choose_checkpointing(requested: str, model: Policy | ScalarModel, rows: int, length: int) -> Checkpointing:
    """The decision for `on`, `off` or `auto`, where at most `rows` sequences of `length` tokens run together.

    auto is off on a CPU; on a GPU, `weigh` decides. Raises ValueError where `on` cannot be done.
    """
    name = type(model.model).__name__
    known = bool(layers_of(model.model))
    if requested == "on" and not known:
        raise ValueError(f"--gradient-checkpointing on: the layers of {name} are not known here. Leave it off.")
    if requested != "auto":
        return Checkpointing(requested == "on", f"{requested}, as asked")
    if not known:
        return Checkpointing(False, f"off: the layers of {name} are not known here")
    if model.blank is not None and model.device.type != "cpu":
        return Checkpointing(True, "on: weights are split over the ranks, so memory is dear")
    if model.device.type == "cpu":
        return Checkpointing(False, "off: on a CPU it takes more time than memory is worth")
    return weigh(activation_bytes(model, rows, length), free_bytes(model), rows * length)


def weigh(needed: int, free: int, tokens: int) -> Checkpointing:
    """Whether activations that need `needed` bytes leave too little of `free` ones; on if so."""
    on = needed > ENOUGH * free
    told = f"{tokens} tokens at a time need about {needed / GIB:.1f} of {free / GIB:.1f} GiB left for activations"
    return Checkpointing(on, f"{'on' if on else 'off'}: {told}")


def activation_bytes(model: Policy | ScalarModel, rows: int, length: int) -> int:
    """What a forward pass over `rows` sequences of `length` tokens keeps for its backward pass, and a chunk of logits.

    Per token it is measured, as a straight line through two short rows, on this model in its precision and with its
    adapter: families differ by a factor of three. Attention's masks are added, in the type of the scores and one for
    each layer, as sdpa keeps them; kernels that need none keep less.
    """
    low, high = (_body_bytes(model, tokens) for tokens in PROBE_TOKENS)
    masks = len(layers_of(model.model)) * rows * length**2 * (2 if model.arithmetic.autocast else 4)
    return round(on_a_line((low, high), rows * length)) + masks + _head_bytes(model, rows * length)


def on_a_line(measured: tuple[int, int], tokens: int) -> float:
    """What `tokens` tokens keep, from what rows of `PROBE_TOKENS` keep."""
    (short, long), (low, high) = PROBE_TOKENS, measured
    return low + (high - low) / (long - short) * (tokens - short)


@torch.enable_grad()
def _body_bytes(model: Policy | ScalarModel, length: int) -> int:
    ids = torch.arange(length, device=model.device)[None] % model.model.config.get_text_config().vocab_size
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool))
    with model.arithmetic.context(model.device):
        return saved_bytes(partial(model.body, tokens, None), model.model.parameters())


def _head_bytes(model: Policy | ScalarModel, tokens: int) -> int:
    if not isinstance(model.module, LanguageModel):
        return 0
    rows = min(tokens, CHUNK_ROWS) if model.module.projects else tokens
    return CHUNK_COPIES * 4 * rows * model.model.config.get_text_config().vocab_size


def saved_bytes(run: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of what `run` computes: each storage once, weights not counted."""
    # Not the address of its memory, which a fake tensor has none of.
    own = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, Tensor] = {}

    def keep(values: Tensor) -> Tensor:
        address = values.untyped_storage()._cdata
        if address not in own:
            kept[address] = values  # held until the end, so that no address is given out twice
        return values

    with saved_tensors_hooks(keep, lambda values: values):
        run()
    return sum(values.untyped_storage().nbytes() for values in kept.values())


def free_bytes(model: Policy | ScalarModel) -> int:
    """Bytes of the GPU that are left for activations once the first step has made gradients and AdamW's means."""
    free, _ = torch.cuda.mem_get_info(model.device)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return free + unused - ADAM_BYTES * sum(weight.numel() for weight in model.trainable_parameters())


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers of a transformer that can be run again: those that transformers itself marks so."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside |= set(module.modules())
    return found


def recompute_layers(network: nn.Module) -> None:
    """Let every layer keep its input only and run again in the backward pass.

    transformers' own switch works in train mode alone, in which some families drop out activations.
    """
    for layer in layers_of(network):
        layer.forward = MethodType(_recomputed, layer)  # a copy of the layer gets a copy that is bound to itself


def _recomputed(layer: nn.Module, *inputs: Any, **options: Any) -> Any:
    forward = partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    # Nothing is drawn at random: dropout is off for good. The reentrant kind would need inputs with gradients, which
    # the first layer under an adapter does not have.
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
