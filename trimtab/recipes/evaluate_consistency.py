"""`trimtab evaluate consistency`: position bias of judges, and choices under paraphrase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.recipes.evaluated import ScorerOptions
from trimtab.recipes.options import check_limit

if TYPE_CHECKING:
    from trimtab.evals.consistency import JudgeConsistency


@dataclass(frozen=True)
class EvaluateConsistency:
    """With a column `verdicts`, what the order of two answers does to each judge; with `paraphrases`, whether a policy
    or a reward chooses the same answer in every wording."""

    data: str
    """Rows with verdicts = {judge: [in this order, exchanged]}, or with prompt, paraphrases and choices."""
    scorer: ScorerOptions = ScorerOptions()
    limit: int | None = None
    """Only the first so many rows of paraphrases."""
    json: bool = False
    """Print one JSON object instead of tables."""


def evaluate_consistency(config: EvaluateConsistency) -> None:
    """Read verdicts or paraphrases, compare, print."""
    from trimtab.evals.consistency import judge_consistency, read_verdicts
    from trimtab.evals.rows import read_rows
    from trimtab.recipes.figures import print_json

    check_limit(config.limit)
    if "verdicts" not in read_rows(config.data)[0][1]:
        return evaluate_paraphrases(config)
    if config.scorer != ScorerOptions() or config.limit is not None:
        raise ValueError("verdicts are in the file: --model, --reward and --limit have no effect on them.")
    found = [judge_consistency(judge, pairs) for judge, pairs in read_verdicts(config.data).items()]
    if config.json:
        print_json({"data": config.data}, {"judges": found})
        return
    for one in found:
        print_judge(one)


def evaluate_paraphrases(config: EvaluateConsistency) -> None:
    """The same for wordings of questions."""
    from trimtab.evals.consistency import paraphrase_consistency, read_paraphrases
    from trimtab.recipes.evaluated import load_scorer
    from trimtab.recipes.figures import print_estimates, print_json, say

    questions = read_paraphrases(config.data)[: config.limit]
    found = paraphrase_consistency(load_scorer(config.scorer), questions)
    if config.json:
        print_json({"data": config.data}, found)
        return
    rows = {"two wordings agree": found.agreement, "all wordings agree": found.unanimous}
    print_estimates(found.scorer, rows, unit="share", counted="questions")
    if found.ties:
        say(f"{found.ties} wordings in which the best answers tie; they agree with nothing")


def print_judge(found: JudgeConsistency) -> None:
    """One judge's figures and a sentence on its position bias."""
    from trimtab.recipes.figures import print_estimates, say

    rows = {
        "one verdict in both orders": found.consistent,
        "the answer shown first wins (0.5: no position bias)": found.position.first_wins,
        "accuracy, mean of both orders": found.accuracy,
        "right in both orders": found.right_both,
    }
    print_estimates(found.judge, rows)
    if found.position.found:
        say(f"it favours the answer that is shown {found.position.found}")
    if found.unreadable:
        say(f"{found.unreadable} verdicts could not be read")
