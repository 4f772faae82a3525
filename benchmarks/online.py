"""This side of a comparison of online RL: every step samples, scores, asks the reference and trains.

In the first step, which warms up and is compared with the peer's, answers are drawn as ever and then exchanged for
those in the file of rows: the same on both sides, so that rewards and the gradient's norm must agree. No answer ends
early.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.process import Job, Result, parts_of, token_facts
from trimtab.batches import PolicyBatch
from trimtab.kl import FixedCoefficient
from trimtab.learner import Learner
from trimtab.models import FrozenPolicy, Policy
from trimtab.recipes import training
from trimtab.recipes.algorithm import AlgorithmOptions, KlOptions, objective_of, resolve
from trimtab.recipes.options import (
    DataOptions,
    ModelOptions,
    OnlineStepOptions,
    OptimizerOptions,
    RewardChoice,
    RunOptions,
    SamplingOptions,
)
from trimtab.recipes.rl import Rl
from trimtab.records import Prompt
from trimtab.rewards import parse_reward
from trimtab.rollouts import Account, History, Stages, in_chunks, policy_batches
from trimtab.sampling import Samples, sample
from trimtab.tokens import Row, decode, encode_prompts, pad

KINDS = ("rloo", "grpo")
REWARD = "py:benchmarks.process:count_of_e"
"""The rule that scores answers, on both sides."""


def config_of(job: Job) -> Rl:
    """The flags of `trimtab rl` for this work: one update a rollout, all answers in one micro-batch."""
    prompts = len(job.read_rows())
    return Rl(
        model=ModelOptions(job.model, dtype=job.dtype, device=job.device),
        data=DataOptions(job.rows, max_length=job.max_length),
        run=RunOptions(out="unused", samples=0),
        reward=RewardChoice((REWARD,)),
        algorithm=AlgorithmOptions(job.kind, group_size=job.answers, prompts_per_step=prompts),
        sampling=SamplingOptions(max_new_tokens=job.new_tokens, batch_rows=prompts * job.answers),
        steps=OnlineStepOptions(
            lr=job.lr,
            steps=1 + job.steps,
            micro_batch_rows=prompts * job.answers,
            optimizer=OptimizerOptions(warmup=0.0, share_prompts=job.share),
        ),
        kl=KlOptions(kl_coef=job.beta),
    )


def run(job: Job, held: Callable[[Job], int], loader: Callable[..., Policy]) -> Result:
    """All steps of a job, and what they took; memory and versions are the caller's to fill in."""
    config, rows = config_of(job), job.read_rows()
    algorithm = resolve(config.algorithm, config.kl)
    policy = training.load(loader, config)
    loaded = held(job)
    stages = stages_of(policy, policy.reference(), rows, config)
    accounts: list[Account] = []
    batches = policy_batches(
        iter([[Prompt.from_text(row["prompt"]) for row in rows]] * (1 + job.steps)),
        stages,
        algorithm,
        History(FixedCoefficient(algorithm.kl_coefficient)),
        group_size=job.answers,
        seed=0,
        watch=accounts.append,
    )
    objective = objective_of(algorithm, max_new_tokens=job.new_tokens)
    learner = training.make_learner(policy, objective, config.steps, 1 + job.steps)
    seconds, told = steps(learner, batches)
    return Result(
        side="trimtab",
        seconds=seconds,
        losses=[figures["loss"] for figures in told],
        figures=first_figures(accounts[0], told[0]),
        tokens=facts(accounts),
        loaded=loaded,
        threads=torch.get_num_threads(),
        note=policy.arithmetic.why,
        laid_out=policy.body.arrangement is not None,
        attention=policy.body.attention,
        parts=parts_of({name: [a.seconds[name] for a in accounts] for name in ("sample", "score", "refer")}, seconds),
    )


def steps(learner: Learner, batches: Iterator[PolicyBatch]) -> tuple[list[float], list[dict[str, float]]]:
    """Seconds and figures of every step; drawing the batch is part of it."""
    seconds, told = [], []
    began = time.perf_counter()
    for batch in batches:
        told.append(learner.step(batch))
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    return seconds, told


def stages_of(policy: Policy, reference: FrozenPolicy, rows: Sequence[dict[str, Any]], config: Rl) -> Stages:
    """What a rollout passes through, as `trimtab rl` has it but for answers that do not end."""
    settings = {"max_new_tokens": config.sampling.max_new_tokens, "batch_rows": config.sampling.batch_rows}

    def draw(prompts: Sequence[Prompt], n: int, *, step: int) -> Samples:
        drawn = sample(policy, prompts, n, step=step, stop_ids=(), **settings)
        assert bool((drawn.tokens.response_lengths == config.sampling.max_new_tokens).all())
        return drawn if step else exchanged(policy, drawn, [ids for row in rows for ids in row["answers"]], config)

    return Stages(
        draw=draw,
        greedy=partial(draw, n=1, step=0),
        reward=parse_reward(REWARD),
        reference=reference.logprobs,
        policy=policy.logprobs,
        max_rows=config.steps.micro_batch_rows,
    )


def exchanged(policy: Policy, drawn: Samples, answers: Sequence[Sequence[int]], config: Rl) -> Samples:
    """Samples with other answers, and the log-probabilities that the policy gives them."""
    prompts = [ids for ids in encode_prompts(policy.tokenizer, drawn.prompts) for _ in range(drawn.n)]
    rows = [
        Row([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    tokens = pad(rows, policy.pad_id)
    logprobs = in_chunks(policy.logprobs, tokens, config.steps.micro_batch_rows)
    texts = [decode(policy.tokenizer, answer) for answer in answers]
    return replace(drawn, tokens=tokens, logprobs=logprobs, sampled_logprobs=logprobs, texts=texts)


def first_figures(account: Account, told: dict[str, float]) -> dict[str, float]:
    """What the peer must find as well: mean reward, KL per token, norm of the gradient; and the ratio, which is 1."""
    rollouts = account.rollouts
    kl = rollouts.mean_kl * len(rollouts.scores) / int(rollouts.mask.sum())
    return {"grad_norm": told["grad_norm"], "reward": rollouts.scores.mean().item(), "kl": kl, "ratio": told["ratio"]}


def facts(accounts: Sequence[Account]) -> dict[str, Any]:
    """The rows of the first step; how many tokens each later one drew; what a step cannot do without.

    Without gradient, that is once through the policy to draw and once through the reference.
    """
    tokens, first = accounts[0].rollouts.tokens, accounts[0].scored.samples
    rows = [ids[real].tolist() for ids, real in zip(tokens.ids, tokens.attention_mask, strict=True)]
    predicted = int(tokens.response_mask.sum())
    distinct = predicted + (int(tokens.attention_mask.sum()) - predicted) // first.n
    return {
        **token_facts(rows),
        "drawn": [int(account.rollouts.tokens.response_mask.sum()) for account in accounts[1:]],
        "distinct": distinct,
        "predicted": predicted,
        "looked_at": 2 * distinct,
        "looked_at_predicted": 2 * predicted,
    }
