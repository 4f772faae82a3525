"""Capability kept: the accuracy of a policy on questions with given answers, chosen by likelihood.

Files like MMLU, BIG-Bench-Hard and TruthfulQA (mc1), before training against after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from trimtab.evals.choices import Question, pick, share_of
from trimtab.evals.intervals import Estimate, share_difference
from trimtab.evals.rows import Located, cell, conversation, read_rows, texts
from trimtab.evals.sycophancy import share
from trimtab.records import Prompt
from trimtab.rewards import Reward

SHOTS = "dev"
"""The `split` of the rows that are shown as examples and not asked."""

FEW = 10
"""A task with at most so many different targets has these as its choices."""

LETTERED = re.compile(r"^(\([A-Z]\))", re.MULTILINE)
LISTED = re.compile(r"^- (.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Accuracy:
    """The share of questions whose right choice is taken, overall and by group; ties count as fractions."""

    scorer: str
    accuracy: Estimate
    groups: dict[str, Estimate]
    ties: int
    right: tuple[float, ...]

    def to_dict(self) -> dict[str, object]:
        """The same for JSON, without the single questions."""
        groups = {name: estimate.to_dict() for name, estimate in self.groups.items()}
        return {"scorer": self.scorer, "accuracy": self.accuracy.to_dict(), "groups": groups, "ties": self.ties}


@dataclass(frozen=True)
class Change:
    """After minus before on the same questions, paired; `lost` were right before alone, `gained` after alone."""

    difference: Estimate
    groups: dict[str, Estimate]
    lost: int
    gained: int


def multiple_choice(reward: Reward, questions: Sequence[Question], *, per_character: bool = False) -> Accuracy:
    """The accuracy of a policy (as a likelihood) or of a reward."""
    picks = pick(reward, [(question.prompt, question.choices) for question in questions], per_character=per_character)
    right = [share_of(question.right, picked) for question, picked in zip(questions, picks, strict=True)]
    groups = {name: share([right[i] for i in places]) for name, places in places_of(questions).items()}
    return Accuracy(reward.name, share(right), groups, sum(len(picked) > 1 for picked in picks), tuple(right))


def change(after: Accuracy, before: Accuracy, questions: Sequence[Question], *, seed: int = 0) -> Change:
    """What has changed between two scorers on the same questions."""
    pairs = list(zip(after.right, before.right, strict=True))
    groups = {
        name: share_difference([after.right[i] for i in places], [before.right[i] for i in places], seed)
        for name, places in places_of(questions).items()
    }
    lost, gained = (sum(sign * (late - early) > 0 for late, early in pairs) for sign in (-1, 1))
    return Change(share_difference(after.right, before.right, seed), groups, lost, gained)


def places_of(questions: Sequence[Question]) -> dict[str, list[int]]:
    """The places of each group's questions, where there is more than one group."""
    groups: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(question.group, []).append(place)
    return {name: groups[name] for name in sorted(groups)} if len(groups) > 1 else {}


# ---- Files


@dataclass(frozen=True)
class Questions:
    """The questions of a file, and how many rows have no fixed choices and were left out."""

    questions: list[Question]
    left_out: int = 0


def read_questions(source: str, *, shots: int = 5, chat: bool = False) -> Questions:
    """The questions of a file, by its columns; with `chat` asked in a user turn, else as plain text.

    question + choices + answer      MMLU: lettered choices, `shots` examples from the rows of split dev
    task + input + target            BIG-Bench-Hard: the options in the text, or the task's few targets
    question + mc1                   TruthfulQA: pairs of an answer and 1 if it is right
    prompt + choices + answer        any other; `answer` is a place from 0 or the text of a choice

    ValueError for other columns, and where `shots` could have no effect.
    """
    rows = read_rows(source)
    first = rows[0][1]
    if {"question", "choices", "answer"} <= first.keys():
        return read_mmlu(rows, shots, chat)
    if shots:
        raise ValueError(f"{source} has no rows of split {SHOTS} to show as examples: give --shots 0.")
    if {"task", "input", "target"} <= first.keys():
        return read_tasks(rows, chat)
    if {"question", "mc1"} <= first.keys():
        return Questions([read_mc1(row, chat) for row in rows])
    if {"prompt", "choices", "answer"} <= first.keys():
        return Questions([read_plain(row) for row in rows])
    forms = "question + choices + answer, task + input + target, question + mc1, or prompt + choices + answer"
    raise ValueError(f"{source}: found the columns {', '.join(first)}, expected {forms}")


def worded(text: str, row: Located, chat: bool) -> Prompt:
    """A question in a user turn or as plain text."""
    fields = {"columns": dict(row[1]), "source": row[0]}
    return Prompt.from_user(text, **fields) if chat else Prompt.from_text(text, **fields)


def spaced(choices: Sequence[str], chat: bool) -> tuple[str, ...]:
    """Choices as they follow their question: after a space in plain text."""
    return tuple(choice if chat else f" {choice}" for choice in choices)


def read_mmlu(rows: Sequence[Located], shots: int, chat: bool) -> Questions:
    """Lettered questions after examples of the same subject; the letter is the answer."""
    examples: dict[str, list[str]] = {}
    for row in rows:
        if row[1].get("split") == SHOTS:
            solved = f"{lettered(row)} {ascii_uppercase[right_place(row, texts(row, 'choices'))]}"
            examples.setdefault(str(row[1].get("subject", "")), []).append(solved)
    if shots and min((len(found) for found in examples.values()), default=0) < shots:
        raise ValueError(
            f"{rows[0][0]}: some subject has fewer than {shots} rows of split {SHOTS}: give fewer --shots."
        )
    questions = []
    for row in rows:
        if row[1].get("split") != SHOTS:
            subject, choices = str(row[1].get("subject", "")), texts(row, "choices")
            parts = [introduction(subject), *examples.get(subject, [])[:shots], lettered(row)]
            letters = spaced(ascii_uppercase[: len(choices)], chat)
            prompt = worded("\n\n".join(parts), row, chat)
            questions.append(Question(prompt, letters, right_place(row, choices), subject))
    if not questions:
        raise ValueError(f"{rows[0][0]}: all rows are of split {SHOTS}, so nothing is asked")
    return Questions(questions)


def introduction(subject: str) -> str:
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    return f"The following are multiple choice questions (with answers){about}."


def lettered(row: Located) -> str:
    """A question with its choices under A, B, C, ... up to where the answer follows."""
    choices = texts(row, "choices")
    lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([cell(row, "question", str).strip(), *lines, "Answer:"])


def right_place(row: Located, choices: Sequence[str]) -> int:
    """The place of the right choice, given as a number from 0 or as its text."""
    answer = row[1].get("answer")
    if isinstance(answer, str) and answer in choices:
        return list(choices).index(answer)
    return cell(row, "answer", int, lambda place: 0 <= place < len(choices))


def read_tasks(rows: Sequence[Located], chat: bool) -> Questions:
    """Questions whose choices stand in their text, or are the few targets of their task; others are left out."""
    targets: dict[str, dict[str, None]] = {}
    for row in rows:
        targets.setdefault(cell(row, "task", str), {})[cell(row, "target", str)] = None
    questions, left_out = [], 0
    for row in rows:
        task, target, text = (cell(row, name, str) for name in ("task", "target", "input"))
        choices = LETTERED.findall(text) or LISTED.findall(text) or few(targets[task])
        if target in choices:
            prompt = worded(f"Q: {text}\nA:", row, chat)
            questions.append(Question(prompt, spaced(choices, chat), choices.index(target), task))
        else:
            left_out += 1
    if not questions:
        raise ValueError(f"{rows[0][0]}: no row has a fixed set of choices that holds its target")
    return Questions(questions, left_out)


def few(targets: Mapping[str, None]) -> list[str]:
    """The targets of a task as its choices, if they are few and no numbers: numbers are answers to be found."""
    numbers = any(target.lstrip("-").isdecimal() for target in targets)
    return [] if numbers or len(targets) > FEW else sorted(targets)


def read_mc1(row: Located, chat: bool) -> Question:
    """A question with answers of which one is right."""
    pairs = cell(row, "mc1", list)
    right = [place for place, pair in enumerate(pairs) if pair[1]]
    if len(right) != 1:
        raise ValueError(f"{row[0]}: mc1: found {len(right)} right answers, expected one")
    choices = spaced([str(answer) for answer, _ in pairs], chat)
    return Question(worded(f"Q: {cell(row, 'question', str)}\nA:", row, chat), choices, right[0])


def read_plain(row: Located) -> Question:
    """A prompt as it stands (a text as plain text) and choices as they stand."""
    value, choices = row[1].get("prompt"), texts(row, "choices")
    prompt = (
        Prompt.from_text(value, columns=dict(row[1]), source=row[0]) if isinstance(value, str) else conversation(row)
    )
    return Question(prompt, tuple(choices), right_place(row, choices), str(row[1].get("group", "")))
