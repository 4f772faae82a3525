"""`trimtab evaluate agreement`: how far annotators agree, and whether one reward can be behind what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from trimtab.evals.annotators import Agreement

ANNOTATORS_SHOWN = 20


@dataclass(frozen=True)
class EvaluateAgreement:
    """Raw agreement, Cohen's kappa, Krippendorff's alpha, each annotator against the majority, circles."""

    data: str
    """Preferences with a column annotator, or with all votes of a pair in a row (annotators, votes)."""
    seed: int = 0
    """Seed of the intervals and of the simulations."""
    json: bool = False
    """Print one JSON object instead of tables."""
    skip_invalid: bool = False
    """Skip bad rows instead of stopping at the first."""


def evaluate_agreement(config: EvaluateAgreement) -> None:
    """Read votes, measure, print."""
    import json

    from rich.console import Console

    from trimtab.data.votes import read_votes
    from trimtab.evals.annotators import agreement

    found = agreement(read_votes(config.data, skip_invalid=config.skip_invalid), seed=config.seed)
    if config.json:
        print(json.dumps({"data": config.data, **found.to_dict()}, indent=2))
    else:
        print_tables(found, config.data, Console(highlight=False))


def print_tables(found: Agreement, source: str, console: Console) -> None:
    """Agreement overall, each annotator against the majority, and what the circles say."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(source), box=None)
    table.add_column("agreement")
    table.add_column("[95 % interval]", justify="right")
    table.add_column("of", justify="right")
    table.add_row("pairs of votes that agree", f"{found.raw:.3f}", f"{found.raw.count} items")
    table.add_row("Krippendorff's alpha", f"{found.alpha:.3f}", f"{found.alpha.count} items")
    kappa = f"{found.kappa:.3f}" if found.kappa_pairs else "too few items in common"
    table.add_row("Cohen's kappa, mean", kappa, f"{found.kappa_pairs} pairs of annotators")
    console.print(table)
    each = Table(title="each against the others' majority", box=None)
    for title in ("annotator", "agrees [95 % interval]", "items"):
        each.add_column(title, justify="left" if title == "annotator" else "right")
    for name, estimate in list(found.annotators.items())[:ANNOTATORS_SHOWN]:
        each.add_row(escape(name), f"{estimate:.3f}", str(estimate.count))
    console.print(each)
    if len(found.annotators) > ANNOTATORS_SHOWN:
        console.print(f"and {len(found.annotators) - ANNOTATORS_SHOWN} more (--json has them all)")
    for sentence in sentences(found):
        console.print(sentence, soft_wrap=True, markup=False)


def sentences(found: Agreement) -> list[str]:
    """What is not a table."""
    told = [f"{found.votes} votes on {found.items} items, {found.shared_items} of them by two annotators or more"]
    counted = {
        "items with as many votes for one side as for the other": found.split,
        "items that one annotator judged both ways": found.contradictions,
        "circles among majorities": found.cycles,
    }
    for what, one in counted.items():
        told.append(f"{one.count} {what}" + (f" (such as {one.examples[0]})" if one.examples else ""))
    return [*told, one_reward(found)]


def one_reward(found: Agreement) -> str:
    """The transitivity test in words."""
    test = found.transitivity
    if test.share is None:
        return "one latent reward? No three answers to a prompt were all compared: nothing can be said."
    seen = f"{test.circular} of {test.triads} triads are circular ({test.share:.1%}; coin flips would give 25 %)"
    if test.p_value is None:
        return f"one latent reward? {seen}, but no two answers have two votes: errors cannot be told from circles."
    verdict = "no" if test.p_value < 0.05 else "nothing speaks against it"
    return (
        f"one latent reward? {verdict}: {seen}; one reward with as many errors would give {test.expected:.1%} "
        f"[{test.low:.1%}, {test.high:.1%}], p = {test.p_value:.3f}"
    )
