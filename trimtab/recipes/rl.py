"""`trimtab rl` and its names `rloo`, `ppo`, `grpo`, `reinforce`: prompts and a reward in, an aligned policy out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from trimtab.recipes.options import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    OnlineStepOptions,
    RewardChoice,
    RunOptions,
    SamplingOptions,
    check_options,
)

if TYPE_CHECKING:
    from trimtab.algorithms import Algorithm
    from trimtab.batches import Rollouts
    from trimtab.learner import Learner
    from trimtab.models import FrozenPolicy, Policy, ScalarModel
    from trimtab.objectives import PolicyObjective
    from trimtab.records import Prompt
    from trimtab.rewards import Reward
    from trimtab.rollouts import History, Stages
    from trimtab.run import Run
    from trimtab.sampling import Samples


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
    """Reward model to start from; --reward if that is one model, else the policy under a new head."""
    critic_lr: float = 1e-5
    """Learning rate of the critic."""
    critic_warmup: int = 0
    """Updates at the start in which only the critic learns."""


@dataclass(frozen=True)
class Rl:
    """Rows with a prompt; other columns reach the reward."""

    model: ModelOptions
    data: DataOptions
    run: RunOptions
    reward: RewardChoice
    algorithm: str = "rloo"
    """A row of docs/methods/policy_gradient.md."""
    group_size: int = 4
    """Answers to each prompt."""
    prompts_per_step: int = 8
    """Prompts of each rollout."""
    lora: LoraOptions = LoraOptions()
    sampling: SamplingOptions = SamplingOptions()
    steps: OnlineStepOptions = field(default_factory=OnlineStepOptions)
    kl: KlOptions = KlOptions()
    critic: CriticOptions = CriticOptions()
    epochs_per_rollout: int | None = None
    """Passes over the answers of a rollout; the algorithm's own unless given."""
    minibatches: int | None = None
    """Updates in each pass; the algorithm's own unless given."""
    loss_args: tuple[str, ...] = ()
    """Hyperparameters of the policy loss, such as epsilon=0.2."""
    advantage_args: tuple[str, ...] = ()
    """Hyperparameters of the advantage, such as lam=0.95."""
    unfinished_score: float | None = None
    """The score of every answer that was cut at --max-new-tokens, whatever its reward."""


def rl(config: Rl) -> None:
    """Sample, score, credit, step."""
    from trimtab.models import load_policy
    from trimtab.recipes import training
    from trimtab.records import Prompt
    from trimtab.rollouts import policy_batches

    check_options(config)
    algorithm = resolved(config)
    loaded = training.read_parts(config.data, Prompt)
    reward = load_reward(config)
    policy = training.load(load_policy, config)
    prompts = {part: fitting(policy, some.records, config) for part, some in loaded.items()}
    if len(prompts["train"]) < config.prompts_per_step:
        raise ValueError(f"--prompts-per-step {config.prompts_per_step}: --data has {len(prompts['train'])} prompts.")
    run = training.open_run("rl", config, policy, {part: {"prompts": len(some)} for part, some in prompts.items()})
    reference = policy.reference()
    critic = load_critic(policy, reward, config) if algorithm.critic else None
    history = new_history(algorithm, config)
    batches = policy_batches(
        draws(prompts["train"], config),
        stages_of(policy, reference, reward, critic, algorithm, config),
        algorithm,
        history,
        group_size=config.group_size,
        seed=config.run.seed,
        unfinished_score=config.unfinished_score,
        watch=watcher(run, history),
    )
    learner = make_learner(policy, critic, algorithm, config)
    evaluate = evaluation(run, policy, reference, reward, prompts["eval"], config) if "eval" in prompts else None
    shown = prompts.get("eval", prompts["train"])
    training.train_online(run, learner, warmed_up(batches, config), evaluate, policy, shown, config)


def resolved(config: Rl) -> Algorithm:
    """The algorithm's row with what the flags change, checked by name before anything is loaded."""
    from trimtab.advantages import ADVANTAGES
    from trimtab.algorithms import ALGORITHMS
    from trimtab.losses.arguments import check_arguments, check_name, parse_arguments
    from trimtab.losses.policy import POLICY_LOSSES
    from trimtab.rollouts import check_algorithm

    check_name(config.algorithm, ALGORITHMS, kind="algorithm")
    row = ALGORITHMS[config.algorithm]
    given = {
        "kl_coefficient": config.kl.kl_coef,
        "kl_in": config.kl.kl_in,
        "kl": config.kl.kl,
        "epochs": config.epochs_per_rollout,
        "minibatches": config.minibatches,
        "loss_arguments": (*row.loss_arguments, *config.loss_args) or None,
        "advantage_arguments": (*row.advantage_arguments, *config.advantage_args) or None,
    }
    row = replace(row, **{name: value for name, value in given.items() if value is not None})
    check_arguments(POLICY_LOSSES[row.loss], parse_arguments(row.loss_arguments))
    check_arguments(ADVANTAGES[row.advantage], parse_arguments(row.advantage_arguments))
    check_kl_options(row, config.kl)
    check_algorithm(config.algorithm, row, group_size=config.group_size, prompts_per_step=config.prompts_per_step)
    check_critic_options(config, row)
    return row


def check_kl_options(row: Algorithm, options: KlOptions) -> None:
    """Refuse KL flags that contradict each other or have no effect."""
    from trimtab.kl import KL_ESTIMATORS, KL_LOSSES

    allowed = (*KL_ESTIMATORS, "exact") if row.kl_in == "reward" else tuple(KL_LOSSES)
    if row.kl not in allowed:
        raise ValueError(f"--kl {row.kl}: with --kl-in {row.kl_in} allowed are {', '.join(allowed)}.")
    if row.kl_coefficient < 0:
        raise ValueError(f"--kl-coef {row.kl_coefficient}: a number that is not negative is needed.")
    if options.kl_target is not None and not (options.kl_target > 0 and row.kl_coefficient > 0):
        raise ValueError(f"--kl-target {options.kl_target}: it needs a target and a first --kl-coef above 0.")
    if options.kl_target is not None and row.kl_in == "loss":
        raise ValueError("--kl-target moves the price of KL in the reward: add --kl-in reward.")
    if options.kl_target is None and options.kl_horizon != KlOptions().kl_horizon:
        raise ValueError(f"--kl-horizon {options.kl_horizon:g} has no effect without --kl-target.")


def check_critic_options(config: Rl, row: Algorithm) -> None:
    """Refuse critic flags for an algorithm without a critic."""
    given = config.critic != CriticOptions()
    if given and not row.critic:
        raise ValueError(f"{config.algorithm} has no critic, so --critic, --critic-lr and --critic-warmup do nothing.")


def load_reward(config: Rl) -> Reward:
    """The reward of all --reward flags together."""
    from trimtab.recipes import training
    from trimtab.rewards import parse_rewards

    options = {**training.scoring(config.model), "max_length": config.data.max_length}
    return parse_rewards(config.reward.reward, config.reward.reward_weights, **options)


def fitting(policy: Policy, prompts: Sequence[Prompt], config: Rl) -> list[Prompt]:
    """The prompts that leave room for an answer; others are an error, or dropped and counted."""
    from trimtab.progress import console
    from trimtab.tokens import encode_prompts

    room = config.data.max_length - config.sampling.max_new_tokens
    lengths = [len(ids) for ids in encode_prompts(policy.tokenizer, prompts)]
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= room]
    if len(kept) < len(prompts):
        told = f"{len(prompts) - len(kept)} of {len(prompts)} prompts are longer than {room} tokens (--max-length"
        told += f" {config.data.max_length} minus --max-new-tokens {config.sampling.max_new_tokens})"
        if config.data.overlong != "drop":
            raise ValueError(f"{told}. Raise --max-length, or leave them out with --overlong drop.")
        console.print(f"{told}: dropped")
    return kept


def load_critic(policy: Policy, reward: Reward, config: Rl) -> ScalarModel:
    """The critic: a reward model, or the start model under a new head. It reads the policy's tokens."""
    from trimtab.models import load_scalar

    model, source = config.model, critic_source(reward, config)
    options = {"dtype": model.dtype, "device": model.device, "trust_remote_code": model.trust_remote_code}
    critic = load_scalar(source or model.model, new_head=source is None, seed=config.run.seed, **options)
    if critic.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(f"--critic {source} has another vocabulary than --model {model.model}.")
    critic.body.arrangement = policy.body.arrangement and critic.body.arrangement
    return critic


def critic_source(reward: Reward, config: Rl) -> str | None:
    """What the critic starts from: --critic, else the one reward model there is."""
    from trimtab.rewards import ModelReward

    if config.critic.critic:
        return config.critic.critic
    return reward.name if isinstance(reward, ModelReward) else None


def new_history(algorithm: Algorithm, config: Rl) -> History:
    """What the run remembers, at its start."""
    from trimtab.kl import AdaptiveCoefficient, FixedCoefficient, KlBudget
    from trimtab.rollouts import History

    price, kl = algorithm.kl_coefficient, config.kl
    coefficient = (
        FixedCoefficient(price) if kl.kl_target is None else AdaptiveCoefficient(price, kl.kl_target, kl.kl_horizon)
    )
    return History(coefficient, budget=None if kl.kl_budget is None else KlBudget(kl.kl_budget))


def draws(prompts: Sequence[Prompt], config: Rl) -> Iterator[list[Prompt]]:
    """The prompts of each rollout: epoch after epoch, each in its own order."""
    from trimtab.batches import batch_indices

    # More rollouts than steps are never asked for.
    for index in batch_indices(len(prompts), config.prompts_per_step, seed=config.run.seed, steps=config.steps.steps):
        yield [prompts[i] for i in index]


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
    from trimtab.rollouts import GREEDY, Stages
    from trimtab.sampling import sample

    settings = asdict(config.sampling)

    def draw(prompts: Sequence[Prompt], n: int, *, seed: int) -> Samples:
        if seed == GREEDY:
            return sample(policy, prompts, n, **{**settings, "temperature": 0.0, "top_k": 0, "top_p": 1.0})
        return sample(policy, prompts, n, seed=seed, **settings)

    return Stages(
        draw=draw,
        reward=reward,
        reference=reference.logprobs,
        policy=policy.logprobs,
        critic=partial(values_before, critic) if critic else None,
        max_rows=config.steps.micro_batch_rows,
        exact_kl=partial(policy.kl, reference=reference) if algorithm.kl == "exact" else None,
    )


def make_learner(policy: Policy, critic: ScalarModel | None, algorithm: Algorithm, config: Rl) -> Learner:
    """The learner of policy and critic, which learn at their own rates."""
    from trimtab.critic import ActorCritic
    from trimtab.recipes import training

    objective = objective_of(algorithm, config)
    model = ActorCritic(policy, critic) if critic else policy
    learned = (critic, config.critic.critic_lr) if critic else None
    return training.make_learner(model, objective, config.steps, config.steps.steps, critic=learned)


def objective_of(algorithm: Algorithm, config: Rl) -> PolicyObjective:
    """The objective that the algorithm's row names."""
    from trimtab.batches import mean_over
    from trimtab.kl import KL_LOSSES
    from trimtab.losses.arguments import check_arguments, defaults, parse_arguments
    from trimtab.losses.policy import POLICY_LOSSES, sequence_ratio, token_ratio
    from trimtab.losses.value import VALUE_LOSSES
    from trimtab.objectives import PolicyObjective

    function = POLICY_LOSSES[algorithm.loss]
    settings = check_arguments(function, parse_arguments(algorithm.loss_arguments))
    every = {**defaults(function), **settings}
    clip = {name: every[name] for name in ("epsilon", "epsilon_high")} if "epsilon" in every else None
    return PolicyObjective(
        policy_loss=partial(function, **settings),
        average=partial(mean_over, algorithm.mean_over, length=config.sampling.max_new_tokens),
        fresh=algorithm.epochs * algorithm.minibatches == 1,
        kl_loss=KL_LOSSES[algorithm.kl] if algorithm.kl_in == "loss" else None,
        kl_coefficient=algorithm.kl_coefficient if algorithm.kl_in == "loss" else 0.0,
        value_loss=VALUE_LOSSES[algorithm.value_loss] if algorithm.critic else None,
        ratio=sequence_ratio if algorithm.loss == "gspo" else token_ratio,
        clip=clip,
    )


def warmed_up(batches: Iterator[Any], config: Rl) -> Iterator[Any]:
    """The batches; in the first `--critic-warmup` of them the policy has nothing to gain, so only the critic learns."""
    import torch

    for i, batch in enumerate(batches):
        yield (
            replace(batch, advantages=torch.zeros_like(batch.advantages)) if i < config.critic.critic_warmup else batch
        )


def watcher(run: Run, history: History) -> Callable[[Samples, Rollouts], None]:
    """Looks at every rollout: writes down one prompt's answers, and says what looks unhealthy."""
    from trimtab.health import Health
    from trimtab.progress import console

    health = Health()

    def watch(samples: Samples, rollouts: Rollouts) -> None:
        for warning in health.look(rollouts, samples.texts):
            console.print(f"[yellow]rollout {history.rollouts + 1}: {warning}[/yellow]")
        if history.budget and history.budget.should_warn:
            console.print(f"KL is {history.budget.spent:.1f} of the {history.budget.limit:g} nats of --kl-budget")
        scores = rollouts.scores.tolist()
        first = [
            {"text": text, "reward": score} for text, score in zip(samples.texts[: samples.n], scores, strict=False)
        ]
        row = {"rollout": history.rollouts + 1, "prompt": samples.prompts[0].text, "answers": first}
        run.append("rollouts.jsonl", {**row, "kl_coefficient": history.coefficient.value, "health": dict(health.seen)})

    return watch


EVALUATION_ANSWERS = 2


def evaluation(
    run: Run, policy: Policy, reference: FrozenPolicy, reward: Reward, prompts: Sequence[Prompt], config: Rl
) -> Callable[[int], Mapping[str, float]]:
    """Reward, exact KL and length on held-out prompts; the best policy so far by reward is kept as checkpoints/best."""
    from trimtab.evals.drift import drift
    from trimtab.evals.intervals import bootstrap_mean
    from trimtab.progress import console
    from trimtab.sampling import sample

    best = float("-inf")

    def evaluate(step: int) -> Mapping[str, float]:
        nonlocal best
        samples = sample(
            policy,
            prompts,
            EVALUATION_ANSWERS,
            seed=config.run.seed,
            max_new_tokens=config.sampling.max_new_tokens,
            batch_rows=config.sampling.batch_rows,
        )
        mean = bootstrap_mean(prompt_means(reward(samples.row_prompts, samples.answers), samples.n), config.run.seed)
        moved = drift(policy, reference, samples)
        figures = {"reward": mean.value, "reward_low": mean.low, "reward_high": mean.high}
        figures |= {"kl": moved.kl.value, "length": moved.length.value, "unfinished": moved.unfinished.value}
        console.print(f"held out, step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if step and mean.value > best:
            policy.save(run.directory / "checkpoints" / "best")
        best = max(best, mean.value)
        return figures

    return evaluate


def prompt_means(scores: Sequence[float | None], n: int) -> list[float]:
    """The mean score of each prompt's answers; answers and prompts without a score are left out."""
    groups = ([score for score in scores[i : i + n] if score is not None] for i in range(0, len(scores), n))
    return [sum(group) / len(group) for group in groups if group]
