"""`trimtab sft`: demonstrations in, a policy out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.recipes.options import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    StepOptions,
    check_options,
)


@dataclass(frozen=True)
class Sft:
    """Columns: messages | text | prompt + completion. Preference rows are read as demonstrations of `chosen`."""

    model: ModelOptions
    data: DataOptions
    run: RunOptions
    lora: LoraOptions = LoraOptions()
    steps: StepOptions = StepOptions(lr=2e-5, optimizer=OptimizerOptions(schedule="cosine"))
    turns: Literal["last", "all"] = "last"
    """Which assistant turns of a conversation carry loss."""
    packing: bool = True
    """Lay several demonstrations into one sequence where that is faster; none sees another. Off: each runs alone."""


def sft(config: Sft) -> None:
    """Read, tokenize, train, save."""
    from functools import partial

    from trimtab.models import load_policy
    from trimtab.objectives import DemonstrationObjective
    from trimtab.recipes import training
    from trimtab.records import Demonstration
    from trimtab.tokens import demonstration_batch, encode

    check_options(config)
    loaded = training.read_parts(config.data, Demonstration)
    policy = training.load(load_policy, config)
    encoder = partial(encode, policy.tokenizer, turns=config.turns)
    items, facts = training.encode_parts(loaded, encoder, config.data, demonstration_batch, policy.pad_id)
    run = training.open_run("sft", config, policy, facts)
    steps = training.total_steps(config.steps, len(items["train"].encoded))
    training.split_weights(run, config, policy)
    learner = training.make_learner(policy, DemonstrationObjective(), config.steps, steps)
    training.train(run, learner, items, config, steps)
