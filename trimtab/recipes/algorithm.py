"""From flags to an `Algorithm` and its objective: what every command of online RL asks of one, checked by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from trimtab.recipes.options import SamplingOptions, check_options, check_outside

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trimtab.algorithms import Algorithm
    from trimtab.objectives import PolicyObjective
    from trimtab.rollouts import History


@dataclass(frozen=True)
class AlgorithmOptions:
    """A row of the table of algorithms, and what to change in it."""

    algorithm: str = "rloo"
    """A row of docs/methods/policy_gradient.md."""
    group_size: int = 4
    """Answers to each prompt."""
    prompts_per_step: int = 8
    """Prompts of each rollout."""
    epochs_per_rollout: int | None = None
    """Passes over the answers of a rollout; the algorithm's own unless given."""
    minibatches: int | None = None
    """Updates in each pass; the algorithm's own unless given."""
    advantage: str | None = None
    """Another advantage than the algorithm's, such as ema for reinforce."""
    advantage_args: tuple[str, ...] = ()
    """Hyperparameters of the advantage, such as lam=0.9."""
    loss: str | None = None
    """Another policy loss than the algorithm's: reinforce, ppo_clip, gspo, cispo."""
    loss_args: tuple[str, ...] = ()
    """Hyperparameters of the policy loss, such as epsilon=0.1."""
    score_shape: str | None = None
    """What is done to scores with their history: raw, normalized, scaled; the algorithm's own unless given."""
    score_args: tuple[str, ...] = ()
    """Hyperparameters of that, such as clip=5."""
    unfinished_score: float | None = None
    """The score of every answer that was cut at --max-new-tokens, whatever its reward."""


@dataclass(frozen=True)
class KlOptions:
    """What distance from the reference costs, and how far the policy may go."""

    kl_coef: float | None = None
    """Price of KL, reward (or loss) units per nat; the algorithm's own unless given."""
    kl_in: Literal["reward", "loss"] | None = None
    """Take the price out of the reward, or add it to the loss; the algorithm's own unless given."""
    kl: str | None = None
    """Estimator: k1, k2, k3 or exact (over the vocabulary) in the reward; k1, k2, k3, k3_weighted in the loss."""
    kl_target: float | None = None
    """Let the price move until KL is so many nats per answer (Ziegler et al. 2019)."""
    kl_horizon: float = 10_000
    """Answers over which that price adapts; smaller is faster."""
    kl_budget: float | None = None
    """Stop when KL reaches so many nats per answer; warns at 80 %."""


@dataclass(frozen=True)
class CriticOptions:
    """The critic of an algorithm that has one."""

    critic: str | None = None
    """Reward model to start from; --reward if that is one model, else the policy's start under a head of zeros."""
    critic_lr: float = 1e-5
    """Learning rate of the critic."""
    critic_warmup: int = 0
    """Updates at the start in which only the critic learns."""


def resolve(options: AlgorithmOptions, kl: KlOptions) -> Algorithm:
    """The algorithm's row with what the flags change. ValueError, naming the flag, for what means nothing."""
    from trimtab.advantages import ADVANTAGES, SCORE_SHAPES
    from trimtab.algorithms import ALGORITHMS
    from trimtab.losses.arguments import check_name
    from trimtab.losses.policy import POLICY_LOSSES

    check_name(options.algorithm, ALGORITHMS, kind="algorithm")
    row = ALGORITHMS[options.algorithm]
    row = replace(
        row,
        **replaced(row, "advantage", options.advantage, options.advantage_args, ADVANTAGES),
        **replaced(row, "loss", options.loss, options.loss_args, POLICY_LOSSES),
        **replaced(row, "score_shape", options.score_shape, options.score_args, SCORE_SHAPES, prefix="score"),
    )
    changes = {
        "kl_coefficient": kl.kl_coef,
        "kl_in": kl.kl_in,
        "kl": kl.kl,
        "epochs": options.epochs_per_rollout,
        "minibatches": options.minibatches,
        "unfinished_score": options.unfinished_score,
    }
    row = replace(row, **{name: value for name, value in changes.items() if value is not None})
    check_sizes(options, row)
    check_parts(options.algorithm, row)
    check_kl(row, kl)
    return row


def replaced(
    row: Algorithm,
    name: str,
    other: str | None,
    given: tuple[str, ...],
    registry: Mapping[str, Callable[..., object]],
    prefix: str = "",
) -> dict[str, object]:
    """One named part of a row and its arguments, as the flags say; another part starts from its own defaults."""
    from trimtab.losses.arguments import check_arguments, check_name, parse_arguments

    field = f"{prefix or name}_arguments"
    chosen = getattr(row, name) if other is None else other
    check_name(chosen, registry, kind=name.replace("_", " "))
    own = parse_arguments(getattr(row, field)) if chosen == getattr(row, name) else {}
    arguments = {**own, **parse_arguments(given)}
    check_arguments(registry[chosen], arguments)
    return {name: chosen, field: tuple(f"{key}={value}" for key, value in arguments.items())}


# ---- What is refused


def check_online(config: Any) -> None:
    """Refuse what no command can use that learns from the policy's own answers, by name, before anything is read."""
    check_options(config)
    for name in config.reward.reward:
        check_outside(config.run.out, "--reward", name)
    check_sampling(config.sampling)
    options = config.algorithm
    check_at_least_one({"--group-size": options.group_size, "--prompts-per-step": options.prompts_per_step})
    if options.unfinished_score is not None and not math.isfinite(options.unfinished_score):
        raise ValueError(f"--unfinished-score {options.unfinished_score}: a finite number is needed.")
    if config.data.overlong not in ("error", "drop"):
        raise ValueError(f"--overlong {config.data.overlong}: prompts are never cut here; give error or drop.")


def check_at_least_one(given: Mapping[str, int]) -> None:
    """Refuse flags that count something and leave nothing."""
    for flag, value in given.items():
        if value < 1:
            raise ValueError(f"{flag} {value}: at least 1 is needed.")


def check_sizes(options: AlgorithmOptions, row: Algorithm) -> None:
    """Refuse numbers of answers and updates with which the algorithm means nothing."""
    from trimtab.advantages import COMPARING
    from trimtab.losses.policy import RATIO_FREE

    check_at_least_one({"--epochs-per-rollout": row.epochs, "--minibatches": row.minibatches})
    name, answers = options.algorithm, options.group_size * options.prompts_per_step
    if row.advantage in COMPARING and options.group_size < 2:
        raise ValueError(f"{name} compares answers to one prompt: --group-size {options.group_size} must be 2 or more.")
    if row.advantage == "batch_centred" and answers < 2:
        raise ValueError(f"{name} compares the answers of a step: give --group-size or --prompts-per-step above 1.")
    if row.minibatches > options.prompts_per_step:
        raise ValueError(
            f"--minibatches {row.minibatches}: a minibatch holds all answers to its prompts, and {name} has "
            f"--prompts-per-step {options.prompts_per_step}. Give more prompts, or fewer minibatches."
        )
    if row.loss in RATIO_FREE and row.updates > 1:
        raise ValueError(
            f"the loss {row.loss} has no ratio, so each answer is good for one update: "
            "leave --epochs-per-rollout and --minibatches at 1, or give --loss ppo_clip."
        )


def check_parts(name: str, row: Algorithm) -> None:
    """Refuse an advantage that does not go with the algorithm's critic or its absence."""
    if (row.advantage == "gae") != row.critic:
        told = "has a critic, which only gae reads" if row.critic else "has no critic, which gae needs (as ppo has)"
        raise ValueError(f"--advantage {row.advantage}: {name} {told}.")


def check_kl(row: Algorithm, options: KlOptions) -> None:
    """Refuse KL flags that contradict each other or have no effect."""
    from trimtab.kl import KL_ESTIMATORS, KL_LOSSES

    allowed = (*KL_ESTIMATORS, "exact") if row.kl_in == "reward" else tuple(KL_LOSSES)
    if row.kl not in allowed:
        raise ValueError(f"--kl {row.kl}: with --kl-in {row.kl_in} allowed are {', '.join(allowed)}.")
    if not 0 <= row.kl_coefficient < math.inf:
        raise ValueError(f"--kl-coef {row.kl_coefficient}: a number that is not negative is needed.")
    if not row.kl_coefficient and (options.kl or options.kl_in):
        raise ValueError("--kl and --kl-in have no effect where KL has no price: give --kl-coef a number above 0.")
    if options.kl_target is None and options.kl_horizon != KlOptions().kl_horizon:
        raise ValueError(f"--kl-horizon {options.kl_horizon:g} has no effect without --kl-target.")
    if options.kl_target is not None and not row.kl_coefficient:
        raise ValueError(f"--kl-target {options.kl_target:g} moves a price: give the first one as --kl-coef, above 0.")
    if options.kl_target is not None and row.kl_in == "loss":
        raise ValueError("--kl-target moves the price of KL in the reward: add --kl-in reward.")


def check_critic(name: str, options: CriticOptions, row: Algorithm, steps: int) -> None:
    """Refuse critic flags for an algorithm without a critic, and a warm-up that leaves nothing for the policy."""
    if options != CriticOptions() and not row.critic:
        raise ValueError(f"{name} has no critic, so --critic, --critic-lr and --critic-warmup do nothing.")
    if not 0 <= options.critic_lr < math.inf:
        raise ValueError(f"--critic-lr {options.critic_lr}: a number that is not negative is needed.")
    if not 0 <= options.critic_warmup < steps:
        told = f"--critic-warmup {options.critic_warmup} of --steps {steps}"
        raise ValueError(f"{told}: a number from 0 that leaves the policy a step is needed.")


FREE_SAMPLING = {"max_new_tokens", "temperature", "batch_rows", "stop", "sampler"}
"""What may be set about the sampling of answers that the policy learns from."""


def check_sampling(options: SamplingOptions) -> None:
    """Refuse to learn from answers of another distribution than the policy's own, at any temperature above 0.

    Log-probabilities of a cut or penalized distribution would make ratios and KL those of another policy; leaving them
    as they are would bias the gradient.
    """
    for entry in fields(options):
        value = getattr(options, entry.name)
        if entry.name not in FREE_SAMPLING and value != entry.default:
            flag = entry.name.replace("_", "-")
            raise ValueError(f"--{flag} {value}: online RL learns from the policy's own distribution; leave it out.")
    if not 0 < options.temperature < math.inf:
        raise ValueError(f"--temperature {options.temperature}: online RL explores, and needs a number above 0.")
    check_at_least_one({"--max-new-tokens": options.max_new_tokens, "--batch-rows": options.batch_rows})


# ---- What comes out


def new_history(row: Algorithm, options: KlOptions, answers: int) -> History:
    """What a run remembers, at its start. ValueError for a target, horizon or budget that means nothing."""
    from trimtab.kl import AdaptiveCoefficient, FixedCoefficient, KlBudget
    from trimtab.rollouts import History

    coefficient = FixedCoefficient(row.kl_coefficient)
    if options.kl_target is not None:
        coefficient = AdaptiveCoefficient(row.kl_coefficient, options.kl_target, options.kl_horizon)
        coefficient.update(options.kl_target, answers)  # a horizon that is too short for a rollout is told now
    return History(coefficient, budget=None if options.kl_budget is None else KlBudget(options.kl_budget))


def objective_of(row: Algorithm, *, max_new_tokens: int) -> PolicyObjective:
    """The objective that a row names."""
    from functools import partial

    from trimtab.batches import mean_over
    from trimtab.kl import KL_LOSSES
    from trimtab.losses.arguments import check_arguments, defaults, parse_arguments
    from trimtab.losses.policy import POLICY_LOSSES, sequence_ratio, token_ratio
    from trimtab.losses.value import VALUE_LOSSES
    from trimtab.objectives import PolicyObjective

    function = POLICY_LOSSES[row.loss]
    settings = check_arguments(function, parse_arguments(row.loss_arguments))
    every = {**defaults(function), **settings}
    prices_loss = row.kl_in == "loss" and row.kl_coefficient > 0
    return PolicyObjective(
        policy_loss=partial(function, **settings),
        average=partial(mean_over, row.mean_over, length=max_new_tokens),
        fresh=row.updates == 1,
        kl_loss=KL_LOSSES[row.kl] if prices_loss else None,
        kl_coefficient=row.kl_coefficient if prices_loss else 0.0,
        value_loss=VALUE_LOSSES[row.value_loss] if row.critic else None,
        ratio=sequence_ratio if row.loss == "gspo" else token_ratio,
        clip={name: every[name] for name in ("epsilon", "epsilon_high")} if "epsilon" in every else None,
    )
