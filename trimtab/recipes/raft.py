"""`trimtab raft`: expert iteration. Prompts and a reward in; the policy imitates the best of its own fresh answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from trimtab.recipes.algorithm import check_online
from trimtab.recipes.options import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    OnlineStepOptions,
    RewardChoice,
    RunOptions,
    SamplingOptions,
)

if TYPE_CHECKING:
    from trimtab.selection import Pick


@dataclass(frozen=True)
class KeepOptions:
    """The answers of a step, and which of them are imitated."""

    group_size: int = 8
    """Answers to each prompt."""
    prompts_per_step: int = 8
    """Prompts of each step."""
    keep: Literal["best", "above"] = "best"
    """Imitate each prompt's best answer, or every answer with a reward above --threshold."""
    threshold: float | None = None
    """For --keep above, in units of the reward."""
    unfinished_score: float | None = None
    """The score of every answer that was cut at --max-new-tokens, whatever its reward."""


@dataclass(frozen=True)
class Raft:
    """Rows with a prompt; other columns reach the reward."""

    model: ModelOptions
    data: DataOptions
    run: RunOptions
    reward: RewardChoice
    algorithm: KeepOptions = KeepOptions()
    lora: LoraOptions = LoraOptions()
    sampling: SamplingOptions = SamplingOptions()
    steps: OnlineStepOptions = field(default_factory=lambda: OnlineStepOptions(lr=2e-5))


def raft(config: Raft) -> None:
    """Sample, keep the best, imitate."""
    from trimtab.objectives import DemonstrationObjective
    from trimtab.recipes.fresh import learn_from_fresh
    from trimtab.recipes.online import load_reward
    from trimtab.selection import chosen_demonstrations

    pick = checked(config)
    learn_from_fresh("raft", config, load_reward, DemonstrationObjective(), pick, chosen_demonstrations)


def checked(config: Raft) -> Pick:
    """What chooses among answers, once no flag means nothing."""
    from trimtab.selection import above, best

    check_online(config)
    options = config.algorithm
    if options.keep == "best":
        if options.threshold is not None:
            raise ValueError(f"--threshold {options.threshold:g} has no effect without --keep above.")
        if options.group_size < 2:
            raise ValueError(f"--group-size {options.group_size}: the best of at least 2 answers is kept.")
        return best
    if options.threshold is None or not math.isfinite(options.threshold):
        raise ValueError("--keep above needs a finite number as --threshold: answers with a higher reward are kept.")
    return partial(above, threshold=options.threshold)
