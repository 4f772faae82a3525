"""`trimtab evaluate drift`: how far a policy has moved from its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.recipes.options import ModelOptions, check_limit

if TYPE_CHECKING:
    from trimtab.evals.drift import FullDrift


@dataclass(frozen=True)
class EvaluateDrift:
    """KL (exact), entropy, perplexity under the reference, length, repetition and answers without end.

    The policy answers every prompt, plainly (temperature 1). Intervals are over prompts.
    """

    model: ModelOptions
    data: str
    """Prompts: a file, hub id, package.module:function, or a built-in name such as reviews-heldout."""
    reference: str | None = None
    """The model that it is compared with; a run's start model unless given."""
    num_answers: int = 4
    """Answers to every prompt."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    batch_rows: int = 32
    """Answers sampled and measured at the same time; changes speed, not the figures (in float32)."""
    limit: int | None = None
    """Only the first so many prompts."""
    seed: int = 0
    """Seed of the draws."""
    skip_invalid: bool = False
    """Skip and count bad rows instead of stopping at the first."""
    json: bool = False
    """Print one JSON object instead of a table."""


def evaluate_drift(config: EvaluateDrift) -> None:
    """Read prompts, sample, measure, print."""
    from trimtab.evals.drift import full_drift
    from trimtab.models import load_policy
    from trimtab.recipes import training
    from trimtab.recipes.evaluated import check_same_vocabulary, start_model
    from trimtab.recipes.figures import print_json
    from trimtab.records import Prompt
    from trimtab.sampling import sample

    check_limit(config.limit)
    name = start_model(config.model.model, config.reference)
    prompts = training.read(config.data, Prompt, skip_invalid=config.skip_invalid).records[: config.limit]
    policy = training.load_for_sampling(config)
    reference = load_policy(name, **training.scoring(config.model))
    check_same_vocabulary(policy, reference, (config.model.model, name))
    samples = sample(
        policy,
        prompts,
        config.num_answers,
        max_new_tokens=config.max_new_tokens,
        batch_rows=config.batch_rows,
        seed=config.seed,
        progress=True,
    )
    found = full_drift(policy, reference, samples, batch_rows=config.batch_rows, seed=config.seed)
    if config.json:
        print_json({"model": config.model.model, "reference": name, "data": config.data}, found)
    else:
        print_drift(f"{config.model.model} from {name}", found)


def print_drift(title: str, found: FullDrift) -> None:
    """Every figure with its unit."""
    from trimtab.recipes.figures import print_estimates

    rows = {
        "KL, nats per answer (exact)": found.drift.kl,
        "KL, nats per answer (log-ratios)": found.sampled_kl,
        "KL, nats per token (exact)": found.drift.kl_per_token,
        "entropy, nats per token": found.entropy,
        "perplexity under the reference": found.reference_perplexity,
        "length, tokens": found.drift.length,
        "repeated 4-grams, share": found.repetition,
        "without an end, share of answers": found.drift.unfinished,
    }
    print_estimates(title, rows, counted="prompts")
