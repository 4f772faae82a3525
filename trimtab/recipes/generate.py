"""`trimtab generate`: prompts in, a file of answers out."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.recipes.options import ModelOptions, SamplingOptions, check_file, check_limit, settings_of


@dataclass(frozen=True)
class Generate:
    """Writes prompt + completion rows, which `trimtab sft` and `trimtab score` read."""

    model: ModelOptions
    data: str
    """Prompts: a file, hub id, package.module:function, or a built-in name such as reviews-heldout."""
    out: str
    """The .jsonl file to write."""
    sampling: SamplingOptions = SamplingOptions()
    num_answers: int = 1
    """Answers to every prompt."""
    limit: int | None = None
    """Only the first so many prompts."""
    seed: int = 0
    """Seed of the draws."""
    skip_invalid: bool = False
    """Skip and count bad rows instead of stopping at the first."""
    overwrite: bool = False
    """Replace the file if it exists."""


def generate(config: Generate) -> None:
    """Read prompts, sample, write."""
    from trimtab.data import to_row
    from trimtab.progress import console
    from trimtab.recipes import training
    from trimtab.records import Demonstration, Prompt

    check_file(config.out, overwrite=config.overwrite)
    check_limit(config.limit)
    prompts = training.read(config.data, Prompt, skip_invalid=config.skip_invalid).records[: config.limit]
    sampler = training.sampler_of(config.sampling)
    policy = training.load_for_sampling(config)
    settings = settings_of(config.sampling)
    samples = sampler(policy, prompts, config.num_answers, seed=config.seed, progress=True, **settings)
    answers = zip(samples.row_prompts, samples.texts, samples.finished.tolist(), strict=True)
    rows = (to_row(Demonstration(prompt, text, finished=finished)) for prompt, text, finished in answers)
    training.write_rows(config.out, rows)
    cut = int((~samples.finished).sum())
    if cut:
        console.print(
            f"{cut} of {len(samples.texts)} answers were cut at --max-new-tokens {config.sampling.max_new_tokens}"
        )
