"""`trimtab reward`: preferences or rankings in, a reward model out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.recipes.options import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    RunOptions,
    StepOptions,
    check_options,
)


@dataclass(frozen=True)
class Reward:
    """Columns: prompt + chosen + rejected | chosen + rejected | prompt + completions (a ranking, best first)."""

    model: ModelOptions
    data: DataOptions
    run: RunOptions
    lora: LoraOptions = LoraOptions()
    steps: StepOptions = field(default_factory=lambda: StepOptions(lr=1e-5))
    loss: str | None = None
    """bradley_terry for pairs, grouped for rankings, or another of docs/methods/reward_losses.md."""
    loss_args: tuple[str, ...] = ()
    """Hyperparameters of the loss, name=value."""
    normalize: bool = True
    """Scale the trained head so that scores have standard deviation 1 on the first 256 items; changes no ranking."""


def reward(config: Reward) -> dict[str, float]:
    """Read, tokenize, train, save; returns the held-out figures."""
    from functools import partial

    from trimtab import data
    from trimtab.losses.arguments import combine
    from trimtab.losses.reward import RANKING_LOSSES, REWARD_LOSSES
    from trimtab.models import load_scalar
    from trimtab.objectives import RankingObjective, RewardObjective
    from trimtab.recipes import training
    from trimtab.records import Preference, Ranking
    from trimtab.tokens import encode, pair_batch, ranking_batch

    check_options(config)
    natural = None if config.loss else data.kind_of(config.data.data)
    name = config.loss or ("grouped" if natural is Ranking else "bradley_terry")
    loss = combine({**REWARD_LOSSES, **RANKING_LOSSES}, name, config.loss_args)
    ranked = loss.names[0] in RANKING_LOSSES
    kind, collate = (Ranking, ranking_batch) if ranked else (Preference, pair_batch)
    loaded = training.read_parts(config.data, kind)
    # The score is read after the closing token, as it will be for any answer; nothing is imitated here, so an answer
    # that was cut gets one, too.
    loaded = {part: replace(some, records=[as_finished(r) for r in some.records]) for part, some in loaded.items()}
    model = training.load(load_scalar, config, new_head=True)
    items, facts = training.encode_parts(loaded, partial(encode, model.tokenizer), config.data, collate, model.pad_id)
    run = training.open_run("reward", config, model, facts)
    objective = RankingObjective(loss) if ranked else RewardObjective(loss)
    steps = training.total_steps(config.steps, len(items["train"].encoded))
    training.split_weights(run, config, model)
    learner = training.make_learner(model, objective, config.steps, steps)
    scale = partial(training.normalize, model, items["train"], config.steps) if config.normalize else None
    return training.train(run, learner, items, config, steps, finish=scale or (lambda: None))


def as_finished(record: Any) -> Any:
    """The same pair, both answers taken to have ended; rankings always are."""
    from trimtab.records import Preference

    return replace(record, chosen_finished=True, rejected_finished=True) if isinstance(record, Preference) else record
