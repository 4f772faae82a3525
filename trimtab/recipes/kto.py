"""`trimtab kto`: unpaired feedback in, an aligned policy out."""

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
class Kto:
    """Columns: prompt + completion + label. Preference rows are read as one wanted and one unwanted answer."""

    model: ModelOptions
    data: DataOptions
    run: RunOptions
    lora: LoraOptions = LoraOptions()
    steps: StepOptions = field(default_factory=lambda: StepOptions(lr=1e-6))
    loss: str = "kto"
    """kto, bco, or a weighted sum."""
    loss_args: tuple[str, ...] = ()
    """Hyperparameters of the loss, such as beta=0.1 desirable_weight=1.33."""
    reference: Literal["stored", "live"] = "stored"
    """Reference log-probabilities: computed once, or at every step."""
    reference_cache: bool = True
    """Keep stored log-probabilities on disk, for later runs with the same rows and reference."""
    ref_model: str | None = None
    """Another model as the reference; the start model unless given."""


def kto(config: Kto) -> None:
    """Read, pair every prompt with a mismatched answer, tokenize, score with the reference, train, save."""
    from functools import partial

    from trimtab.losses.arguments import combine
    from trimtab.losses.unpaired import UNPAIRED_LOSSES
    from trimtab.models import load_policy
    from trimtab.objectives import FeedbackObjective
    from trimtab.recipes import training
    from trimtab.records import Feedback
    from trimtab.tokens import encode_feedback, feedback_batch

    check_options(config)
    if config.steps.batch_size < 2:
        raise ValueError("--batch-size 1: kto and bco compare the answers of a batch, so at least 2 are needed.")
    objective = FeedbackObjective(combine(UNPAIRED_LOSSES, config.loss, config.loss_args))
    training.check_reference(config, needed=True)
    loaded = training.read_parts(config.data, Feedback)
    policy = training.load(load_policy, config)
    encoder = partial(encode_feedback, policy.tokenizer, seed=config.run.seed)
    items, facts = training.encode_parts(loaded, encoder, config.data, feedback_batch, policy.pad_id)
    scorer = training.reference_of(policy, config, needed=True)
    run = training.open_run("kto", config, policy, facts)
    steps = training.total_steps(config.steps, len(items["train"].encoded))
    items, _ = training.with_reference(items, scorer, policy, config, steps=steps)
    del scorer  # where its log-probabilities are stored, another model's memory is free again
    training.split_weights(run, config, policy)
    learner = training.make_learner(policy, objective, config.steps, steps)
    training.train(run, learner, items, config, steps)
