"""What training a model takes: memory of each device by method and sharding, and the seconds of a step. Nothing is run.

A model of any size is built without memory (torch's fake tensors), and what a pass of it keeps is counted on two short
rows, as in `memory.py`. The rest is arithmetic: weights, gradients and AdamW's two means are float32 numbers, split
over the devices or not. Memory is a peak: what rests, and on top of it the larger of training and sampling; or the
start, when every device reads whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from trimtab.memory import CHUNK_COPIES, PROBE_TOKENS, layers_of, on_a_line, saved_bytes
from trimtab.projection import CHUNK_ROWS
from trimtab.weights import add_lora

FLOAT = 4
"""Bytes of a weight, a gradient and each of AdamW's means."""
LAYERS_TOGETHER = 2
"""Layers of split weights that are together at a time: the one that runs, and the next one on its way."""


@dataclass(frozen=True)
class Size:
    """What memory and time depend on about a model: counts of numbers, and bytes that a pass keeps.

    `layer` and `outside` are the weights of the largest layer and of all that stands in none; `trained_head` those of a
    head whose weights train. `kept` are the bytes that rows of 16 and of 48 tokens keep for the backward pass.
    """

    weights: int
    trained: int
    layers: int
    layer: int
    outside: int
    trained_head: int
    hidden: int
    vocabulary: int
    key_values: int
    kept: tuple[int, int]
    bytes_of_products: int


@dataclass(frozen=True)
class Kind:
    """What a method holds beside the policy, and does: a resident reference, a critic, sampling; `passes` are the
    forward passes without gradient that each trained token has.
    """

    reference: bool = False
    critic: bool = False
    samples: bool = False
    head: bool = True
    passes: int = 0


KINDS: dict[str, Kind] = {
    "sft": Kind(),
    "reward": Kind(head=False),
    "dpo, kto (stored reference)": Kind(),
    "dpo, kto (live reference)": Kind(reference=True, passes=1),
    "raft, online-dpo, rloo, grpo": Kind(reference=True, samples=True, passes=1),
    "ppo": Kind(reference=True, critic=True, samples=True, passes=3),
}


@dataclass(frozen=True)
class Work:
    """One step: rows in all and in one pass, their length, answers sampled at a time, and on how many devices."""

    rows: int
    micro_batch_rows: int
    length: int
    new_tokens: int
    sampled_rows: int
    devices: int = 1
    split: bool = False
    recompute: bool = False
    apart: bool = False
    """Whether split weights stay split while answers are drawn."""
    reward: int = 0
    """Weights of a reward model."""


@dataclass(frozen=True)
class Device:
    """What a device does in a second: operations of matrix products, bytes of its memory, bytes to other devices."""

    operations: float
    memory: float
    link: float


# ---- Memory


def memory(size: Size, kind: Kind, work: Work) -> dict[str, float]:
    """Bytes of a device by what they hold; "peak" is the most at a time."""
    parts = work.devices if work.split else 1
    networks = 2 if kind.critic else 1
    has_copy = kind.reference and size.trained == size.weights  # without its adapter, a policy is its reference
    frozen = size.weights * has_copy + work.reward * kind.samples
    told = {
        "start": FLOAT * (networks * size.weights + frozen),  # models are read before they are split
        "weights": networks * FLOAT * size.weights / parts,
        "frozen": FLOAT * frozen / parts,
        "optimizer": networks * 2 * FLOAT * size.trained / parts,
        "gradients": networks * FLOAT * size.trained / parts,
        "activations": networks * activations(size, work),
        "logits": logits(size) if kind.head else 0.0,
        "together": together(size) if work.split else 0.0,
        "sampling": sampling(size, work) if kind.samples else 0.0,
    }
    resting = told["weights"] + told["frozen"] + told["optimizer"] + told["gradients"]
    training = told["activations"] + told["logits"] + told["together"]
    return {**told, "peak": max(told["start"], resting + max(training, told["sampling"]))}


def activations(size: Size, work: Work) -> float:
    """What one pass keeps for its backward pass. With layers run again: every layer's input, and all of one layer."""
    tokens = work.micro_batch_rows * work.length
    masks = work.micro_batch_rows * work.length**2 * size.bytes_of_products
    if not work.recompute:
        return on_a_line(size.kept, tokens) + size.layers * masks
    return FLOAT * size.layers * tokens * size.hidden + on_a_line(size.kept, tokens) / size.layers + masks


def logits(size: Size) -> float:
    """A chunk of logits and its copies, and the gradient of the head while it is added up."""
    return FLOAT * (CHUNK_COPIES * CHUNK_ROWS * size.vocabulary + size.trained_head)


def together(size: Size) -> float:
    """Split weights that are together while they are used, and the gradients of a layer before they are split."""
    return in_use(size) * (2 if size.trained == size.weights else 1)


def in_use(size: Size) -> float:
    """Split weights that are together at a time."""
    return FLOAT * (LAYERS_TOGETHER * size.layer + size.outside)


def sampling(size: Size, work: Work) -> float:
    """Keys and values of the answers, the weights as products read them, and all of them where they are split.

    Where they stay split, those of some layers.
    """
    cache = work.sampled_rows * work.length * size.key_values * size.bytes_of_products
    if work.apart:
        return cache + in_use(size)
    copies = size.bytes_of_products * size.weights if size.bytes_of_products < FLOAT else 0
    return cache + copies + (FLOAT * size.weights if work.split else 0)


# ---- Time


def seconds(size: Size, kind: Kind, work: Work, device: Device) -> float:
    """Seconds of a step, one thing after the other: products, sampling, exchange. A lower bound of nothing else."""
    networks = 2 if kind.critic else 1
    tokens = work.rows * work.length / work.devices
    attention = 2 * work.length * size.hidden * size.layers
    forward = 2 * (size.weights - size.outside + size.vocabulary * size.hidden) + attention
    backward = forward * (1 + size.trained / size.weights) + (forward if work.recompute else 0)
    products = tokens * (networks * (forward + backward) + kind.passes * forward) / device.operations
    return products + drawing(size, kind, work, device) + exchange(size, work, networks) / device.link


def drawing(size: Size, kind: Kind, work: Work, device: Device) -> float:
    """Seconds of sampling: every new token of a batch of rows reads all weights once, which come from other devices
    where they stay split.
    """
    if not kind.samples:
        return 0.0
    batches = -(-work.rows // (work.devices * work.sampled_rows))
    token = size.weights * size.bytes_of_products / device.memory
    token += FLOAT * size.weights / device.link if work.apart else 0
    return batches * work.new_tokens * token


def exchange(size: Size, work: Work, networks: int) -> float:
    """Bytes that a device sends in a step: gradients once; of split weights, each pass puts them together twice."""
    if work.devices == 1:
        return 0.0
    if not work.split:
        return networks * 2 * FLOAT * size.trained
    passes = -(-work.rows // (work.devices * work.micro_batch_rows))
    return networks * passes * FLOAT * (2 * size.weights + size.trained)


# ---- A model's size, without the model


def size_of(config: PreTrainedConfig, *, bf16: bool, lora_rank: int = 0, remote_code: bool = False) -> Size:
    """The size of a language model with this config."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=remote_code)
        if lora_rank:
            add_lora(network, network.get_output_embeddings(), rank=lora_rank, alpha=None, seed=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(network)
        short, long = (kept_bytes(network, length, bf16=bf16) for length in PROBE_TOKENS)
    layers = [sum(weight.numel() for weight in layer.parameters()) for layer in layers_of(network)]
    weights = sum(weight.numel() for weight in network.parameters())
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    head = network.get_output_embeddings().weight
    return Size(
        weights=weights,
        trained=sum(weight.numel() for weight in network.parameters() if weight.requires_grad),
        layers=max(1, len(layers)),
        layer=max(layers, default=0),
        outside=weights - sum(layers),
        trained_head=head.numel() if head.requires_grad else 0,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        key_values=2 * text.num_hidden_layers * heads * width,
        kept=(short, long),
        bytes_of_products=2 if bf16 else FLOAT,
    )


def kept_bytes(network: PreTrainedModel, length: int, *, bf16: bool) -> int:
    """What the body keeps of one row of `length` tokens under masks, these left out: `activations` adds them."""
    run = partial(network.base_model, input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        kept = saved_bytes(run, network.parameters())
    return kept - len(layers_of(network)) * length**2 * (2 if bf16 else FLOAT)


def make_fake(network: nn.Module) -> None:
    """Let the weights of a network on the meta device say that they are on a CPU, where autocast is known."""
    known: dict[int, Tensor] = {}
    for module in network.modules():
        for named in (module._parameters, module._buffers):
            for name, values in named.items():
                if values is not None:
                    known.setdefault(id(values), fake_of(values))
                    named[name] = known[id(values)]  # pyright: ignore[reportArgumentType] (a weight is a weight)


def fake_of(values: Tensor) -> Tensor:
    """A tensor like this one on a CPU; a weight is one again."""
    fake = torch.empty(values.shape, dtype=values.dtype)
    return nn.Parameter(fake, values.requires_grad) if isinstance(values, nn.Parameter) else fake


# ---- What fits


@dataclass(frozen=True)
class Row:
    """One way to train: its method and how it is done, its memory and seconds, and whether it fits."""

    method: str
    work: Work
    memory: Mapping[str, float]
    seconds: float
    fits: bool


def rows(sizes: Mapping[str, Size], work: Work, device: Device, room: float) -> list[Row]:
    """Every method in `sizes` on these devices, whole and split."""
    return [
        row_of(method, size, replace(work, split=split), device, room)
        for method, size in sizes.items()
        for split in ((False, True) if work.devices > 1 else (False,))
    ]


def row_of(method: str, size: Size, work: Work, device: Device, room: float) -> Row:
    """The quickest way to train that fits, or where none does the one that needs the least memory.

    Running layers again takes time, drawing answers with split weights more.
    """
    kind = KINDS[method]
    needed: Callable[[Work], dict[str, float]] = partial(memory, size, kind)
    may_be_apart = (False, True) if work.split and kind.samples else (False,)
    ways = [replace(work, recompute=again, apart=apart) for apart in may_be_apart for again in (False, True)]
    chosen = next((way for way in ways if needed(way)["peak"] <= room), ways[-1])
    told = needed(chosen)
    return Row(method, chosen, told, seconds(size, kind, chosen, device), told["peak"] <= room)
