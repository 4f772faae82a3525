"""The blocks of Llama and its relatives, run with little overhead, for decoding.

One decoding step of a small model is thirty layers of tiny operations, and transformers spends more time between the
matrix products than in them. Here the weights are made ready once for many steps (`products.py`). What is computed is
what the transformers model computes under autocast: products in bf16; norms, rotations and the residual stream in
float32.

`has_its_parts` says whether a model looks like such a relative; `decoders.lean_agrees` compares numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.sampling.products import Product, product_of

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""(layer, queries `[B, T, H, W]`, keys and values `[B, T, K, W]`, scale) -> what is attended to, `[B, T, H * W]`."""

LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
FEEDFORWARD_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# What a handful of tokens would not show.
UNSEEN_SETTINGS = ("clip_qkv", "attn_logit_softcapping", "attention_chunk_size")


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm in float32."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        return cls(module.weight, module.variance_epsilon)

    def __call__(self, states: Tensor) -> Tensor:
        # torch's own rms_norm takes a third longer on a CPU: it is made of more and smaller operations.
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        shrinking = length.square_().mul_(1 / states.shape[-1]).add_(self.epsilon).rsqrt_()
        return states * shrinking * self.weight


@dataclass(frozen=True)
class Block:
    """One layer: attention and feed-forward, each on the norm of the residual stream and added to it."""

    attention_norm: Norm
    queries_keys_values: Product
    head_norms: tuple[Norm, Norm] | None
    attention_out: Product
    heads: tuple[int, int]
    width: int
    scale: float
    feedforward_norm: Norm
    gate_up: Product
    activation: Callable[[Tensor], Tensor]
    down: Product

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> Block:
        attention, feedforward = layer.self_attn, layer.mlp
        width = attention.head_dim
        queries, keys = (projection.out_features // width for projection in (attention.q_proj, attention.k_proj))
        norms = (Norm.of(attention.q_norm), Norm.of(attention.k_norm)) if hasattr(attention, "q_norm") else None
        return cls(
            attention_norm=Norm.of(layer.input_layernorm),
            queries_keys_values=product_of(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype),
            head_norms=norms,
            attention_out=product_of(attention.o_proj, dtype=dtype),
            heads=(queries, keys),
            width=width,
            scale=attention.scaling,
            feedforward_norm=Norm.of(layer.post_attention_layernorm),
            gate_up=product_of(feedforward.gate_proj, feedforward.up_proj, dtype=dtype),
            activation=feedforward.act_fn,
            down=product_of(feedforward.down_proj, dtype=dtype),
        )

    def __call__(self, states: Tensor, rotation: Rotation, number: int, attend: Attend) -> Tensor:
        """The residual stream after this layer, written over `states`."""
        joint = self.queries_keys_values(self.attention_norm(states)).unflatten(-1, (-1, self.width))
        turning, values = joint.split([sum(self.heads), self.heads[1]], 2)
        if self.head_norms:
            normed = (norm(part) for norm, part in zip(self.head_norms, turning.split(self.heads, 2), strict=True))
            turning = torch.cat(list(normed), 2)
        queries, keys = rotation.turn(turning).split(self.heads, 2)
        attended = attend(number, queries, keys, values, self.scale)
        states += self.attention_out(attended)
        gate, up = self.gate_up(self.feedforward_norm(states)).chunk(2, -1)
        states += self.down(self.activation(gate) * up)
        return states


@dataclass(frozen=True)
class Rotation:
    """Rotary positions (Su et al. 2021, eq. 34): cosines, and sines signed for a half turn, `[B, T, 1, W]` each."""

    cosines: Tensor
    sines: Tensor

    @classmethod
    def at(cls, rotary: nn.Module, positions: Tensor) -> Rotation:
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        cosines, sines = (values[:, :, None] for values in rotary(like, positions))
        low, high = sines.chunk(2, -1)
        return cls(cosines, torch.cat([-low, high], -1))

    def turn(self, states: Tensor) -> Tensor:
        """Queries or keys `[B, T, H, W]` turned by their positions, in float32."""
        return torch.addcmul(states * self.cosines, states.roll(states.shape[-1] // 2, -1), self.sines)


@dataclass(frozen=True)
class Llama:
    """The body of a model, ready to run many times while its weights stay as they are."""

    embeddings: nn.Module
    rotary: nn.Module
    blocks: tuple[Block, ...]
    norm: Norm

    @classmethod
    def of(cls, network: PreTrainedModel, dtype: torch.dtype) -> Llama:
        body: Any = network.base_model
        blocks = tuple(Block.of(layer, dtype) for layer in body.layers)
        return cls(body.embed_tokens, body.rotary_emb, blocks, Norm.of(body.norm))

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Float[Tensor, "B T D"]:
        """Hidden states of some tokens; `attend` keeps their keys and values and looks among those before."""
        states = self.embeddings(ids)
        rotation = Rotation.at(self.rotary, positions)
        for number, block in enumerate(self.blocks):
            states = block(states, rotation, number, attend)
        return self.norm(states)


def has_its_parts(network: PreTrainedModel) -> bool:
    """Whether a model's layers have the parts of Llama's and no others, and every layer looks at all tokens before."""
    body: Any = network.base_model
    config = network.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    narrow = getattr(config, "sliding_window", None) and kinds != {"full_attention"}
    unseen = any(getattr(config, name, None) for name in UNSEEN_SETTINGS)
    if narrow or unseen or kinds - {"full_attention"}:
        return False
    return {"embed_tokens", "layers", "norm", "rotary_emb"} == parts(body) and all(map(is_block, body.layers))


def is_block(layer: Any) -> bool:
    """Whether a layer has the parts that `Block` knows."""
    return (
        parts(layer) == LAYER_PARTS
        and parts(layer.self_attn) in (ATTENTION_PARTS, ATTENTION_PARTS | HEAD_NORMS)
        and parts(layer.mlp) == FEEDFORWARD_PARTS
        and all(hasattr(norm, "variance_epsilon") for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    )


def parts(module: nn.Module) -> set[str]:
    """The names of a module's direct parts."""
    return {name for name, _ in module.named_children()}
