"""What sees what in a layout, in the form that a transformer's attention reads.

`sdpa` reads booleans, `eager` and blocked_attention.py read floats that are added to their logits, and FlexAttention
reads block masks and skips the blocks that nobody sees. Its CUDA kernels are compiled for sequences of any length:
compiled for one length they would be compiled again for every packed batch. It has no backward pass on CPUs.

Both of ours are registered with transformers under the names in `OWN`. Without a layout's mask they are sdpa, so plain
rows and generation run as they did before. transformers' own `flex_attention` is not used: it compiles for the first
length that it meets, on CPUs too, and runs all rows through its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
import torch._dynamo.config as dynamo
import torch.fx.experimental._config as shapes
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trimtab.blocked_attention import blocked_attention
from trimtab.layout import Layout, MaskMod

Attention = Literal["auto", "sdpa", "flex", "blocked"]
"""What runs layouts: sdpa with an explicit mask, FlexAttention, blocks of queries, or what suits the device."""

FLEX = "trimtab_flex"
BLOCKED = "trimtab_blocked"
OWN = {"flex": FLEX, "blocked": BLOCKED}
"""The attentions that transformers does not know, by the names that it is told."""
FOR_DEVICE = {"cuda": "flex", "cpu": "blocked"}
MOST_KERNELS = 64
"""Compilations of one function in a process; a model needs four, or eight with short batches."""
LayerMask = Tensor | BlockMask


@cache
def compiled(function: Callable[..., Any], backend: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """A function compiled once for all lengths, and again only where gradients, kinds of mask or heads differ.

    Without `fullgraph`, one that had to be compiled too often would silently turn into code that holds all logits.
    Without `use_duck_shape`, two sizes that happen to be equal at first (heads, blocks) may differ later.
    """
    run = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    def call(*arguments: Any, **options: Any) -> Any:
        with dynamo.patch(recompile_limit=MOST_KERNELS), shapes.patch(use_duck_shape=False):  # pyright: ignore
            return run(*arguments, **options)

    return call


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LayerMask | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: heads `[S, H, L, D]` to `[S, L, H, D]`; FlexAttention under a block mask."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    query, key, value = plain_heads(module, [query, key, value], options)
    # Not compiled on CPUs: what torch 2.13 generates there for dynamic lengths is no valid C++.
    run = flex_attention if query.device.type == "cpu" else compiled(flex_attention)
    found = run(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return found.transpose(1, 2).contiguous(), None


def attend_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The same by blocks of queries under the floats of a layout's mask; sdpa under any other."""
    if attention_mask is None or not attention_mask.is_floating_point():
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    query, key, value = plain_heads(module, [query, key, value], options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return blocked_attention(query, key, value, attention_mask, float(scale)).transpose(1, 2).contiguous(), None


def plain_heads(module: nn.Module, heads: Sequence[Tensor], options: Mapping[str, Any]) -> list[Tensor]:
    """Queries, keys and values in autocast's type; ValueError where more than they decides what is attended to."""
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} changes its attention by {', '.join(unknown)}")
    if options.get("dropout"):
        raise ValueError(f"{type(module).__name__} drops {options['dropout']:.0%} of its attention")
    device = heads[0].device.type
    return [each.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else each for each in heads]


for _name, _attend in ((FLEX, attend), (BLOCKED, attend_blocks)):
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, sdpa_mask)


def block_mask(mask_mod: MaskMod, layout: Layout) -> BlockMask:
    """A mask as FlexAttention reads it: which blocks are seen, and by whom in the blocks that are seen in part."""
    sequences, length = layout.ids.shape
    device = layout.ids.device
    make = create_block_mask if device.type == "cpu" else compiled(create_block_mask)
    return make(mask_mod, sequences, None, length, length, device=device)


FLOATS = {"eager": torch.finfo(torch.float32).min, BLOCKED: -torch.inf}
"""What is added to the scores of unseen tokens, by those that add."""


def layout_mask(implementation: str, layout: Layout, window: int | None) -> LayerMask:
    """A layout's mask for one kind of layer, as this implementation reads it."""
    if implementation == FLEX:
        return block_mask(layout.mask_mod(window), layout)
    mask = layout.mask(window)
    if implementation not in FLOATS:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, FLOATS[implementation])


def layout_masks(network: PreTrainedModel, layout: Layout) -> LayerMask | dict[str, LayerMask]:
    """A layout's attention mask, narrowed to the window of layers that slide; one per kind of layer if they differ."""
    config = network.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    windows = {"full_attention": None, "sliding_attention": window}
    if unknown := kinds - windows.keys():
        raise ValueError(f"no mask is known for layers of kind {', '.join(sorted(unknown))}")
    masks = {kind: layout_mask(implementation_of(network), layout, windows[kind]) for kind in kinds}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def implementation_of(network: PreTrainedModel) -> str:
    """The name of a transformer's attention implementation."""
    return str(network.config.get_text_config()._attn_implementation)


def can_take_own(network: PreTrainedModel) -> bool:
    """Whether a family leaves its attention to transformers' interface, and by default to sdpa.

    Others change their logits (Gemma 2 caps them, gpt-oss adds sinks), which is not done here.
    """
    return network._supports_flex_attn and implementation_of(network) in ("sdpa", *OWN.values())


def set_attention(network: PreTrainedModel, own: str | None) -> None:
    """Run layouts by one of `OWN`, or by the network's own attention."""
    wanted, known = OWN.get(own or "", "sdpa"), implementation_of(network)
    if known != wanted and (own or known in OWN.values()):
        network.set_attn_implementation(wanted)
