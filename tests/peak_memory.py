"""What test_plan.py runs in processes of their own: a few steps of a small model, and the most memory they took."""

import ctypes
import gc
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import parallel
from trimtab.batches import DemonstrationBatch, Tokens
from trimtab.builtin import tiny
from trimtab.learner import Learner, make_optimizer, make_schedule
from trimtab.memory import recompute_layers
from trimtab.models import Policy, make_policy
from trimtab.objectives import DemonstrationObjective
from trimtab.parallel import in_chunks

ROWS, LENGTH = 4, 128
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=384,
    intermediate_size=1152,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    pad_token_id=0,
)


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def make(network: torch.nn.Module, rank: int) -> Policy:
    _, tokenizer = tiny()
    policy = make_policy(network, tokenizer, dtype="float32", device="cpu", lora_rank=rank)  # pyright: ignore
    policy.body.use_layout(share=False)
    return policy


def steps(policy: Policy, count: int, *, recompute: bool, live: bool) -> None:
    """Some steps of two micro-batches a rank, each row of it of full length."""
    reference = policy.reference() if live else None
    if parallel.ranks() > 1:
        policy.split_weights()
        if reference:
            reference.split_weights()
    if recompute:
        recompute_layers(policy.model)
    optimizer = make_optimizer(policy.trainable_parameters(), lr=1e-5, weight_decay=0.0)
    schedule = make_schedule(optimizer, kind="constant", warmup_steps=0, steps=count)
    learner = Learner(policy, DemonstrationObjective(), optimizer, schedule, ROWS)
    rows, vocabulary = 2 * ROWS * parallel.ranks(), policy.model.config.vocab_size
    ids = torch.randint(1, vocabulary, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    tokens = Tokens(ids, mask, mask & (torch.arange(LENGTH) > 0))
    for _ in range(count):
        if reference:
            in_chunks(reference.logprobs, tokens, ROWS)
        learner.step(DemonstrationBatch(tokens, torch.ones(rows)))


def main(kind: str) -> None:
    parallel.start()
    torch.set_num_threads(1)
    given = {"recompute": kind == "recompute", "live": kind == "live"}
    rank = 8 if kind == "adapter" else 0
    steps(make(tiny()[0], rank), 1, **given)  # what the first pass loads is no part of any plan
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    steps(make(LlamaForCausalLM(CONFIG), rank), 3, **given)
    if parallel.is_first():
        print(status("VmHWM") - before)
    parallel.finish()


if __name__ == "__main__":
    main(sys.argv[1])
