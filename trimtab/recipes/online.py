"""What the commands that learn from the policy's own answers share once they run: parts, stages, held-out figures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from trimtab import models
from trimtab.batches import batch_indices
from trimtab.checkpoint import Stateful
from trimtab.critic import values_before
from trimtab.evals.diversity import distinct_per_input
from trimtab.evals.drift import drift_of, kl_per_token
from trimtab.evals.intervals import Estimate, bootstrap_mean
from trimtab.learner import Learner
from trimtab.models import FrozenPolicy, Policy, ScalarModel
from trimtab.progress import console
from trimtab.recipes import training
from trimtab.recipes.options import settings_of
from trimtab.records import Prompt
from trimtab.rewards import Mixture, ModelReward, Reward, parse_rewards
from trimtab.rollouts import Account, Scored, Stages, score
from trimtab.run import Run
from trimtab.safety import Safety
from trimtab.sampling import Sampler, Samples
from trimtab.selection import Drawn
from trimtab.tokens import encode_prompts

T = TypeVar("T")

# ---- What comes in


def load_parts(config: Any, load: Callable[[Any], Reward]) -> tuple[Policy, Reward, dict[str, list[Prompt]]]:
    """The policy, the reward, and the prompts of --data ("train") and --eval-data ("eval") that can be used."""
    loaded = training.read_parts(config.data, Prompt)
    reward = load(config)
    policy = training.load(models.load_policy, config)
    policy.module.temperature = config.sampling.temperature
    prompts = {part: fitting(policy, some.records, config) for part, some in loaded.items()}
    check_prompts(prompts["train"], config)
    return policy, reward, prompts


def load_reward(config: Any) -> Reward:
    """The reward of all --reward flags together."""
    return parse_rewards(config.reward.reward, config.reward.reward_weights, **reward_options(config))


def reward_models(reward: Reward) -> list[ScalarModel]:
    """The reward models that a reward asks, those of a judge and the policies of implicit rewards left out."""
    if isinstance(reward, Mixture):
        return [model for part in reward.rewards for model in reward_models(part)]
    return [reward.model] if isinstance(reward, ModelReward) else []


def reward_options(config: Any) -> dict[str, Any]:
    """How a reward model computes, as arguments of `parse_rewards`."""
    return {**training.scoring(config.model), "max_length": config.data.max_length}


def fitting(policy: Policy, prompts: Sequence[Prompt], config: Any) -> list[Prompt]:
    """The prompts that leave room for an answer; others are an error, or dropped and counted."""
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
    return [len(ids) for ids in encode_prompts(policy.tokenizer, prompts)]


def check_prompts(prompts: Sequence[Prompt], config: Any) -> None:
    """Refuse a rollout of more prompts than there are."""
    wanted = config.algorithm.prompts_per_step
    if len(prompts) < wanted:
        raise ValueError(f"--prompts-per-step {wanted}: --data has {len(prompts)} prompts that can be used.")


def draws(prompts: Sequence[Prompt], config: Any, *, start: int = 0) -> Iterator[list[Prompt]]:
    """The prompts of each rollout after the first `start`: epoch after epoch, each in its own order."""
    size = config.algorithm.prompts_per_step
    # There are at most as many rollouts as steps.
    for index in batch_indices(len(prompts), size, seed=config.run.seed, steps=config.steps.steps, start=start):
        yield [prompts[i] for i in index]


# ---- What happens to it


def open_run(command: str, config: Any, policy: Policy, prompts: Mapping[str, Sequence[Prompt]]) -> Run:
    """The run directory of a command."""
    facts = {
        part: {"prompts": len(some), "sha256": digest_of(some), "facts": training.facts_of(some, prompts["train"])}
        for part, some in prompts.items()
    }
    return training.open_run(command, config, policy, facts)


def digest_of(prompts: Sequence[Prompt]) -> str:
    """The sha256 of all that the policy and a reward see of some prompts."""
    found = hashlib.sha256()
    for prompt in prompts:
        seen = (prompt.messages, prompt.answer, prompt.user, sorted(prompt.columns.items()))
        found.update(repr(seen).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def resume(
    run: Run, learner: Learner, config: Any, parts: Mapping[str, Any], prompts: Sequence[Prompt], measure: Measure
) -> Safety:
    """Go on where the run was saved, if it was; and how it is to be saved. `parts` hold the `rollouts` of the run."""
    remembered = {**parts, **({"measure": measure.of} if isinstance(measure.of, Stateful) else {})}
    (history,) = parts.values()
    best = config.run.keep_best or (measure.name if config.run.eval_every else None)

    def rows(step: int) -> list[str]:
        return [prompt.source for prompt in next(draws(prompts, config, start=history.rollouts - 1))]

    safety = replace(training.safety_of(config, learner, remembered, None), keep_best=best, rows=rows)
    run.restore(safety.parts)
    training.track(run, config)
    return safety


def stages_of(
    policy: Policy,
    reference: FrozenPolicy,
    reward: Reward,
    config: Any,
    sampler: Sampler,
    *,
    critic: ScalarModel | None = None,
    exact_kl: bool = False,
) -> Stages:
    """What a rollout passes through."""
    settings, group_size = settings_of(config.sampling), config.algorithm.group_size

    def draw(prompts: Sequence[Prompt], n: int, *, step: int) -> Samples:
        return sampler(policy, prompts, n, seed=config.run.seed, step=step, **settings)

    def greedy(prompts: Sequence[Prompt]) -> Samples:
        return sampler(policy, prompts, **{**settings, "temperature": 0.0})

    return Stages(
        draw=draw,
        greedy=greedy,
        reward=reward,
        reference=reference.logprobs,
        policy=policy.logprobs,
        critic=partial(values_before, critic) if critic else None,
        exact_kl=partial(policy.kl, reference=reference) if exact_kl else None,
        max_rows=max(1, config.steps.micro_batch_rows // group_size) * group_size,  # whole groups share a prompt
    )


def save_memory(
    run: Run, networks: Sequence[Any], prompts: Sequence[Prompt], config: Any, *, item_rows: int, length: int = 0
) -> None:
    """Gradient checkpointing for what the longest answers to the longest prompts need, or rows of `length` tokens."""
    rows = max(config.steps.micro_batch_rows, item_rows)
    longest = max(prompt_lengths(networks[0], prompts)) + config.sampling.max_new_tokens
    requested = config.steps.optimizer.gradient_checkpointing
    training.save_memory(run, networks, requested, rows, max(longest, length))


# ---- What is told


def told(rollout: Account | Drawn) -> dict[str, Any]:
    """What rollouts.jsonl says of every rollout, with the answers to its first prompt. Figures of no score are NaN."""
    scored, rollouts = rollout.scored, rollout.rollouts
    return {
        "rollout": rollout.number,
        "reward": rollouts.scores[rollouts.valid].mean().item(),
        "kl": rollouts.mean_kl,
        "seconds": dict(rollout.seconds),
        "prompt": scored.samples.prompts[0].text,
        "answers": [told_answer(scored, i) for i in range(scored.samples.n)],
    }


def told_answer(scored: Scored, row: int) -> dict[str, Any]:
    """An answer and its reward, with the parts of the reward if there are several."""
    parts = {name: values[row] for name, values in scored.parts.items()}
    answer = {"text": scored.samples.texts[row], "reward": scored.rewards[row]}
    return {**answer, "parts": parts} if parts else answer


EVALUATION_ANSWERS = 2


@dataclass(frozen=True)
class Measure:
    """What is measured of held-out answers: its name, one number (or None) for each answer, and the range of those."""

    name: str
    of: Callable[[Samples], Sequence[float | None]]
    least: float = -math.inf
    most: float = math.inf

    def mean(self, values: Sequence[float | None], n: int, seed: int) -> dict[str, float]:
        """The mean over prompts of `n` answers with its interval; NaN, and said so, where there are no numbers."""
        said = prompt_means(values, n)
        if not said:
            console.print(f"[yellow]none of {len(values)} held-out answers has a score[/yellow]")
        mean = bootstrap_mean(said, seed) if said else Estimate(math.nan, math.nan, math.nan, 0)
        # The widened bootstrap of `bootstrap_mean` knows nothing of the ends of a share.
        low, high = max(mean.low, self.least), min(mean.high, self.most)
        return {self.name: mean.value, f"{self.name}_low": low, f"{self.name}_high": high}


def reward_measure(reward: Reward) -> Measure:
    """The reward of held-out answers."""
    return Measure("reward", lambda samples: score(reward, samples).rewards)


def evaluation(
    run: Run,
    measure: Measure,
    policy: Policy,
    reference: FrozenPolicy,
    prompts: Sequence[Prompt] | None,
    config: Any,
    sampler: Sampler,
) -> Callable[[int], dict[str, float]] | None:
    """The measure, exact KL, length and diversity on held-out prompts, by the same uniform numbers each time.

    What every answer scored goes into scores.jsonl, the first answers to a few prompts into samples.jsonl. None without
    prompts.
    """
    settings = settings_of(config.sampling)
    if prompts is None:
        return None

    def evaluate(step: int) -> dict[str, float]:
        samples = sampler(policy, prompts, EVALUATION_ANSWERS, seed=config.run.seed, **settings)
        kl = kl_per_token(policy, reference, samples, config.steps.micro_batch_rows)
        moved = drift_of(kl, samples, config.run.seed)
        values, texts = measure.of(samples), in_groups(samples.texts, samples.n)
        run.append("scores.jsonl", {"step": step, **scores_of(samples, measure.name, values)})
        write_answers(run, step, samples, {"kl": kl.sum(-1).tolist(), measure.name: values}, config.run.samples)
        figures = measure.mean(values, samples.n, config.run.seed)
        figures |= {"kl": moved.kl.value, "length": moved.length.value, "unfinished": moved.unfinished.value}
        console.print(f"held out, step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        others = {"kl": moved.kl, "length": moved.length, "distinct": distinct_per_input(texts, config.run.seed)}
        return figures | bounded(others)

    return evaluate


def write_answers(
    run: Run, step: int, samples: Samples, figures: Mapping[str, Sequence[float | None]], prompts: int
) -> None:
    """The first answers to so many prompts into samples.jsonl, each with its figures."""
    for row in range(0, min(prompts, len(samples.prompts)) * samples.n, samples.n):
        beside = {name: values[row] for name, values in figures.items()}
        said = {"prompt": samples.row_prompts[row].text, "response": samples.texts[row]}
        run.append("samples.jsonl", {"step": step, **said, **beside})


def scores_of(samples: Samples, measure: str, values: Sequence[float | None]) -> dict[str, Any]:
    """What every answer scored and how many tokens it has, a list for each prompt."""
    lengths = samples.tokens.response_lengths.tolist()
    return {"measure": measure, "scores": in_groups(values, samples.n), "lengths": in_groups(lengths, samples.n)}


def bounded(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """Estimates as figures: each value under its name, its bounds under `NAME_low` and `NAME_high`."""
    return {
        key: value
        for name, one in estimates.items()
        for key, value in ((name, one.value), (f"{name}_low", one.low), (f"{name}_high", one.high))
    }


def prompt_means(scores: Sequence[float | None], n: int) -> list[float]:
    """The mean score of each prompt's answers; answers and prompts without a score are left out."""
    groups = ([score for score in group if score is not None] for group in in_groups(scores, n))
    return [sum(group) / len(group) for group in groups if group]


def in_groups(values: Sequence[T], n: int) -> list[Sequence[T]]:
    """The values of every prompt's `n` neighbouring answers together."""
    return [values[i : i + n] for i in range(0, len(values), n)]
