"""`trimtab best-of-n`: sample n answers to every prompt and keep the one that the reward likes best."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from trimtab.recipes.options import ModelOptions, SamplingOptions, check_file, check_limit


@dataclass(frozen=True)
class BestOfN:
    """Writes prompt + completion rows, the best answers, which `trimtab sft` distils."""

    model: ModelOptions
    reward: str
    """A reward model's run, folder or hub id, implicit:RUN, py:package.module:function, sentiment or length."""
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
    import torch

    from trimtab.data import to_row
    from trimtab.overoptimization.best_of_n import best_of, kl_bound
    from trimtab.progress import console
    from trimtab.recipes import training
    from trimtab.records import Demonstration, Prompt
    from trimtab.rewards import parse_reward
    from trimtab.sampling import sample

    check_file(config.out, overwrite=config.overwrite)
    check_limit(config.limit)
    bound = kl_bound(config.n)
    prompts = training.read(config.data, Prompt, skip_invalid=config.skip_invalid).records[: config.limit]
    reward = parse_reward(config.reward, **training.scoring(config.model))
    policy = training.load_for_sampling(config)
    samples = sample(policy, prompts, config.n, seed=config.seed, progress=True, **asdict(config.sampling))
    scores = torch.tensor(reward(samples.row_prompts, samples.answers), dtype=torch.float64).view(-1, config.n)
    rows = []
    for i, best in enumerate(best_of(scores).tolist()):
        row = i * config.n + best
        chosen = Demonstration(prompts[i], samples.texts[row], finished=bool(samples.finished[row]))
        rows.append({**to_row(chosen), "reward": scores[i, best].item(), "rewards": scores[i].tolist()})
    training.write_rows(config.out, rows)
    gain = (scores.amax(-1) - scores.mean(-1)).mean().item()
    console.print(f"best of {config.n}: {gain:+.3f} reward over the mean answer, at most {bound:.2f} nats of KL")
