"""`trimtab evaluate diversity`: how much the answers of a file differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.evals.diversity import Diversity, Embed
    from trimtab.evals.intervals import Estimate


@dataclass(frozen=True)
class EvaluateDiversity:
    """Distinct n-grams (expectation-adjusted, n = 1..5), and where asked self-BLEU and embeddings.

    Per input: among the answers to one prompt. Across inputs: among the first answers to all prompts. Compare only what
    was sampled at one temperature with as many answers to a prompt.
    """

    data: str
    """Rows with prompt + completion, several to a prompt: what `trimtab generate --num-answers 16` writes."""
    before: str | None = None
    """Answers of another model to the same prompts: what has changed, paired by prompt."""
    self_bleu: bool = False
    """Also self-BLEU; needs sacrebleu (pip install '.[eval]')."""
    embedder: str | None = None
    """Also 1 - mean cosine of embeddings: the folder or hub id of a transformer, whose states are averaged."""
    max_words: int | None = None
    """Cut answers to so many words separated by spaces, for equal budgets."""
    vocabulary: int = 50257
    """The size of the vocabulary that distinct n-grams are adjusted for."""
    device: str = "auto"
    """Where the embedder computes: cpu, cuda, ...; auto is cuda where there is one."""
    seed: int = 0
    """Seed of the bootstrap."""
    skip_invalid: bool = False
    """Skip and count bad rows instead of stopping at the first."""
    json: bool = False
    """Print one JSON object instead of tables."""


def evaluate_diversity(config: EvaluateDiversity) -> None:
    """Read answers, measure, print."""
    from trimtab.evals.diversity import check_sacrebleu, diversity
    from trimtab.evals.intervals import to_json
    from trimtab.recipes.figures import print_json

    if config.self_bleu:
        check_sacrebleu()
    if config.max_words is not None and config.max_words < 1:
        raise ValueError(f"--max-words {config.max_words}: at least 1 is needed.")
    groups = read_groups(config.data, config)
    before = read_groups(config.before, config) if config.before is not None else None
    embed = load_embed(config)
    settings = {"vocabulary": config.vocabulary, "embed": embed, "seed": config.seed}
    found = diversity(list(groups.values()), bleu=config.self_bleu, **settings)
    changed = None if before is None else change(groups, before, config, embed)
    if config.json:
        print_json({"data": config.data, "before": config.before, "change": to_json(changed)}, found)
    else:
        print_diversity(config.data, found, changed)


def load_embed(config: EvaluateDiversity) -> Embed | None:
    """The embedder, if one was given."""
    from trimtab.evals.embedder import load_embedder

    return None if config.embedder is None else load_embedder(config.embedder, device=config.device)


def read_groups(source: str, config: EvaluateDiversity) -> dict[object, list[str]]:
    """The answers of a file by their prompts, in the order in which these come first."""
    from trimtab.recipes import training
    from trimtab.records import Demonstration

    groups: dict[object, list[str]] = {}
    for record in training.read(source, Demonstration, skip_invalid=config.skip_invalid).records:
        text = record.response
        if config.max_words is not None:
            text = " ".join(text.split()[: config.max_words])
        groups.setdefault(record.prompt.messages, []).append(text)
    return groups


def change(
    after: dict[object, list[str]], before: dict[object, list[str]], config: EvaluateDiversity, embed: Embed | None
) -> dict[str, Estimate]:
    """What the per-input diversity has changed by, over the prompts that both files have."""
    from trimtab.evals.diversity import diversity_difference, measures

    shared = [prompt for prompt in after if prompt in before]
    if not shared:
        raise ValueError(f"{config.data} and {config.before} have no prompt in common, so nothing can be compared.")
    uneven = next((prompt for prompt in shared if len(after[prompt]) != len(before[prompt])), None)
    if uneven is not None:
        raise ValueError(
            f"{config.data} has {len(after[uneven])} answers to a prompt to which {config.before} has "
            f"{len(before[uneven])}: diversity depends on their number, so give as many of both."
        )
    named = measures(vocabulary=config.vocabulary, bleu=config.self_bleu, embed=embed)
    late, early = ([groups[prompt] for prompt in shared] for groups in (after, before))
    return diversity_difference(late, early, named, seed=config.seed)


def print_diversity(title: str, found: Diversity, changed: dict[str, Estimate] | None) -> None:
    """One table each per input, across inputs, and for what has changed."""
    from trimtab.recipes.figures import print_estimates, say

    if found.per_input:
        print_estimates(f"{title}: per input", found.per_input, counted="prompts")
    else:
        say(f"{title}: no prompt has two answers that can be compared")
    print_estimates("across inputs, the first answers", found.across_inputs, counted="prompts")
    if changed is not None:
        print_estimates("per input, after minus before", changed, counted="prompts")
