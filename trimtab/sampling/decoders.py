"""Decoders: what has been read so far, and the logits of the next token, for a batch of rows that grow token by token.

There are two, and `decoders` chooses: `LeanDecoder` for Llama and its relatives, `CacheDecoder` through transformers'
own forward for every other family and for weights that stay split over ranks. Each prompt is read once, then its
answers continue from copies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from trimtab.batches import Tokens
from trimtab.bodies import positions_of, probe_tokens, run_rows
from trimtab.parallel import in_step
from trimtab.precision import fast_products
from trimtab.projection import Head, head_of
from trimtab.sampling.key_values import KeyValues, with_room
from trimtab.sampling.llama import Llama, has_its_parts
from trimtab.sampling.products import Product, projection_of

if TYPE_CHECKING:
    from trimtab.models import Policy

T = TypeVar("T")
Logits = Float[Tensor, "B V"]


class Decoder(Protocol):
    """Rows of tokens that have been read."""

    def step(self, ids: Int[Tensor, " B"]) -> Logits:
        """Read one more token a row; the logits of the next, float32."""
        ...

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        """Forget all rows but these."""
        ...


Run = Callable[[Callable[[], Logits]], Logits]
Start = Callable[[Tokens, Int[Tensor, " B"]], tuple[Decoder, Logits]]
"""(prompts, left-padded; the prompt of each row to write) -> a decoder of these rows and their next tokens' logits."""


@contextmanager
def decoders(policy: Policy) -> Iterator[Start]:
    """How rows are started, for as long as the policy's weights stay as they are. Use it without gradients."""
    if policy.is_split:
        with in_step(partial(run_split, policy), partial(run_rows, policy.model.base_model, one_token(policy))) as run:
            yield partial(CacheDecoder.start, policy, run)
    elif is_lean(policy.model):
        yield partial(LeanDecoder.start, *lean_parts(policy.model, policy.arithmetic.autocast or torch.float32))
    else:
        with weights_cast_once(policy):
            yield partial(CacheDecoder.start, policy, policy.module.run)


# ---- Any family, through transformers


def run_split(policy: Policy, task: Callable[[], T]) -> T:
    """`task()` in the policy's precision, the weights that are split together as they are needed."""
    with policy.precision():
        return policy.module.run(task)


def one_token(policy: Policy) -> Tokens:
    """The shortest row: what a rank reads that only takes part."""
    ids = torch.full((1, 1), policy.pad_id, device=policy.device)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool))


@contextmanager
def weights_cast_once(policy: Policy) -> Iterator[None]:
    """The policy's precision, with the copies of the weights that it computes with made once and not at every step.

    Autocast keeps a copy until the outermost context ends, and only of a weight that requires a gradient; so the frozen
    weights under an adapter say that they do for a while. Run it without gradients.
    """
    frozen = [weight for weight in policy.model.parameters() if not weight.requires_grad and weight.is_floating_point()]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with policy.precision():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


class CacheDecoder:
    """Rows read by the transformers model itself: its cache, and what of it is padding. `run` makes every pass."""

    def __init__(self, policy: Policy, run: Run, cache: Cache, mask: Tensor) -> None:
        self.policy = policy
        self.run = run
        self.cache = cache
        self.mask = mask

    @classmethod
    def start(cls, policy: Policy, run: Run, prompts: Tokens, rows: Int[Tensor, " B"]) -> tuple[Decoder, Logits]:
        """Read the prompts, then continue from copies of their cache."""
        cache = DynamicCache(config=policy.model.config)
        decoder = cls(policy, run, cache, prompts.attention_mask)
        logits = run(partial(decoder._read, prompts.ids))
        decoder.keep(rows)
        cache.layers = [GrowingLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return decoder, logits[rows]

    def step(self, ids: Int[Tensor, " B"]) -> Logits:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        return self.run(partial(self._read, ids[:, None]))

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        self.mask = self.mask[rows]
        self.cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType] (its annotation asks for a legacy type)

    def _read(self, ids: Int[Tensor, "B T"]) -> Logits:
        """The logits after the last of `ids`; the mask covers what the cache holds and then `ids`."""
        module = self.policy.module
        body = self.policy.model.base_model if module.projects else self.policy.model
        inputs: dict[str, Any] = {"attention_mask": self.mask.long(), "past_key_values": self.cache}
        if "position_ids" in inspect.signature(body.forward).parameters:
            inputs["position_ids"] = (self.mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        outputs = body(input_ids=ids, **inputs, use_cache=True)
        states = outputs.last_hidden_state if module.projects else outputs.logits
        return logits_of(module.head, states[:, -1], fast=self.policy.arithmetic.autocast is not None)


def logits_of(head: Head | None, states: Float[Tensor, "B D"], *, fast: bool) -> Logits:
    """Float32 logits, made as `Policy.logprobs` makes them; without a head, states are logits already."""
    if head is None:
        return states.float()
    with fast_products(states.device, allowed=fast):
        return head.logits(states)


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values `[B, heads, T, width]` in memory that grows by blocks."""

    is_sliding = False
    is_croppable = False

    @classmethod
    def of(cls, layer: Any) -> GrowingLayer:
        """The same contents with room behind them."""
        growing = cls()
        growing.lazy_initialization(layer.keys, layer.values)
        growing.update(layer.keys, layer.values)
        return growing

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.length = 0
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.keys.shape[2]:
            self.keys, self.values = with_room(self.keys, self.length), with_room(self.values, self.length)
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


# ---- Llama and its relatives


class LeanDecoder:
    """Rows read by our own loop over the blocks; `positions` are those of the last tokens."""

    def __init__(self, body: Llama, project: Product, key_values: KeyValues, positions: Int[Tensor, " B"]) -> None:
        self.body = body
        self.project = project
        self.key_values = key_values
        self.positions = positions

    @classmethod
    def start(
        cls, body: Llama, project: Product, prompts: Tokens, rows: Int[Tensor, " B"], *, first_position: int = 0
    ) -> tuple[Decoder, Logits]:
        """Read the prompts, and remember them for all rows that continue them."""
        positions = positions_of(prompts.attention_mask) + first_position
        key_values = KeyValues(prompts.attention_mask)
        states = body(prompts.ids, positions, key_values.read_prompts)
        key_values.continue_from(rows)
        return cls(body, project, key_values, positions[rows, -1]), project(states[:, -1])[rows]

    def step(self, ids: Int[Tensor, " B"]) -> Logits:
        self.positions = self.positions + 1
        self.key_values.next_column()
        states = self.body(ids[:, None], self.positions[:, None], self.key_values.read_token)
        return self.project(states[:, 0])

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        self.positions = self.positions[rows]
        self.key_values.keep(rows)


def lean_parts(network: PreTrainedModel, dtype: torch.dtype) -> tuple[Llama, Product]:
    """A lean model's body and its projection to logits, ready to run while its weights stay as they are."""
    head = head_of(network)
    assert head is not None, "a model without a known head is not lean"
    return Llama.of(network, dtype), projection_of(head, network.device, fast=dtype != torch.float32)


# ---- Which of the two

_LEAN: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def is_lean(network: PreTrainedModel) -> bool:
    """Whether a model is a relative of Llama that `LeanDecoder` can run; found out once a model."""
    if network not in _LEAN:
        _LEAN[network] = head_of(network) is not None and has_its_parts(network) and lean_agrees(network)
    return _LEAN[network]


@torch.no_grad()
def lean_agrees(network: PreTrainedModel) -> bool:
    """Whether `LeanDecoder` gives the model's own logits in float32, on a few random tokens.

    At the first positions and at the last that the model knows, since some families treat far positions otherwise.
    """
    tokens = probe_tokens(network)
    last = getattr(network.config.get_text_config(), "max_position_embeddings", 512)
    return all(agrees_from(network, tokens, first) for first in (0, last - tokens.ids.shape[1]))


def agrees_from(network: PreTrainedModel, tokens: Tokens, first_position: int) -> bool:
    """Whether reading 5 columns at once and then the others one by one gives the logits of reading all at once."""
    positions = positions_of(tokens.attention_mask) + first_position
    expected = network(
        input_ids=tokens.ids, attention_mask=tokens.attention_mask.long(), position_ids=positions, use_cache=False
    ).logits[:, 4:]
    prompts = tokens_before(tokens, 5)
    rows = torch.arange(len(tokens), device=tokens.ids.device)
    parts = lean_parts(network, torch.float32)
    decoder, logits = LeanDecoder.start(*parts, prompts, rows, first_position=first_position)
    found = [logits, *(decoder.step(ids) for ids in tokens.ids[:, 5:].unbind(1))]
    return torch.allclose(torch.stack(found, 1), expected, rtol=1e-4, atol=1e-4)


def tokens_before(tokens: Tokens, column: int) -> Tokens:
    """The columns before one."""
    return Tokens(*(part[:, :column] for part in (tokens.ids, tokens.attention_mask, tokens.response_mask)))
