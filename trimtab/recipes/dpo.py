"""`trimtab dpo`: preference pairs in, an aligned policy out, with any loss of the family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trimtab.recipes.options import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    RunOptions,
    StepOptions,
    check_options,
)


@dataclass(frozen=True)
class Dpo:
    """Columns: prompt + chosen + rejected | chosen + rejected | rankings, read as pairs."""

    model: ModelOptions
    data: DataOptions
    run: RunOptions
    lora: LoraOptions = LoraOptions()
    steps: StepOptions = field(default_factory=lambda: StepOptions(lr=1e-6))
    loss: str = "dpo"
    """A loss of docs/methods/preference_losses.md, or a weighted sum such as dpo+0.2*preferred_ft."""
    loss_args: tuple[str, ...] = ()
    """Hyperparameters of the loss by their paper's symbols, such as beta=0.1."""
    reference: Literal["stored", "live", "moving"] = "stored"
    """Reference log-probabilities: computed once, at every step, or from a reference that follows (TR-DPO)."""
    reference_args: tuple[str, ...] = ()
    """Of a moving reference: alpha=0.6 every=512."""
    reference_cache: bool = True
    """Keep stored log-probabilities on disk, for later runs with the same rows and reference."""
    ref_model: str | None = None
    """Another model as the reference; the start model unless given."""


def dpo(config: Dpo) -> None:
    """Read, tokenize, score with the reference, train, save."""
    from functools import partial

    from trimtab.losses.arguments import combine
    from trimtab.losses.preference import ALL_LOSSES
    from trimtab.models import load_policy
    from trimtab.objectives import PreferenceObjective
    from trimtab.recipes import training
    from trimtab.records import Preference
    from trimtab.tokens import encode, pair_batch

    check_options(config)
    objective = PreferenceObjective(combine(ALL_LOSSES, config.loss, config.loss_args))
    training.check_reference(config, needed=objective.reads_reference)
    loaded = training.read_parts(config.data, Preference)
    policy = training.load(load_policy, config)
    items, facts = training.encode_parts(
        loaded, partial(encode, policy.tokenizer), config.data, pair_batch, policy.pad_id
    )
    steps = training.total_steps(config.steps, len(items["train"].encoded))
    training.check_moves(config, steps)
    scorer = training.reference_of(policy, config, needed=objective.reads_reference)
    run = training.open_run("dpo", config, policy, facts)
    items, moves = training.with_reference(items, scorer, policy, config, steps=steps)
    del scorer  # where its log-probabilities are stored, another model's memory is free again
    training.split_weights(run, config, policy)
    learner = training.make_learner(policy, objective, config.steps, steps)
    training.train(run, learner, items, config, steps, moves=moves)
