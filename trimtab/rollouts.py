"""Rollouts: sample -> score -> refer -> credit, the stages that make a `PolicyBatch`, lazily.

Online methods differ from offline ones in this iterator alone. It draws when it is asked, so every draw sees the policy
as the last step left it; never prefetch it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from trimtab.advantages import (
    COMPARING,
    SCORE_SHAPES,
    SEQUENCE_ADVANTAGES,
    TOKEN_ADVANTAGES,
    RunningBaseline,
    RunningMoments,
    Scores,
    spread,
    whiten,
    with_unfinished_score,
)
from trimtab.algorithms import Algorithm
from trimtab.batches import PerSequence, PerToken, PolicyBatch, Rollouts, Tokens
from trimtab.kl import KL_ESTIMATORS, AdaptiveCoefficient, FixedCoefficient, KlBudget, log_ratio, shaped_rewards
from trimtab.losses.arguments import check_arguments, parse_arguments
from trimtab.records import Prompt
from trimtab.rewards import Reward
from trimtab.sampling import Samples

LogprobsOf = Callable[[Tokens], PerToken]


class Draw(Protocol):
    """Prompts -> samples: `trimtab.sampling.sample` with its settings filled in."""

    def __call__(self, prompts: Sequence[Prompt], n: int, *, seed: int) -> Samples: ...


@dataclass
class History:
    """What online RL remembers from one rollout to the next; all of it belongs into a checkpoint."""

    coefficient: FixedCoefficient | AdaptiveCoefficient
    budget: KlBudget | None = None
    moments: RunningMoments = field(default_factory=RunningMoments)
    baseline: RunningBaseline = field(default_factory=RunningBaseline)
    rollouts: int = 0


@dataclass(frozen=True)
class Stages:
    """The models and functions that a rollout passes through.

    `draw` samples, `reward` scores, `reference` gives the reference's log-probabilities and `policy` the policy's own
    as training computes them, `critic` the values before each token (None without one). All without gradient, at most
    `max_rows` rows at a time.
    """

    draw: Draw
    reward: Reward
    reference: LogprobsOf
    policy: LogprobsOf
    critic: LogprobsOf | None
    max_rows: int
    exact_kl: LogprobsOf | None = None


# ---- The iterator


def policy_batches(
    prompts: Iterator[Sequence[Prompt]],
    stages: Stages,
    algorithm: Algorithm,
    history: History,
    *,
    group_size: int,
    seed: int,
    unfinished_score: float | None = None,
    watch: Callable[[Samples, Rollouts], None] = lambda samples, rollouts: None,
) -> Iterator[PolicyBatch]:
    """Sample, score, credit, and hand out minibatches: one for each update. Ends when the KL budget is spent.

    `watch` sees every rollout, before the first update on it.
    """
    for asked in prompts:
        samples, rollouts = roll_out(asked, stages, algorithm, history, group_size=group_size, seed=seed)
        watch(samples, rollouts)
        batch = credit(rollouts, stages, algorithm, history, unfinished_score=unfinished_score)
        remember(history, rollouts)
        if history.budget and history.budget.is_spent:
            return
        for epoch in range(algorithm.epochs):
            yield from minibatches(batch, algorithm.minibatches, seed=seed + 7919 * (history.rollouts + epoch))


def roll_out(
    prompts: Sequence[Prompt], stages: Stages, algorithm: Algorithm, history: History, *, group_size: int, seed: int
) -> tuple[Samples, Rollouts]:
    """Answers to some prompts with their scores and the reference's log-probabilities."""
    seed = draw_seed(seed, history.rollouts)
    samples = stages.draw(prompts, group_size, seed=seed)
    scores, valid = scores_of(stages.reward, samples)
    tokens = samples.tokens
    again = algorithm.epochs * algorithm.minibatches > 1
    logprobs = in_chunks(stages.policy, tokens, stages.max_rows) if again else samples.logprobs
    ref_logprobs = in_chunks(stages.reference, tokens, stages.max_rows)
    rollouts = Rollouts(
        tokens=tokens,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        kl=torch.zeros_like(logprobs),
        scores=scores,
        baseline=torch.full_like(scores, history.baseline.value),
        valid=valid,
        finished=samples.finished,
        group_size=group_size,
    )
    if algorithm.advantage == "remax":
        greedy, _ = scores_of(stages.reward, stages.draw(prompts, 1, seed=GREEDY))
        rollouts = replace(rollouts, baseline=greedy.repeat_interleave(group_size))
    return samples, replace(rollouts, kl=kl_of(rollouts, stages, algorithm))


GREEDY = -1
"""The seed that asks `Draw` for the most probable answer."""


def draw_seed(seed: int, rollout: int) -> int:
    """The seed of a rollout's draws, another one each time, a function of the run's seed and its number alone."""
    return (seed * 1_000_003 + rollout) % 2**63


def scores_of(reward: Reward, samples: Samples) -> tuple[PerSequence, Tensor]:
    """The scores of all answers, and which have one; a score of None leaves an answer out."""
    given = reward(samples.row_prompts, samples.answers)
    valid = torch.tensor([score is not None for score in given])
    if not valid.any():
        raise ValueError(f"reward {reward.name} gave None for all {len(given)} answers, so there is nothing to learn.")
    return torch.tensor([0.0 if score is None else float(score) for score in given]), valid


def kl_of(rollouts: Rollouts, stages: Stages, algorithm: Algorithm) -> PerToken:
    """The KL of every token by the algorithm's estimator, nats; `exact` is over the whole vocabulary."""
    if algorithm.kl == "exact":
        assert stages.exact_kl is not None
        return in_chunks(stages.exact_kl, rollouts.tokens, stages.max_rows)
    ratio = log_ratio(rollouts.logprobs, rollouts.ref_logprobs, rollouts.tokens.response_mask)
    estimator = KL_ESTIMATORS[algorithm.kl if algorithm.kl in KL_ESTIMATORS else "k1"]
    return estimator(ratio)


@torch.no_grad()
def in_chunks(function: LogprobsOf, tokens: Tokens, max_rows: int) -> PerToken:
    """A function of rows on all rows, at most `max_rows` at a time, on the CPU."""
    found = torch.zeros(tokens.ids.shape)
    for rows in torch.arange(len(tokens)).split(max_rows):
        found[rows, tokens.used_columns(rows)] = function(tokens.select(rows)).float().cpu()
    return found


# ---- Credit


def credit(
    rollouts: Rollouts,
    stages: Stages,
    algorithm: Algorithm,
    history: History,
    *,
    unfinished_score: float | None = None,
) -> PolicyBatch:
    """Advantages from scores: the algorithm's, with KL at today's price where it is in the reward."""
    mask = rollouts.mask
    if algorithm.score_shape != "raw":
        history.moments = history.moments.update(rollouts.scores, rollouts.valid)
    scores = SCORE_SHAPES[algorithm.score_shape](rollouts.scores, history.moments)
    if unfinished_score is not None:
        scores = with_unfinished_score(scores, rollouts.finished, unfinished_score)
    price = history.coefficient.value if algorithm.kl_in == "reward" else 0.0
    values = (
        in_chunks(stages.critic, rollouts.tokens, stages.max_rows) if stages.critic else torch.zeros_like(rollouts.kl)
    )
    advantages, returns = advantages_of(rollouts, scores, values, price, algorithm)
    if algorithm.whiten_advantages:
        advantages = whiten(advantages, mask)
    return PolicyBatch(
        tokens=rollouts.tokens,
        old_logprobs=rollouts.logprobs,
        ref_logprobs=rollouts.ref_logprobs,
        advantages=advantages,
        returns=returns,
        old_values=values,
        scores=rollouts.scores,
        weights=rollouts.valid.float(),
        finished=rollouts.finished,
        group_size=rollouts.group_size,
    )


def advantages_of(
    rollouts: Rollouts, scores: PerSequence, values: PerToken, price: float, algorithm: Algorithm
) -> tuple[PerToken, PerToken]:
    """Advantages and returns of every token, `[B, T]`; a method without a critic has no use for returns."""
    mask = rollouts.mask
    settings = parse_arguments(algorithm.advantage_arguments)
    if algorithm.advantage in SEQUENCE_ADVANTAGES:
        function = SEQUENCE_ADVANTAGES[algorithm.advantage]
        priced = scores - price * torch.where(mask, rollouts.kl, 0).sum(-1)
        given = Scores(priced, rollouts.valid, rollouts.baseline, rollouts.group_size)
        advantages = spread(function(given, **check_arguments(function, settings)), mask)
        return advantages, torch.zeros_like(advantages)
    function = TOKEN_ADVANTAGES[algorithm.advantage]
    settings = check_arguments(function, settings)
    rewards = shaped_rewards(scores, rollouts.kl, mask, coefficient=price)
    if algorithm.advantage == "gae":
        return function(rewards, values, mask, **settings)  # pyright: ignore[reportReturnType]
    advantages = function(rewards, mask, **settings)
    assert isinstance(advantages, Tensor)
    return advantages, torch.zeros_like(advantages)


def remember(history: History, rollouts: Rollouts) -> None:
    """Take a rollout into the history: the price of KL, what is left of its budget, the moving baseline."""
    mask = rollouts.mask
    answers = int(rollouts.valid.sum())
    kl = (log_ratio(rollouts.logprobs, rollouts.ref_logprobs, mask).sum() / max(answers, 1)).item()
    history.coefficient = history.coefficient.update(kl, answers)
    history.baseline = history.baseline.update(rollouts.scores, rollouts.valid)
    if history.budget:
        history.budget = history.budget.update(kl)
    history.rollouts += 1


def minibatches(batch: PolicyBatch, count: int, *, seed: int) -> Iterator[PolicyBatch]:
    """The batch in `count` parts of whole groups, shuffled; in one part as it is."""
    if count == 1:
        yield batch
        return
    order = torch.randperm(batch.size, generator=torch.Generator().manual_seed(seed % 2**63))
    for items in order.tensor_split(count):
        if len(items):
            yield batch.select(items)


def check_algorithm(name: str, algorithm: Algorithm, *, group_size: int, prompts_per_step: int) -> None:
    """Refuse sizes and estimators with which an algorithm means nothing."""
    if algorithm.advantage in COMPARING and group_size < 2:
        raise ValueError(f"{name} compares answers to one prompt: --group-size {group_size} must be 2 or more.")
    if algorithm.advantage == "batch_centred" and group_size * prompts_per_step < 2:
        raise ValueError(f"{name} compares the answers of a step: give --group-size or --prompts-per-step above 1.")
    if algorithm.minibatches > prompts_per_step:
        raise ValueError(
            f"--minibatches {algorithm.minibatches}: a minibatch holds whole groups, and there are "
            f"--prompts-per-step {prompts_per_step} of them."
        )
    if algorithm.loss == "reinforce" and algorithm.epochs * algorithm.minibatches > 1:
        raise ValueError(
            f"{name}: the loss reinforce has no ratio, so each answer is good for one update. "
            "Leave --epochs-per-rollout and --minibatches at 1, or take the loss ppo_clip."
        )
