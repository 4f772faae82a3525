"""`trimtab evaluate sycophancy`: whether what the user believes decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.recipes.evaluated import ScorerOptions
from trimtab.recipes.options import check_limit

if TYPE_CHECKING:
    from trimtab.evals.sycophancy import OpinionMatch, Sycophancy


@dataclass(frozen=True)
class EvaluateSycophancy:
    """Accuracy with neutral, right-hint and wrong-hint prompts, flips under challenge, or matching a stated opinion.

    Which of them depends on the columns of --data.
    """

    scorer: ScorerOptions
    data: str
    """Rows with prompt_neutral, prompt_user_right, prompt_user_wrong, choice_a, choice_b and correct; or with prompt,
    matching and not_matching."""
    limit: int | None = None
    """Only the first so many rows."""
    json: bool = False
    """Print one JSON object instead of a table."""


def evaluate_sycophancy(config: EvaluateSycophancy) -> None:
    """Read questions, choose, compare, print."""
    from trimtab.evals.sycophancy import Hinted, Opinion, Sycophancy, opinion_match, read_sycophancy, sycophancy
    from trimtab.recipes.evaluated import load_scorer
    from trimtab.recipes.figures import print_json

    check_limit(config.limit)
    questions = read_sycophancy(config.data)[: config.limit]
    scorer = load_scorer(config.scorer)
    hinted = [question for question in questions if isinstance(question, Hinted)]
    opinions = [question for question in questions if isinstance(question, Opinion)]
    found = sycophancy(scorer, hinted) if hinted else opinion_match(scorer, opinions)
    if config.json:
        print_json({"data": config.data}, found)
    elif isinstance(found, Sycophancy):
        print_sycophancy(found)
    else:
        print_opinions(found)


def print_sycophancy(found: Sycophancy) -> None:
    """Accuracies, what hints and the challenge change, and a sentence."""
    from trimtab.recipes.figures import print_estimates, say

    names = {"neutral": "no hint", "right_hint": "right hint", "wrong_hint": "wrong hint", "doubt": "the right doubted"}
    rows = {f"accuracy, {names[way]}": estimate for way, estimate in found.accuracy.items()}
    changes = {
        "sycophancy: no hint minus wrong hint": found.sycophancy,
        "right hint minus wrong hint": found.hint_effect,
        "answers that flip when challenged": found.flips,
        "of right answers": found.flips_from_right,
        "of wrong answers": found.flips_from_wrong,
        "first choice taken beyond being right": found.first_choice,
    }
    print_estimates(found.scorer, {**rows, **changes}, counted="questions")
    say("wrong hints lower its accuracy" if found.found else "no clear sycophancy: the interval reaches zero")
    if found.ties:
        say(f"{found.ties} choices tied; they count as fractions")


def print_opinions(found: OpinionMatch) -> None:
    """How often the matching answer was chosen."""
    from trimtab.recipes.figures import print_estimates, say

    rows = {"matching answer chosen": found.matching, **found.groups, "first choice taken": found.first_choice}
    print_estimates(found.scorer, rows, counted="questions")
    said = "it matches more often than by chance" if found.found else "not clearly more often than by chance, 0.5"
    say(said)
    if found.ties:
        say(f"{found.ties} choices tied; they count as halves")
