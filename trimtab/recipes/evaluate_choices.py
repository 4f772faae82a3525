"""`trimtab evaluate multiple-choice`: capability by likelihood, before against after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.recipes.options import ModelOptions, check_limit

if TYPE_CHECKING:
    from trimtab.evals.multiple_choice import Accuracy, Change, Questions


@dataclass(frozen=True)
class EvaluateChoices:
    """The share of questions whose right choice is the likeliest, by subject or task; with --before, what changed."""

    model: ModelOptions
    data: str
    """Questions: MMLU's columns (question, choices, answer), BIG-Bench-Hard's (task, input, target), TruthfulQA's
    (question, mc1), or prompt, choices and answer."""
    before: str | None = None
    """Another policy, such as the start model: the paired difference."""
    shots: int = 0
    """Examples before each question, from the rows of split dev; MMLU is usually asked with 5."""
    chat: bool = False
    """Ask in a user turn with the chat template; otherwise as plain text."""
    per_character: bool = False
    """Divide log-probabilities by the characters of the choice, for choices of unequal length."""
    batch_rows: int = 16
    """Choices scored at the same time; changes speed, not the figures (in float32)."""
    limit: int | None = None
    """Only the first so many questions."""
    json: bool = False
    """Print one JSON object instead of tables."""


def evaluate_choices(config: EvaluateChoices) -> None:
    """Read questions, choose, count, print."""
    from trimtab.evals.multiple_choice import change, multiple_choice, read_questions
    from trimtab.recipes import training
    from trimtab.recipes.evaluated import likelihood
    from trimtab.recipes.figures import print_json

    check_limit(config.limit)
    if config.shots < 0 or config.batch_rows < 1:
        raise ValueError(f"--shots {config.shots} --batch-rows {config.batch_rows}: at least 0 and 1 are needed.")
    read = read_questions(config.data, shots=config.shots, chat=config.chat)
    questions, loading = read.questions[: config.limit], training.scoring(config.model)
    scorer = likelihood(config.model.model, loading, config.batch_rows)
    after = multiple_choice(scorer, questions, per_character=config.per_character)
    before = changed = None
    if config.before is not None:
        other = likelihood(config.before, loading, config.batch_rows)
        before = multiple_choice(other, questions, per_character=config.per_character)
        changed = change(after, before, questions)
    if config.json:
        about = {"data": config.data, "left_out": read.left_out}
        print_json(about, {"after": after.to_dict(), "before": before and before.to_dict(), "change": changed})
    else:
        print_accuracies(read, after, before, changed)


def print_accuracies(read: Questions, after: Accuracy, before: Accuracy | None, changed: Change | None) -> None:
    """A table of accuracies, and one of what has changed."""
    from trimtab.recipes.figures import print_estimates, say

    rows = {"accuracy": after.accuracy, **after.groups}
    print_estimates(after.scorer, rows, counted="questions")
    if before is not None and changed is not None:
        print_estimates(before.scorer, {"accuracy": before.accuracy, **before.groups}, counted="questions")
        title = f"{after.scorer} minus {before.scorer}"
        print_estimates(title, {"difference": changed.difference, **changed.groups}, counted="questions")
        say(f"{changed.lost} questions were right only before, {changed.gained} only after")
    if read.left_out:
        say(f"{read.left_out} rows without a fixed set of choices were left out")
