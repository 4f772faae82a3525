"""Rollouts: sample -> score -> refer -> credit, the stages that make a `PolicyBatch`, lazily.

Online methods differ from offline ones in this iterator alone. It draws when it is asked, so every draw sees the policy
as the last step left it; never prefetch it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

from trimtab import parallel
from trimtab.advantages import (
    SCORE_SHAPES,
    SEQUENCE_ADVANTAGES,
    TOKEN_ADVANTAGES,
    RunningBaseline,
    RunningMoments,
    Scores,
    reward_to_go,
    spread,
    whiten,
    with_unfinished_score,
)
from trimtab.algorithms import Algorithm
from trimtab.batches import PerSequence, PerToken, PolicyBatch, Rollouts, Tokens
from trimtab.checkpoint import State, as_state, from_state
from trimtab.health import Health
from trimtab.kl import KL_ESTIMATORS, AdaptiveCoefficient, FixedCoefficient, KlBudget, log_ratio, shaped_rewards
from trimtab.losses.arguments import check_arguments, parse_arguments
from trimtab.losses.value import explained_variance
from trimtab.parallel import in_chunks
from trimtab.records import Prompt
from trimtab.rewards import Mixture, ModelReward, Reward, checked
from trimtab.sampling import Samples

LogprobsOf = Callable[[Tokens], PerToken]


class Draw(Protocol):
    """Prompts -> `n` answers each. Another `step` draws other answers; the same one draws the same again."""

    def __call__(self, prompts: Sequence[Prompt], n: int, *, step: int) -> Samples: ...


@dataclass(frozen=True)
class Stages:
    """The models and functions that a rollout passes through.

    `draw` samples, `greedy` takes the most probable answer, `reward` scores. `reference` and `policy` give
    log-probabilities as training computes them, `critic` the values before each token, `exact_kl` the KL of every
    next-token distribution; all without gradient, at most `max_rows` rows at a time.
    """

    draw: Draw
    greedy: Callable[[Sequence[Prompt]], Samples]
    reward: Reward
    reference: LogprobsOf
    policy: LogprobsOf
    critic: LogprobsOf | None = None
    exact_kl: LogprobsOf | None = None
    max_rows: int = 16


@dataclass
class History:
    """What online RL remembers from one rollout to the next: plain numbers, all of which belong into a checkpoint."""

    coefficient: FixedCoefficient | AdaptiveCoefficient
    budget: KlBudget | None = None
    moments: RunningMoments = field(default_factory=RunningMoments)
    baseline: RunningBaseline = field(default_factory=RunningBaseline)
    health: Health = field(default_factory=Health)
    rollouts: int = 0
    scored: int = 0
    """Rollouts in which some answer has a score."""
    batch: PolicyBatch | None = None
    """The last rollout, as long as updates on it are left."""
    used: int = 0
    """Updates that were taken on it."""

    def state_dict(self) -> State:
        return {name: value for name, value in as_state(self).items() if value is not None}

    def load_state_dict(self, state: State) -> None:
        for name in state.keys() - {"batch"}:
            setattr(self, name, from_state(getattr(self, name), state[name]))
        if "batch" in state:
            tokens = Tokens(**state["batch"]["tokens"])
            self.batch = PolicyBatch(**{**state["batch"], "tokens": tokens})

    @property
    def may_go_on(self) -> bool:
        """Whether some of the KL budget is left."""
        return self.budget is None or not self.budget.is_spent

    def update(self, rollouts: Rollouts) -> None:
        """Take a rollout in: the price of KL, what is left of its budget, the moving baseline."""
        self.rollouts += 1
        if not rollouts.valid.any():
            return
        self.scored += 1
        kl, answers = rollouts.mean_kl, int(rollouts.valid.sum())
        self.coefficient = self.coefficient.update(kl, answers)
        self.budget = self.budget and self.budget.update(kl)
        self.baseline = self.baseline.update(rollouts.scores, rollouts.valid)


@dataclass(frozen=True)
class Scored:
    """Answers and their rewards, None for those left out; `parts` has each reward's own where there are several."""

    samples: Samples
    rewards: Sequence[float | None]
    parts: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    @property
    def valid(self) -> Bool[Tensor, " B"]:
        """Which answers have a reward."""
        return torch.tensor([reward is not None for reward in self.rewards])

    def scores(self, missing: float = 0.0) -> PerSequence:
        """The rewards as numbers."""
        return torch.tensor([missing if reward is None else float(reward) for reward in self.rewards])


@dataclass(frozen=True)
class Account:
    """One rollout from its texts to its credit, for those who watch.

    `kl_coefficient` is the price of KL that it was credited with. `explained_variance` says how well the critic foresaw
    the sum of the rewards still to come, before it learned from this rollout; NaN without a critic. `seconds` are those
    of each stage, and `warnings` say in words what looks unhealthy for the first time.
    """

    number: int
    scored: Scored
    rollouts: Rollouts
    batch: PolicyBatch
    kl_coefficient: float
    explained_variance: float
    seconds: Mapping[str, float]
    warnings: Sequence[str]


# ---- The iterator


def policy_batches(
    prompts: Iterator[Sequence[Prompt]],
    stages: Stages,
    algorithm: Algorithm,
    history: History,
    *,
    group_size: int,
    seed: int,
    watch: Callable[[Account], None] = lambda account: None,
) -> Iterator[PolicyBatch]:
    """Sample, score, credit, and hand out minibatches, one for each update. Ends when the KL budget is spent.

    `watch` sees every rollout before the first update on it. One in which no answer has a score is passed over; see
    `check_scored` for when that is an error. Begins with what `history` has left of a rollout.
    """
    yield from updates_left(history, algorithm, seed)
    for asked in prompts:
        account = roll_out(asked, stages, algorithm, history, group_size=group_size)
        watch(account)
        check_scored(stages.reward, history.rollouts, history.scored)
        if not history.may_go_on:
            return
        if account.scored.valid.any():
            history.batch, history.used = account.batch, 0
            yield from updates_left(history, algorithm, seed)
    check_scored(stages.reward, history.rollouts, history.scored, patience=1)


def updates_left(history: History, algorithm: Algorithm, seed: int) -> Iterator[PolicyBatch]:
    """The minibatches of the last rollout that no update was taken on yet; `history` counts those that are handed out.

    It forgets the rollout with the last one.
    """
    batch = history.batch
    if batch is None:
        return
    orders = (derived_seed(seed, history.rollouts, epoch) for epoch in range(algorithm.epochs))
    parts = (part for order in orders for part in minibatches(batch, algorithm.minibatches, seed=order))
    for part in itertools.islice(parts, history.used, None):
        history.used += 1
        if history.used == algorithm.updates:
            history.batch = None
        yield part
    history.batch = None


PATIENCE = 10
"""Rollouts at the start of a run that may all be without a score."""


def check_scored(reward: Reward, rollouts: int, scored: int, *, patience: int = PATIENCE) -> None:
    """ValueError, naming the reward, if none of `patience` rollouts or more had an answer with a score.

    Once one had, the run goes on whatever comes: what it learned is not thrown away.
    """
    if not scored and rollouts >= patience:
        raise ValueError(
            f"{reward.name} gave None for every answer of {rollouts} rollouts, so there is nothing to learn from"
        )


def roll_out(
    prompts: Sequence[Prompt], stages: Stages, algorithm: Algorithm, history: History, *, group_size: int
) -> Account:
    """Answers to some prompts, through all stages."""
    seconds: dict[str, float] = {}
    with timed("sample", seconds):
        samples = stages.draw(prompts, group_size, step=history.rollouts)
    with timed("score", seconds):
        scored = score(stages.reward, samples)
        baseline = expected(scored, stages, algorithm, history)
    with timed("refer", seconds):
        rollouts = refer(scored, baseline, stages, algorithm)
    with timed("credit", seconds):
        price = history.coefficient.value if algorithm.kl_in == "reward" else 0.0
        history.moments = history.moments.update(rollouts.scores, rollouts.valid)
        batch = credit(rollouts, stages, algorithm, price=price, moments=history.moments)
        rewards = token_rewards(rollouts, algorithm, price, history.moments)
        foreseen = foresight(batch, rewards, algorithm) if stages.critic else math.nan
    history.update(rollouts)
    return Account(
        number=history.rollouts,
        scored=scored,
        rollouts=rollouts,
        batch=batch,
        kl_coefficient=price,
        explained_variance=foreseen,
        seconds=seconds,
        warnings=history.health.look(rollouts, samples.texts),
    )


@contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Writes down the seconds that a stage takes."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def minibatches(batch: PolicyBatch, count: int, *, seed: int) -> Iterator[PolicyBatch]:
    """The batch in `count` parts of whole groups, shuffled, without parts that have no score; in one part as it is."""
    if count == 1:
        yield batch
        return
    order = torch.randperm(batch.size, generator=torch.Generator().manual_seed(seed))
    parts = (batch.select(items) for items in order.tensor_split(count) if len(items))
    yield from (part for part in parts if part.mask.any())


def derived_seed(*numbers: int) -> int:
    """A seed of 63 bits that is a function of these numbers alone."""
    text = " ".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


# ---- Score


def score(reward: Reward, samples: Samples) -> Scored:
    """Rewards of answers, each part asked once."""
    if not isinstance(reward, Mixture):
        return Scored(samples, ask(reward, samples))
    parts = {part.name: ask(part, samples) for part in reward.rewards}
    return Scored(samples, checked(reward.name, samples.row_prompts, samples.answers, reward.combine(parts)), parts)


def ask(reward: Reward, samples: Samples) -> Sequence[float | None]:
    """What a reward says of all answers; those to a prompt are asked about together, on one rank.

    A model whose weights are split over the ranks is asked on all of them at once.
    """
    if isinstance(reward, Mixture):
        return score(reward, samples).rewards
    n, prompts, answers = samples.n, samples.row_prompts, samples.answers
    if isinstance(reward, ModelReward) and reward.model.is_split:
        return reward(prompts, answers)

    def of_prompts(places: Sequence[int]) -> Sequence[float | None]:
        rows = slice(places[0] * n, (places[-1] + 1) * n)
        return checked(reward.name, prompts[rows], answers[rows], reward(prompts[rows], answers[rows]))

    return parallel.over_ranks(of_prompts, range(len(samples.prompts)))


def expected(scored: Scored, stages: Stages, algorithm: Algorithm, history: History) -> PerSequence:
    """What was expected of each answer before it was drawn: for `remax` the greedy answer's score, else a running mean.

    A greedy answer that the reward leaves out is expected to be worth the running mean.
    """
    usual = history.baseline.value
    if algorithm.advantage != "remax":
        return torch.full((len(scored.rewards),), usual)
    samples = stages.greedy(scored.samples.prompts)
    scores = Scored(samples, ask(stages.reward, samples)).scores(usual)
    greedy = with_unfinished_score(scores, samples.finished, algorithm.unfinished_score)
    return greedy.repeat_interleave(scored.samples.n)


# ---- Refer


def refer(scored: Scored, baseline: PerSequence, stages: Stages, algorithm: Algorithm) -> Rollouts:
    """The answers as tensors, with log-probabilities under the reference and KL by the algorithm's estimator.

    Where an answer serves one update only, the policy's own log-probabilities are those of sampling: the update
    computes them anyway.
    """
    samples, run = scored.samples, partial(in_chunks, max_rows=stages.max_rows)
    tokens, sampled = samples.tokens, samples.sampled_logprobs
    logprobs = run(stages.policy, tokens) if algorithm.updates > 1 else sampled
    ref_logprobs = run(stages.reference, tokens)
    if algorithm.kl == "exact":
        assert stages.exact_kl is not None, "exact KL needs both models"
        kl = run(stages.exact_kl, tokens)
    else:
        # Where KL is in the loss, the objective computes it; nothing reads this one.
        kl = KL_ESTIMATORS.get(algorithm.kl, KL_ESTIMATORS["k1"])(
            log_ratio(logprobs, ref_logprobs, tokens.response_mask)
        )
    return Rollouts(
        tokens=tokens,
        sampled_logprobs=sampled,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        kl=kl,
        scores=scored.scores(),
        baseline=baseline,
        valid=scored.valid,
        finished=samples.finished,
        group_size=samples.n,
    )


# ---- Credit


def credit(
    rollouts: Rollouts, stages: Stages, algorithm: Algorithm, *, price: float, moments: RunningMoments
) -> PolicyBatch:
    """Advantages from scores, as the algorithm says; a nat of KL costs `price` of them."""
    tokens = rollouts.tokens
    values = in_chunks(stages.critic, tokens, stages.max_rows) if stages.critic else torch.zeros_like(rollouts.kl)
    advantages, returns = advantages_of(rollouts, values, algorithm, price, moments)
    return PolicyBatch(
        tokens=tokens,
        sampled_logprobs=rollouts.sampled_logprobs,
        old_logprobs=rollouts.logprobs,
        ref_logprobs=rollouts.ref_logprobs,
        advantages=whiten(advantages, rollouts.mask) if algorithm.whiten_advantages else advantages,
        returns=returns,
        old_values=values,
        scores=rollouts.scores,
        weights=rollouts.valid.float(),
        finished=rollouts.finished,
        group_size=rollouts.group_size,
    )


def advantages_of(
    rollouts: Rollouts, values: PerToken, algorithm: Algorithm, price: float, moments: RunningMoments
) -> tuple[PerToken, PerToken]:
    """Advantages of every token, and the returns that a critic learns (zeros without one)."""
    mask, name = rollouts.mask, algorithm.advantage
    settings = parse_arguments(algorithm.advantage_arguments)
    if name in SEQUENCE_ADVANTAGES:
        priced = shaped_scores(rollouts, algorithm, moments) - price * torch.where(mask, rollouts.kl, 0).sum(-1)
        given = Scores(priced, rollouts.valid, rollouts.baseline, rollouts.group_size)
        function = SEQUENCE_ADVANTAGES[name]
        return spread(function(given, **check_arguments(function, settings)), mask), torch.zeros_like(values)
    rewards, function = token_rewards(rollouts, algorithm, price, moments), TOKEN_ADVANTAGES[name]
    inputs = (rewards, values, mask) if name == "gae" else (rewards, mask)
    found = function(*inputs, **check_arguments(function, settings))
    return (found, torch.zeros_like(values)) if isinstance(found, Tensor) else found


def shaped_scores(rollouts: Rollouts, algorithm: Algorithm, moments: RunningMoments) -> PerSequence:
    """The scores as they are credited: shaped by their history, and with the score of answers that were cut."""
    function = SCORE_SHAPES[algorithm.score_shape]
    settings = check_arguments(function, parse_arguments(algorithm.score_arguments))
    scores = function(rollouts.scores, moments, **settings)
    return with_unfinished_score(scores, rollouts.finished, algorithm.unfinished_score)


def token_rewards(rollouts: Rollouts, algorithm: Algorithm, price: float, moments: RunningMoments) -> PerToken:
    """What every token earned: the price of its KL, and at the last one the score."""
    scores = shaped_scores(rollouts, algorithm, moments)
    return shaped_rewards(scores, rollouts.kl, rollouts.mask, coefficient=price)


def foresight(batch: PolicyBatch, rewards: PerToken, algorithm: Algorithm) -> float:
    """The share of the spread of what came that the critic's values explain; see `explained_variance`.

    Against the sum of the rewards to come, not the returns that the critic learns: below lambda 1 those contain its own
    values.
    """
    gamma = float(parse_arguments(algorithm.advantage_arguments).get("gamma", 1))
    return explained_variance(batch.old_values, reward_to_go(rewards, batch.mask, gamma=gamma), batch.mask)
