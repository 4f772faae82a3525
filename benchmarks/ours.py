"""This side of a comparison, one process: `python -m benchmarks.ours JOB.json` prints a `Result`.

Every kind is wired as its recipe wires it (trimtab/recipes), so what is measured is what a user's step takes. Left out
are the run directory, samples and saving, which the peer does not do here either.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import trimtab
from benchmarks import online
from benchmarks.process import Clock, Job, Result, peak_bytes, resident_bytes, token_facts
from trimtab.learner import Learner
from trimtab.losses.arguments import combine
from trimtab.losses.preference import ALL_LOSSES
from trimtab.losses.reward import REWARD_LOSSES
from trimtab.losses.unpaired import UNPAIRED_LOSSES
from trimtab.memory import choose_checkpointing, recompute_layers
from trimtab.models import load_policy, load_scalar, load_tokenizer, make_policy, make_scalar
from trimtab.objectives import (
    DemonstrationObjective,
    FeedbackObjective,
    Objective,
    PreferenceObjective,
    RewardObjective,
)
from trimtab.recipes import training
from trimtab.recipes.dpo import Dpo
from trimtab.recipes.kto import Kto
from trimtab.recipes.options import DataOptions, ModelOptions, OptimizerOptions, RunOptions, StepOptions
from trimtab.recipes.reward import Reward
from trimtab.recipes.sft import Sft
from trimtab.records import Demonstration, Feedback, Preference
from trimtab.run import processor_name
from trimtab.tokens import Encoded, demonstration_batch, encode, encode_feedback, feedback_batch, pair_batch

Wired = tuple[Any, Objective, training.Items, int]
"""A model, what it minimizes, its data with references, and the memory that the model alone takes."""


ITEM_ROWS = {"dpo": 2, "kto": 2, "reward": 2, "sft": 1}


def step_options(job: Job) -> StepOptions:
    """One batch of all items, in one micro-batch, as the peer runs it."""
    items = len(job.read_rows())
    rows = ITEM_ROWS[job.kind] * items
    how = OptimizerOptions(warmup=0.0, share_prompts=job.share)
    return StepOptions(lr=job.lr, steps=1, batch_size=items, micro_batch_rows=rows, optimizer=how)


def options(job: Job) -> dict[str, Any]:
    """The groups of options that the recipes share."""
    return {
        "model": ModelOptions(job.model, dtype=job.dtype, device=job.device),
        "data": DataOptions(job.rows, max_length=job.max_length),
        "run": RunOptions(out="unused", samples=0),
        "steps": step_options(job),
    }


def read(job: Job, config: Any, kind: type, encoder: Callable[..., Any], collate: Any, pad_id: int) -> training.Items:
    """The batch's items."""
    items, _ = training.encode_parts(training.read_parts(config.data, kind), encoder, config.data, collate, pad_id)
    return items["train"]


def load(job: Job, loader: Callable[..., Any], config: Any, **arguments: Any) -> Any:
    """The model as a recipe loads it, and its attention where the job names one; rows as they are leave no choice."""
    model = training.load(loader, config, **arguments)
    if job.share and job.attention != "auto":
        capacity = model.body.arrangement.capacity if model.body.arrangement else 0
        model.body.use_layout(capacity=capacity, attention=job.attention, precision=model.arithmetic)
    return model


def dpo(job: Job) -> Wired:
    """Preference pairs with stored reference log-probabilities."""
    config = Dpo(**options(job), reference_cache=False)
    policy = load(job, policy_loader(job), config)
    loaded = held(job)
    items = read(job, config, Preference, partial(encode, policy.tokenizer), pair_batch, policy.pad_id)
    objective = PreferenceObjective(combine(ALL_LOSSES, config.loss, config.loss_args))
    return policy, objective, referenced(items, policy, config), loaded


def kto(job: Job) -> Wired:
    """Unpaired feedback with stored reference log-probabilities."""
    config = Kto(**options(job), reference_cache=False)
    policy = load(job, policy_loader(job), config)
    loaded = held(job)
    encoder = partial(encode_feedback, policy.tokenizer, seed=config.run.seed)
    items = read(job, config, Feedback, encoder, feedback_batch, policy.pad_id)
    objective = FeedbackObjective(combine(UNPAIRED_LOSSES, config.loss, config.loss_args))
    return policy, objective, referenced(items, policy, config), loaded


def reward(job: Job) -> Wired:
    """Preference pairs for a reward model; its head is already in the folder, so that both sides have the same."""
    config = Reward(**options(job))
    model = load(job, scalar_loader(job), config, new_head=False)
    loaded = held(job)
    items = read(job, config, Preference, partial(encode, model.tokenizer), pair_batch, model.pad_id)
    return model, RewardObjective(combine(REWARD_LOSSES, "bradley_terry", ())), items, loaded


def sft(job: Job) -> Wired:
    """Packed demonstrations."""
    config = Sft(**options(job), packing=True)
    policy = load(job, policy_loader(job), config)
    loaded = held(job)
    items = read(job, config, Demonstration, partial(encode, policy.tokenizer), demonstration_batch, policy.pad_id)
    return policy, DemonstrationObjective(), items, loaded


KINDS: dict[str, Callable[[Job], Wired]] = {"dpo": dpo, "kto": kto, "reward": reward, "sft": sft}


def referenced(items: training.Items, policy: Any, config: Any) -> training.Items:
    """Items whose batches carry the start policy's log-probabilities, computed here and not read from a cache."""
    scorer = training.reference_of(policy, config, needed=True)
    with_them, _ = training.with_reference({"train": items}, scorer, policy, config, steps=1)
    return with_them["train"]


# ---- Models whose weights are random, at the shape of a config


def policy_loader(job: Job) -> Callable[..., Any]:
    """`load_policy`, or the same of random weights where the folder has none."""
    return load_policy if job.has_weights() else partial(random_model, AutoModelForCausalLM, make_policy, job)


def scalar_loader(job: Job) -> Callable[..., Any]:
    """`load_scalar`, or the same of random weights."""
    return (
        load_scalar
        if job.has_weights()
        else partial(random_model, AutoModelForSequenceClassification, make_scalar, job)
    )


def random_model(auto: Any, make: Callable[..., Any], job: Job, folder: str, **given: Any) -> Any:
    """A model of the folder's config, made on its device; the same weights for the same device."""
    network = random_network(auto, folder, job.device)
    kept = {name: given[name] for name in ("dtype", "device", "lora_rank", "lora_alpha", "seed")}
    return make(network, load_tokenizer(Path(folder)), **kept)


def random_network(auto: Any, folder: str, device: str) -> Any:
    """Float32 random weights at the shape of a folder's config."""
    torch.manual_seed(0)
    with torch.device(device):
        return auto.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


# ---- Measuring


@dataclass(frozen=True)
class Ready:
    """Everything that a step takes, and how it came about."""

    learner: Learner
    batch: Any
    model: Any
    items: training.Items
    loaded: int
    checkpointing: str


def make_ready(job: Job) -> Ready:
    """A job's model, learner and batch."""
    model, objective, items, loaded = KINDS[job.kind](job)
    steps = step_options(job)
    checkpointing = choose_checkpointing(
        steps.optimizer.gradient_checkpointing, model, *training.largest_shape(model, items, steps)
    )
    if checkpointing.on:
        recompute_layers(model.model)
    learner = with_optimizer(training.make_learner(model, objective, steps, 1 + job.steps), job)
    return Ready(learner, items.batch(range(len(items.encoded))), model, items, loaded, checkpointing.why)


def run(job: Job) -> Result:
    """All steps of a job, and what they took."""
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if job.kind in online.KINDS:
        return replace(online.run(job, held, policy_loader(job)), peak=peak(job), versions=versions())
    ready = make_ready(job)
    clock, told = Clock(), []
    for _ in range(1 + job.steps):
        clock.start()
        told.append(ready.learner.step(ready.batch))
        settle(job)
        clock.stop()
    return Result(
        side="trimtab",
        seconds=clock.seconds,
        losses=[figures["loss"] for figures in told],
        figures=told[0],
        tokens={**token_facts(answers(ready.items.encoded)), **counts(ready.items.encoded, job.kind)},
        loaded=ready.loaded,
        peak=peak(job),
        threads=torch.get_num_threads(),
        versions=versions(),
        note=f"{ready.model.arithmetic.why}; gradient checkpointing {ready.checkpointing}",
        laid_out=ready.model.body.arrangement is not None,
        attention=ready.model.body.attention,
    )


def with_optimizer(learner: Learner, job: Job) -> Learner:
    """The learner as it is, or with plain SGD, whose state takes no memory."""
    if job.optimizer == "adamw":
        return learner
    assert job.optimizer == "sgd", job.optimizer
    optimizer = torch.optim.SGD(learner.parameters, lr=job.lr)
    return replace(learner, optimizer=optimizer, schedule=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))


def settle(job: Job) -> None:
    """Wait until a GPU has done what it was told."""
    if job.device == "cuda":
        torch.cuda.synchronize()


def held(job: Job) -> int:
    """The memory that is in use now."""
    return torch.cuda.memory_allocated() if job.device == "cuda" else resident_bytes()


def peak(job: Job) -> int:
    """The most memory that was in use."""
    return torch.cuda.max_memory_allocated() if job.device == "cuda" else peak_bytes()


def answers(items: Sequence[Encoded]) -> list[list[int]]:
    """The ids of the rows that are trained on: of feedback, the answer and not the mismatched one."""
    feedback = isinstance(items[0].record, Feedback)
    return [row.ids for item in items for row in (item.rows[:1] if feedback else item.rows)]


def counts(items: Sequence[Encoded], kind: str) -> dict[str, int]:
    """What a step cannot do without: tokens with each prompt once, and predicted tokens; both, without gradient."""
    trained = [(item, item.rows[:1] if kind == "kto" else item.rows) for item in items]
    looked_at = [item.rows[1] for item in items] if kind == "kto" else []
    return {
        "distinct": sum(i.prompt_length + sum(len(r.ids) - i.prompt_length for r in rows) for i, rows in trained),
        "predicted": 0 if kind == "reward" else sum(sum(row.response) for _, rows in trained for row in rows),
        "looked_at": sum(len(row.ids) for row in looked_at),
        "looked_at_predicted": sum(sum(row.response) for row in looked_at),
    }


def versions() -> dict[str, str]:
    """What this side ran with."""
    import transformers

    known = {"trimtab": trimtab.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"python": platform.python_version(), **known, "processor": processor_name()}


def save_reward_model(model: str, folder: str) -> None:
    """A reward model with a new head, as a folder that both sides load."""
    load_scalar(model, new_head=True, dtype="float32", device="cpu").save(folder)


if __name__ == "__main__":
    if sys.argv[1] == "--save-reward-model":
        save_reward_model(sys.argv[2], sys.argv[3])
    else:
        run(Job.read(sys.argv[1])).print()
