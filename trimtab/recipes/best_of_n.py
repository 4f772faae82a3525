"""`trimtab best-of-n`: sample n answers to every prompt and keep the one that the reward likes best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from trimtab.recipes.options import (
    ModelOptions,
    RewardChoice,
    SamplingOptions,
    check_file,
    check_limit,
    settings_of,
)

if TYPE_CHECKING:
    from trimtab.sampling import Samples


@dataclass(frozen=True)
class BestOfN:
    """Writes prompt + completion rows, the best answers, which `trimtab sft` distils."""

    model: ModelOptions
    reward: RewardChoice
    data: str
    """Prompts: a file, hub id, package.module:function, or a built-in name such as reviews-heldout."""
    out: str
    """The .jsonl file to write."""
    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 16
    """Answers to choose from."""
    sampling: SamplingOptions = SamplingOptions()
    limit: int | None = None
    """Only the first so many prompts."""
    seed: int = 0
    """Seed of the draws."""
    skip_invalid: bool = False
    """Skip and count bad rows instead of stopping at the first."""
    overwrite: bool = False
    """Replace the file if it exists."""


def best_of_n(config: BestOfN) -> None:
    """Read prompts, sample, score, choose, write."""
    from trimtab.overoptimization.best_of_n import kl_bound
    from trimtab.progress import console
    from trimtab.recipes import training
    from trimtab.records import Prompt
    from trimtab.rewards import parse_rewards

    check_file(config.out, overwrite=config.overwrite)
    check_limit(config.limit)
    bound = kl_bound(config.n)
    prompts = training.read(config.data, Prompt, skip_invalid=config.skip_invalid).records[: config.limit]
    reward = parse_rewards(config.reward.reward, config.reward.reward_weights, **training.scoring(config.model))
    sampler = training.sampler_of(config.sampling)
    policy = training.load_for_sampling(config)
    samples = sampler(policy, prompts, config.n, seed=config.seed, progress=True, **settings_of(config.sampling))
    rewards = reward(samples.row_prompts, samples.answers)
    rows, gains = best_rows(samples, rewards)
    if not rows:
        raise ValueError(f"reward {reward.name} left out every answer, so there is none to choose")
    training.write_rows(config.out, rows)
    left_out = sum(value is None for value in rewards)
    if left_out:
        console.print(
            f"the reward left out {left_out} of {len(rewards)} answers; "
            f"{len(prompts) - len(rows)} prompts have no other answer and so no row"
        )
    gain = sum(gains) / len(gains)
    console.print(f"best of {config.n}: {gain:+.3f} reward over the mean answer, at most {bound:.2f} nats of KL")


def best_rows(samples: Samples, rewards: Sequence[float | None]) -> tuple[list[dict[str, Any]], list[float]]:
    """A row for every prompt with a scored answer, and how much more reward its best answer has than their mean."""
    from statistics import fmean

    from trimtab.data import to_row
    from trimtab.records import Demonstration

    rows, gains, answers = [], [], samples.answers
    for i, prompt in enumerate(samples.prompts):
        given = list(rewards[i * samples.n : (i + 1) * samples.n])
        scored = [value for value in given if value is not None]
        if scored:
            best = given.index(max(scored))
            answer = answers[i * samples.n + best]
            chosen = Demonstration(prompt, answer.text, finished=answer.finished)
            rows.append({**to_row(chosen), "reward": max(scored), "rewards": given})
            gains.append(max(scored) - fmean(scored))
    return rows, gains
