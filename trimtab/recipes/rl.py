"""`trimtab rl` and its names `rloo`, `ppo`, `grpo`, `reinforce`: prompts and a reward in, an aligned policy out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from trimtab.recipes.algorithm import (
    AlgorithmOptions,
    CriticOptions,
    KlOptions,
    check_critic,
    check_sampling,
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
    check_options,
    check_outside,
)

if TYPE_CHECKING:
    from trimtab.algorithms import Algorithm
    from trimtab.batches import DemonstrationBatch, MixedBatch, PolicyBatch
    from trimtab.models import FrozenPolicy, Policy, ScalarModel
    from trimtab.objectives import PolicyObjective
    from trimtab.records import Prompt
    from trimtab.rewards import Reward
    from trimtab.rollouts import Account, History, Stages
    from trimtab.run import Run
    from trimtab.sampling import Samples


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
    from trimtab.models import load_policy
    from trimtab.recipes import training
    from trimtab.records import Prompt
    from trimtab.rollouts import policy_batches

    algorithm, history = checked(config)
    loaded = training.read_parts(config.data, Prompt)
    reward = load_reward(config)
    policy = training.load(load_policy, config)
    policy.module.temperature = config.sampling.temperature
    prompts = {part: fitting(policy, some.records, config) for part, some in loaded.items()}
    check_prompts(prompts["train"], config)
    shown = demonstrations(policy, config)
    critic = load_critic(policy, reward, config) if algorithm.critic else None
    run = training.open_run("rl", config, policy, {part: {"prompts": len(some)} for part, some in prompts.items()})
    reference = policy.reference()
    training.split_weights(run, config, policy, reference, *([critic] if critic else []))
    stages = stages_of(policy, reference, reward, critic, algorithm, config)
    watch = watcher(run, history)
    batches = policy_batches(
        draws(prompts["train"], config),
        stages,
        algorithm,
        history,
        group_size=config.algorithm.group_size,
        seed=config.run.seed,
        watch=watch,
    )
    learner, updates = learning(policy, critic, shown, batches, algorithm, config)
    save_memory(run, policy, critic, prompts["train"], config)
    evaluate = evaluation(run, stages, policy, reference, prompts["eval"], config) if "eval" in prompts else None
    training.train_online(run, learner, updates, evaluate, policy, prompts.get("eval", prompts["train"]), config)
    if critic:
        critic.save(run.directory / "critic")


# ---- What comes in


def checked(config: Rl) -> tuple[Algorithm, History]:
    """The algorithm and an empty history, once no flag means nothing."""
    check_options(config)
    given = {"--critic": config.critic.critic, "--ptx-data": config.ptx.ptx_data}
    for flag, value in [*given.items(), *(("--reward", name) for name in config.reward.reward)]:
        check_outside(config.run.out, flag, value)
    check_sampling(config.sampling)
    algorithm = resolve(config.algorithm, config.kl)
    check_critic(config.algorithm.algorithm, config.critic, algorithm, config.steps.steps)
    check_demonstrations(config.ptx)
    if config.data.overlong not in ("error", "drop"):
        raise ValueError(f"--overlong {config.data.overlong}: prompts are never cut here; give error or drop.")
    answers = config.algorithm.group_size * config.algorithm.prompts_per_step
    return algorithm, new_history(algorithm, config.kl, answers)


def check_demonstrations(options: PtxOptions) -> None:
    """Refuse demonstrations without a weight, and a weight without demonstrations."""
    if not 0 <= options.ptx_coef < math.inf:
        raise ValueError(f"--ptx-coef {options.ptx_coef}: a number that is not negative is needed.")
    if (options.ptx_data is None) != (options.ptx_coef == 0):
        raise ValueError("--ptx-data and --ptx-coef belong together: give both, the weight above 0.")


def check_prompts(prompts: Sequence[Prompt], config: Rl) -> None:
    """Refuse a rollout of more prompts than there are."""
    wanted = config.algorithm.prompts_per_step
    if len(prompts) < wanted:
        raise ValueError(f"--prompts-per-step {wanted}: --data has {len(prompts)} prompts that can be used.")


def load_reward(config: Rl) -> Reward:
    """The reward of all --reward flags together."""
    from trimtab.recipes import training
    from trimtab.rewards import parse_rewards

    options = {**training.scoring(config.model), "max_length": config.data.max_length}
    return parse_rewards(config.reward.reward, config.reward.reward_weights, **options)


def fitting(policy: Policy, prompts: Sequence[Prompt], config: Rl) -> list[Prompt]:
    """The prompts that leave room for an answer; others are an error, or dropped and counted."""
    from trimtab.progress import console

    room = config.data.max_length - config.sampling.max_new_tokens
    kept = [prompt for prompt, length in zip(prompts, prompt_lengths(policy, prompts), strict=True) if length <= room]
    if len(kept) < len(prompts):
        told = f"{len(prompts) - len(kept)} of {len(prompts)} prompts are longer than {room} tokens (--max-length"
        told += f" {config.data.max_length} minus --max-new-tokens {config.sampling.max_new_tokens})"
        if config.data.overlong != "drop":
            raise ValueError(f"{told}. Raise --max-length, or leave them out with --overlong drop.")
        console.print(f"{told}: dropped")
    return kept


def prompt_lengths(policy: Policy, prompts: Sequence[Prompt]) -> list[int]:
    """Tokens of each prompt."""
    from trimtab.tokens import encode_prompts

    return [len(ids) for ids in encode_prompts(policy.tokenizer, prompts)]


def demonstrations(policy: Policy, config: Rl) -> Iterator[DemonstrationBatch] | None:
    """As many demonstrations a step as it has prompts, if there are any."""
    from trimtab.recipes import training
    from trimtab.records import Demonstration
    from trimtab.tokens import demonstration_batch, encode

    if config.ptx.ptx_data is None:
        return None
    loaded = {"ptx": training.read(config.ptx.ptx_data, Demonstration, skip_invalid=config.data.skip_invalid)}
    encoder = partial(encode, policy.tokenizer)
    items, _ = training.encode_parts(loaded, encoder, config.data, demonstration_batch, policy.pad_id)
    size = config.algorithm.prompts_per_step
    return items["ptx"].epochs(batch_size=size, seed=config.run.seed, steps=config.steps.steps)


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


def draws(prompts: Sequence[Prompt], config: Rl) -> Iterator[list[Prompt]]:
    """The prompts of each rollout: epoch after epoch, each in its own order."""
    from trimtab.batches import batch_indices

    size = config.algorithm.prompts_per_step
    # There are at most as many rollouts as steps.
    for index in batch_indices(len(prompts), size, seed=config.run.seed, steps=config.steps.steps):
        yield [prompts[i] for i in index]


# ---- What happens to it


def stages_of(
    policy: Policy,
    reference: FrozenPolicy,
    reward: Reward,
    critic: ScalarModel | None,
    algorithm: Algorithm,
    config: Rl,
) -> Stages:
    """What a rollout passes through."""
    from trimtab.critic import values_before
    from trimtab.rollouts import Stages
    from trimtab.sampling import sample

    settings, group_size = asdict(config.sampling), config.algorithm.group_size

    def draw(prompts: Sequence[Prompt], n: int, *, step: int) -> Samples:
        return sample(policy, prompts, n, seed=config.run.seed, step=step, **settings)

    def greedy(prompts: Sequence[Prompt]) -> Samples:
        return sample(policy, prompts, **{**settings, "temperature": 0.0})

    return Stages(
        draw=draw,
        greedy=greedy,
        reward=reward,
        reference=reference.logprobs,
        policy=policy.logprobs,
        critic=partial(values_before, critic) if critic else None,
        exact_kl=partial(policy.kl, reference=reference) if algorithm.kl == "exact" else None,
        max_rows=max(1, config.steps.micro_batch_rows // group_size) * group_size,  # whole groups share a prompt
    )


def learning(
    policy: Policy,
    critic: ScalarModel | None,
    shown: Iterator[DemonstrationBatch] | None,
    batches: Iterator[PolicyBatch],
    algorithm: Algorithm,
    config: Rl,
) -> tuple[Any, Iterator[PolicyBatch | MixedBatch]]:
    """The learner, and the batches as it takes them: with demonstrations, and at first for the critic alone."""
    from trimtab.critic import PolicyWithCritic
    from trimtab.objectives import MixedObjective
    from trimtab.recipes import training

    objective = objective_of(algorithm, max_new_tokens=config.sampling.max_new_tokens)
    model = PolicyWithCritic(policy, critic) if critic else policy
    weights, warmup = policy.trainable_parameters(), config.critic.critic_warmup
    updates = batches if shown is None else with_demonstrations(batches, shown, objective, config)
    learner = training.make_learner(
        model,
        objective if shown is None else MixedObjective(objective),
        config.steps,
        config.steps.steps,
        critic=(critic, config.critic.critic_lr) if critic else None,
    )
    return learner, critic_first(updates, weights, warmup) if warmup else updates


def with_demonstrations(
    batches: Iterator[PolicyBatch], shown: Iterator[DemonstrationBatch], objective: PolicyObjective, config: Rl
) -> Iterator[MixedBatch]:
    """Every batch with demonstrations beside it; with none as long as only the critic learns."""
    import torch

    from trimtab.objectives import mixed

    for i, (batch, some) in enumerate(zip(batches, shown, strict=False)):
        shown_now = some if i >= config.critic.critic_warmup else some.select(torch.arange(0))
        yield mixed(batch, shown_now, objective, config.ptx.ptx_coef)


def critic_first(batches: Iterator[Any], weights: Sequence[Any], updates: int) -> Iterator[Any]:
    """The batches, with the policy's weights fixed in the first `updates` of them."""
    for i, batch in enumerate(batches):
        # Right before the step, for an adapter that was off for the reference comes back able to learn.
        for weight in weights:
            weight.requires_grad_(i >= updates)
        yield batch


def save_memory(run: Run, policy: Policy, critic: ScalarModel | None, prompts: Sequence[Prompt], config: Rl) -> None:
    """Gradient checkpointing for what the longest answers to the longest prompts need."""
    from trimtab.recipes import training

    rows = max(config.steps.micro_batch_rows, config.algorithm.group_size)
    length = max(prompt_lengths(policy, prompts)) + config.sampling.max_new_tokens
    length = length if config.ptx.ptx_data is None else max(length, config.data.max_length)
    models = [policy, critic] if critic else [policy]
    training.save_memory(run, models, config.steps.gradient_checkpointing, rows, length)


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
    rollouts, scored = account.rollouts, account.scored
    scores = rollouts.scores[rollouts.valid]
    answers = []
    for i in range(scored.samples.n):
        parts = {name: values[i] for name, values in scored.parts.items()}
        answer = {"text": scored.samples.texts[i], "reward": scored.rewards[i]}
        answers.append({**answer, **({"parts": parts} if parts else {})})
    return {
        "rollout": account.number,
        "reward": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "kl": rollouts.mean_kl,
        "kl_coefficient": account.kl_coefficient,
        "explained_variance": account.explained_variance,
        "seconds": dict(account.seconds),
        "prompt": scored.samples.prompts[0].text,
        "answers": answers,
    }


EVALUATION_ANSWERS = 2


def evaluation(
    run: Run, stages: Stages, policy: Policy, reference: FrozenPolicy, prompts: Sequence[Prompt], config: Rl
) -> Callable[[int], Mapping[str, float]]:
    """Reward, exact KL and length on held-out prompts, always by the same uniform numbers.

    With --eval-every, the policy with the best reward so far is kept as checkpoints/best.
    """
    from trimtab.evals.drift import drift
    from trimtab.evals.intervals import bootstrap_mean
    from trimtab.progress import console
    from trimtab.rollouts import score
    from trimtab.sampling import sample

    best = -math.inf

    def evaluate(step: int) -> Mapping[str, float]:
        nonlocal best
        samples = sample(policy, prompts, EVALUATION_ANSWERS, seed=config.run.seed, **asdict(config.sampling))
        mean = bootstrap_mean(prompt_means(score(stages.reward, samples).rewards, samples.n), config.run.seed)
        moved = drift(policy, reference, samples, batch_rows=config.steps.micro_batch_rows)
        figures = {"reward": mean.value, "reward_low": mean.low, "reward_high": mean.high}
        figures |= {"kl": moved.kl.value, "length": moved.length.value, "unfinished": moved.unfinished.value}
        console.print(f"held out, step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if step and config.run.eval_every and mean.value > best:
            best = mean.value
            run.checkpoint(policy.save, "best")
        return figures

    return evaluate


def prompt_means(scores: Sequence[float | None], n: int) -> list[float]:
    """The mean score of each prompt's answers; answers and prompts without a score are left out."""
    groups = ([score for score in scores[i : i + n] if score is not None] for i in range(0, len(scores), n))
    return [sum(group) / len(group) for group in groups if group]
