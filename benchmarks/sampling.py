"""Sampling: ours through both decoders, `generate` of transformers, and the matrix products alone.

All in one process, turn by turn, so that whatever else the machine does falls on all of them; ratios are taken within
a turn. Every contender writes the same number of tokens after the same prompts, and nobody stops early.

    python -m benchmarks sampling --model smollm2-135m-instruct --dtype bfloat16
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import report
from trimtab.data import load
from trimtab.models import Policy, load_policy
from trimtab.progress import console
from trimtab.records import Prompt
from trimtab.sampling import Samples, decoders, sample
from trimtab.tokens import Row, encode_prompts, pad

Contender = Callable[[], None]


@dataclass(frozen=True)
class Sampling:
    """Sampling beside `generate` of transformers and the matrix products alone."""

    model: str = "smollm2-135m-instruct"
    """A model of trimtab's, or a folder."""
    data: str = "reviews-heldout"
    """Prompts."""
    prompts: int = 8
    """How many of them."""
    answers: int = 4
    """Answers to every prompt."""
    tokens: int = 48
    """New tokens of an answer."""
    turns: int = 5
    """How many times every contender runs, after once to warm up."""
    threads: int = torch.get_num_threads()
    """Threads of torch."""
    lora_rank: int = 0
    """Of the policy; `generate` runs the model without it."""
    dtype: str = "auto"
    """auto, bfloat16 or float32."""
    device: str = "auto"
    """cpu, cuda or mps; auto takes the first there is."""
    own_time: bool = False
    """Processor time of one thread, on a machine that others use too."""
    out: str = str(report.RESULTS)
    """Folder of the JSON file."""


def sampling(given: Sampling) -> None:
    """Measure, print, write."""
    if (least := min(given.prompts, given.answers, given.tokens, given.turns, given.threads)) < 1:
        raise ValueError(f"--prompts, --answers, --tokens, --turns or --threads is {least}: at least 1 is needed.")
    torch.set_num_threads(1 if given.own_time else given.threads)
    policy = load_policy(given.model, dtype=given.dtype, device=given.device, lora_rank=given.lora_rank)
    prompts = load(given.data, Prompt).records[: given.prompts]
    runners = contenders(given, policy, prompts)
    clock = time.thread_time if given.own_time else time.perf_counter
    for run in runners.values():
        run()
    turns = [{name: seconds(run, clock, policy.device) for name, run in runners.items()} for _ in range(given.turns)]
    found = summary(turns, given.tokens) | {"gap": gap(policy, prompts, given)}
    print_and_write(found, given, policy)


def contenders(given: Sampling, policy: Policy, prompts: list[Prompt]) -> dict[str, Contender]:
    """Name -> what writes all the answers once."""
    dtype = policy.arithmetic.autocast or torch.float32
    peer = load_policy(given.model, dtype=given.dtype, device=given.device).model.to(dtype)  # pyright: ignore

    def ours() -> None:
        draw(policy, prompts, given)

    def through_transformers() -> None:
        with forced(lean=False):
            draw(policy, prompts, given)

    named = {"trimtab": ours, "generate": generator(peer, policy, prompts, given)}
    if decoders.is_lean(policy.model):
        named["trimtab, any family"] = through_transformers
    return named | {"products alone": products(peer, given)}


def draw(policy: Policy, prompts: list[Prompt], given: Sampling) -> Samples:
    """Our answers."""
    rows = given.answers * len(prompts)
    return sample(policy, prompts, given.answers, max_new_tokens=given.tokens, stop_ids=(), batch_rows=rows)


@contextmanager
def forced(*, lean: bool) -> Iterator[None]:
    """Where one of the two decoders is used whatever the model."""
    with mock.patch.object(decoders, "is_lean", lambda network: lean):
        yield


def generator(peer: nn.Module, policy: Policy, prompts: list[Prompt], given: Sampling) -> Contender:
    """transformers' own sampling, its weights in the type it computes in."""
    encoded = encode_prompts(policy.tokenizer, prompts)
    tokens = pad([Row(ids, [False] * len(ids)) for ids in encoded], policy.pad_id, side="left")
    rows = torch.arange(len(prompts)).repeat_interleave(given.answers)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": policy.pad_id}
    settings["max_new_tokens"] = given.tokens
    peer.generation_config.eos_token_id = None  # pyright: ignore
    ids, mask = tokens.ids[rows].to(policy.device), tokens.attention_mask[rows].long().to(policy.device)

    def generate() -> None:
        written = peer.generate(input_ids=ids, attention_mask=mask, **settings)  # pyright: ignore
        assert written.shape[1] == ids.shape[1] + given.tokens

    return generate


def products(peer: nn.Module, given: Sampling) -> Contender:
    """Every linear map once a token, and nothing else."""
    weights = [module.weight for module in peer.modules() if isinstance(module, nn.Linear)]
    rows = given.prompts * given.answers
    inputs = {width: weights[0].new_ones(rows, width) for width in {weight.shape[1] for weight in weights}}

    def multiply() -> None:
        with torch.no_grad():
            for _ in range(given.tokens):
                for weight in weights:
                    F.linear(inputs[weight.shape[1]], weight)

    return multiply


def seconds(run: Contender, clock: Callable[[], float], device: torch.device) -> float:
    """How long one contender takes."""
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def summary(turns: list[dict[str, float]], tokens: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step, and the ratio to ours within a turn: medians over the turns."""
    return {
        name: {
            "milliseconds_per_step": statistics.median(turn[name] for turn in turns) * 1000 / tokens,
            "times_ours": statistics.median(turn[name] / turn["trimtab"] for turn in turns),
        }
        for name in turns[0]
    }


def gap(policy: Policy, prompts: list[Prompt], given: Sampling) -> dict[str, float]:
    """|log-probability when sampled - when scored|, mean and largest, in nats per token, for both decoders."""
    found = {}
    for name, lean in {"lean": True, "any family": False}.items():
        if lean and not decoders.is_lean(policy.model):
            continue
        with forced(lean=lean), torch.no_grad():
            drawn = draw(policy, prompts, given)
            scored = policy.logprobs(drawn.tokens).cpu()
        off = (drawn.logprobs - scored).abs()[drawn.tokens.response_mask]
        found |= {f"{name}, mean": float(off.mean()), f"{name}, largest": float(off.max())}
    return found


def print_and_write(found: dict[str, dict[str, float]], given: Sampling, policy: Policy) -> None:
    """The table, and the file."""
    for name, values in found.items():
        console.print(f"{name:22}" + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))
    about = {**asdict(given), "torch": torch.__version__, "arithmetic": policy.arithmetic.why}
    path = Path(given.out) / "sampling.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": about, "found": found}, indent=2) + "\n", encoding="utf-8")
    console.print(str(path))
