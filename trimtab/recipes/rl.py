"""`trimtab rl` and its names `rloo`, `ppo`, `grpo`, `reinforce`: prompts and a reward in, an aligned policy out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from trimtab.recipes.algorithm import (
    AlgorithmOptions,
    CriticOptions,
    KlOptions,
    check_critic,
    check_online,
    new_history,
    objective_of,
    resolve,
)
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
    from trimtab.algorithms import Algorithm
    from trimtab.batches import MixedBatch, PolicyBatch
    from trimtab.learner import Learner
    from trimtab.models import Policy, ScalarModel
    from trimtab.objectives import MixedObjective, PolicyObjective
    from trimtab.recipes.training import Items
    from trimtab.rewards import Reward
    from trimtab.rollouts import Account, History
    from trimtab.run import Run


@dataclass(frozen=True)
class PtxOptions:
    """Demonstrations mixed into the objective (Ouyang et al. 2022, PPO-ptx)."""

    ptx_data: str | None = None
    """Demonstrations to imitate beside the answers, as many a step as it has prompts."""
    ptx_coef: float = 0.0
    """Weight of their negative log-likelihood per token."""


@dataclass(frozen=True)
class Rl:
    """Rows with a prompt; other columns reach the reward."""

    model: ModelOptions
    data: DataOptions
    run: RunOptions
    reward: RewardChoice
    algorithm: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    lora: LoraOptions = LoraOptions()
    sampling: SamplingOptions = SamplingOptions()
    steps: OnlineStepOptions = field(default_factory=OnlineStepOptions)
    kl: KlOptions = field(default_factory=KlOptions)
    critic: CriticOptions = field(default_factory=CriticOptions)
    ptx: PtxOptions = PtxOptions()


def rl(config: Rl) -> None:
    """Sample, score, credit, step."""
    from trimtab.recipes import online, training
    from trimtab.rollouts import policy_batches

    algorithm, history = checked(config)
    sampler = training.sampler_of(config.sampling)
    policy, reward, prompts = online.load_parts(config, online.load_reward)
    shown = demonstrations(policy, config)
    critic = load_critic(policy, reward, config) if algorithm.critic else None
    run = online.open_run("rl", config, policy, prompts)
    reference, size = policy.reference(), config.algorithm.group_size
    beside = [*([critic] if critic else []), *online.reward_models(reward)]
    training.split_weights(run, config, policy, reference, *beside)
    learner = learner_of(policy, critic, shown, algorithm, config)
    measure = online.reward_measure(reward)
    safety = online.resume(run, learner, config, {"history": history}, prompts["train"], measure)
    batches = policy_batches(
        online.draws(prompts["train"], config, start=history.rollouts),
        online.stages_of(policy, reference, reward, config, sampler, critic=critic, exact_kl=algorithm.kl == "exact"),
        algorithm,
        history,
        group_size=size,
        seed=config.run.seed,
        watch=watcher(run, history),
    )
    updates = updates_of(batches, learner, shown, policy.trainable_parameters(), config, start=run.step)
    networks = [policy, critic] if critic else [policy]
    longest_shown = config.data.max_length if shown else 0
    online.save_memory(run, networks, prompts["train"], config, item_rows=size, length=longest_shown)
    evaluate = online.evaluation(run, measure, policy, reference, prompts.get("eval"), config, sampler)
    some = prompts.get("eval", prompts["train"])
    keep = partial(critic.save, run.directory / "critic") if critic else lambda: None
    training.train_online(run, learner, updates, evaluate, policy, some, config, safety=safety, finish=keep)


# ---- What comes in


def checked(config: Rl) -> tuple[Algorithm, History]:
    """The algorithm and an empty history, once no flag means nothing."""
    check_online(config)
    for flag, value in {"--critic": config.critic.critic, "--ptx-data": config.ptx.ptx_data}.items():
        check_outside(config.run.out, flag, value)
    algorithm = resolve(config.algorithm, config.kl)
    check_critic(config.algorithm.algorithm, config.critic, algorithm, config.steps.steps)
    check_demonstrations(config.ptx)
    answers = config.algorithm.group_size * config.algorithm.prompts_per_step
    return algorithm, new_history(algorithm, config.kl, answers)


def check_demonstrations(options: PtxOptions) -> None:
    """Refuse demonstrations without a weight, and a weight without demonstrations."""
    if not 0 <= options.ptx_coef < math.inf:
        raise ValueError(f"--ptx-coef {options.ptx_coef}: a number that is not negative is needed.")
    if (options.ptx_data is None) != (options.ptx_coef == 0):
        raise ValueError("--ptx-data and --ptx-coef belong together: give both, the weight above 0.")


def demonstrations(policy: Policy, config: Rl) -> Items | None:
    """The demonstrations of --ptx-data, if there are any."""
    from trimtab.recipes import training
    from trimtab.records import Demonstration
    from trimtab.tokens import demonstration_batch, encode

    if config.ptx.ptx_data is None:
        return None
    loaded = {"ptx": training.read(config.ptx.ptx_data, Demonstration, skip_invalid=config.data.skip_invalid)}
    encoder = partial(encode, policy.tokenizer)
    return training.encode_parts(loaded, encoder, config.data, demonstration_batch, policy.pad_id)[0]["ptx"]


def load_critic(policy: Policy, reward: Reward, config: Rl) -> ScalarModel:
    """The critic: --critic, else the one reward model there is, else the start model. It reads the policy's tokens.

    A model that has no reward head gets one of zeros, so that at first nothing is expected of any answer.
    """
    from trimtab.models import load_scalar
    from trimtab.recipes import training
    from trimtab.rewards import ModelReward
    from trimtab.weights import has_reward_head

    model = config.model
    source = config.critic.critic or (reward.name if isinstance(reward, ModelReward) else model.model)
    new_head = not has_reward_head(source, trust_remote_code=model.trust_remote_code)
    critic = load_scalar(
        source,
        new_head=new_head,
        seed=config.run.seed,
        dtype=model.dtype,
        device=model.device,
        lora_rank=config.lora.lora_rank,
        lora_alpha=config.lora.lora_alpha,
        trust_remote_code=model.trust_remote_code,
    )
    if critic.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        told = f"the critic starts from {source}, which has another vocabulary than --model {model.model}"
        raise ValueError(f"{told}. Give a --critic that reads the same tokens, such as {model.model}.")
    if new_head:
        critic.scale_by(0.0)
    training.lay_out(critic, config)
    return critic


# ---- What happens to it


def learner_of(
    policy: Policy, critic: ScalarModel | None, shown: Items | None, algorithm: Algorithm, config: Rl
) -> Learner:
    """The learner of the policy, of a critic beside it, and with demonstrations mixed in, where there are any."""
    from trimtab.critic import PolicyWithCritic
    from trimtab.objectives import MixedObjective
    from trimtab.recipes import training

    objective = objective_of(algorithm, max_new_tokens=config.sampling.max_new_tokens)
    return training.make_learner(
        PolicyWithCritic(policy, critic) if critic else policy,
        MixedObjective(objective) if shown else objective,
        config.steps,
        config.steps.steps,
        critic=(critic, config.critic.critic_lr) if critic else None,
    )


def updates_of(
    batches: Iterator[PolicyBatch],
    learner: Learner,
    shown: Items | None,
    weights: Sequence[Any],
    config: Rl,
    *,
    start: int,
) -> Iterator[PolicyBatch | MixedBatch]:
    """The batches of the steps after `start` as the learner takes them: with demonstrations, first for the critic."""
    updates, warmup = batches, config.critic.critic_warmup
    if shown:
        updates = with_demonstrations(batches, shown, cast("MixedObjective", learner.objective).policy, config, start)
    return critic_first(updates, weights, warmup, start) if warmup else updates


def with_demonstrations(
    batches: Iterator[PolicyBatch], shown: Items, objective: PolicyObjective, config: Rl, start: int
) -> Iterator[MixedBatch]:
    """Every batch with demonstrations beside it; with none as long as only the critic learns."""
    import torch

    from trimtab.objectives import mixed

    size, seed = config.algorithm.prompts_per_step, config.run.seed
    beside = shown.epochs(batch_size=size, seed=seed, steps=config.steps.steps, start=start)
    for i, (batch, some) in enumerate(zip(batches, beside, strict=False), start):
        shown_now = some if i >= config.critic.critic_warmup else some.select(torch.arange(0))
        yield mixed(batch, shown_now, objective, config.ptx.ptx_coef)


def critic_first(batches: Iterator[Any], weights: Sequence[Any], updates: int, start: int = 0) -> Iterator[Any]:
    """The batches of the updates after `start`, with the policy's weights fixed in the first `updates` of all."""
    for i, batch in enumerate(batches, start):
        # Right before the step, for an adapter that was off for the reference comes back able to learn.
        for weight in weights:
            weight.requires_grad_(i >= updates)
        yield batch


# ---- What is told


def watcher(run: Run, history: History) -> Callable[[Account], None]:
    """Looks at every rollout: writes down its figures and one prompt's answers, and says what looks unhealthy."""
    from trimtab.progress import console

    def watch(account: Account) -> None:
        run.append("rollouts.jsonl", {**told_of(account), "health": dict(history.health.seen)})
        for warning in account.warnings:
            console.print(f"[yellow]rollout {account.number}: {warning}[/yellow]")
        budget = history.budget
        if budget and budget.is_spent:
            console.print(f"KL is {budget.spent:.1f} nats an answer: the --kl-budget {budget.limit:g} is spent")
        elif budget and budget.should_warn:
            console.print(f"KL is {budget.spent:.1f} of the {budget.limit:g} nats of --kl-budget")

    return watch


def told_of(account: Account) -> dict[str, Any]:
    """The figures of a rollout and the answers to its first prompt, for rollouts.jsonl."""
    from trimtab.recipes import online

    scores = account.rollouts.scores[account.rollouts.valid]
    return {
        **online.told(account),
        "reward_std": scores.std(correction=0).item() if len(scores) else math.nan,
        "kl_coefficient": account.kl_coefficient,
        "explained_variance": account.explained_variance,
    }
