"""`trimtab online-dpo`: prompts and a reward or a judge in; DPO on pairs of the policy's own fresh answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from trimtab.recipes.algorithm import check_online
from trimtab.recipes.options import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    OnlineStepOptions,
    RewardChoice,
    RunOptions,
    SamplingOptions,
    check_outside,
)

if TYPE_CHECKING:
    from trimtab.objectives import PreferenceObjective
    from trimtab.rewards import Reward


@dataclass(frozen=True)
class JudgeChoice:
    """Who else says which answer is better."""

    judge: str | None = None
    """Instead of --reward: reward:R (any --reward), rule:NAME, py:package.module:function, llm:URL#MODEL, or
    labels:FILE."""


@dataclass(frozen=True)
class PairOptions:
    """The pairs of a step, and the loss on them."""

    group_size: int = 2
    """Answers to each prompt; of more than two, the best stands against the worst."""
    prompts_per_step: int = 8
    """Prompts of each step; each gives a pair, unless its answers are equally good."""
    loss: str = "dpo"
    """A loss of docs/methods/preference_losses.md, or a weighted sum such as dpo+0.2*preferred_ft."""
    loss_args: tuple[str, ...] = ()
    """Hyperparameters of the loss by their paper's symbols, such as beta=0.1."""
    unfinished_score: float | None = None
    """The score of every answer that was cut at --max-new-tokens, whatever its reward."""


@dataclass(frozen=True)
class OnlineDpo:
    """Rows with a prompt; other columns reach the reward or the judge."""

    model: ModelOptions
    data: DataOptions
    run: RunOptions
    reward: RewardChoice = field(default_factory=lambda: RewardChoice(()))
    judge: JudgeChoice = JudgeChoice()
    algorithm: PairOptions = PairOptions()
    lora: LoraOptions = LoraOptions()
    sampling: SamplingOptions = SamplingOptions()
    steps: OnlineStepOptions = field(default_factory=OnlineStepOptions)


def online_dpo(config: OnlineDpo) -> None:
    """Sample, judge, step."""
    from trimtab.recipes.fresh import learn_from_fresh
    from trimtab.selection import best_and_worst, chosen_pairs

    objective = checked(config)
    collect = partial(chosen_pairs, with_reference=objective.reads_reference)
    learn_from_fresh("online-dpo", config, load_source, objective, best_and_worst, collect)


def checked(config: OnlineDpo) -> PreferenceObjective:
    """The objective, once no flag means nothing."""
    from trimtab.losses.arguments import combine
    from trimtab.losses.preference import ALL_LOSSES
    from trimtab.objectives import PreferenceObjective

    check_online(config)
    check_source(config)
    if config.algorithm.group_size < 2:
        raise ValueError(f"--group-size {config.algorithm.group_size}: a pair needs at least 2 answers.")
    return PreferenceObjective(combine(ALL_LOSSES, config.algorithm.loss, config.algorithm.loss_args))


def check_source(config: OnlineDpo) -> None:
    """Refuse two sources of preferences or none, and what a judge cannot use."""
    source, judge, options = config.reward, config.judge.judge, config.algorithm
    if bool(source.reward) == (judge is not None):
        raise ValueError("--reward and --judge: give one of them, for one must say which answer is better.")
    if judge is None:
        return
    check_outside(config.run.out, "--judge", judge.removeprefix("reward:").removeprefix("labels:"))
    if source.reward_weights:
        raise ValueError("--reward-weights has no effect without --reward.")
    if options.group_size != 2:
        raise ValueError(
            f"--group-size {options.group_size}: a judge compares two answers. Leave it, or give --reward."
        )
    if options.unfinished_score is not None:
        raise ValueError("--unfinished-score has no effect with --judge, which gives no scores.")


def load_source(config: OnlineDpo) -> Reward:
    """The reward of all --reward flags together, or the judge as a reward of answers that stand in twos."""
    from trimtab.judges import JudgedReward, parse_judge
    from trimtab.recipes import online

    if config.judge.judge is None:
        return online.load_reward(config)
    return JudgedReward(parse_judge(config.judge.judge, **online.reward_options(config)))
