"""The answers of systems that are to be compared, by prompt: from files, AlpacaEval's and MT-bench's among them.

AlpacaEval's outputs (`instruction` + `output` + `generator`) are rows of prompt and answer as any others. MT-bench
keeps questions and answers apart: `question_id` + `turns`, and `question_id` + `model_id` + `choices`. Each of its
turns is a comparison of its own; in the second, the judge reads both questions, and of each system both answers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab import data
from trimtab.data.files import Problem, Row, read_rows
from trimtab.data.sources import READERS, suffix_of
from trimtab.records import TEXT, Answer, Comparison, Demonstration, Message, Prompt

Key = Hashable
"""What answers to the same prompt are found by."""


@dataclass(frozen=True)
class System:
    """A name, and the answers it gave: to each prompt one, or several in their order."""

    name: str
    answers: Mapping[Key, Sequence[Answer]] = field(repr=False)
    prompts: Mapping[Key, Prompt] = field(repr=False)
    """The prompts that its file tells; none for MT-bench's answers, whose questions stand in another file."""


@dataclass(frozen=True)
class Shared:
    """Two systems' answers to the same prompts, and how many answers of either have no counterpart."""

    comparisons: list[Comparison]
    prompts: list[Key]
    left_out: int


def key_of(prompt: Prompt) -> Key:
    """Who said what; a string and one user turn with the same words are the same prompt."""
    return tuple(("user" if message.role == TEXT else message.role, message.content) for message in prompt.messages)


def is_file(source: str) -> bool:
    """Whether the source of a system is a file of answers, not a model."""
    return suffix_of(Path(source)) in READERS


def read_system(name: str, source: str, *, skip_invalid: bool = False) -> System:
    """The answers in a file. ValueError for rows without answers."""
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: there is no such file of answers")
    if has_columns(source, "choices", "question_id"):
        return System(name, dict(bench_answers(source)), {})
    answers: dict[Key, list[Answer]] = {}
    prompts: dict[Key, Prompt] = {}
    for row in data.load(source, Demonstration, skip_invalid=skip_invalid).records:
        key = key_of(row.prompt)
        prompts.setdefault(key, row.prompt)
        answers.setdefault(key, []).append(Answer(row.response, row.finished))
    return System(name, answers, prompts)


def has_columns(source: str, *names: str) -> bool:
    """Whether the first row of a file has these columns."""
    first = next(iter(read_rows(Path(source))), None)
    return first is not None and isinstance(first[1], Mapping) and all(name in first[1] for name in names)


def bench_rows(source: str) -> Iterator[tuple[str, Row, list[str]]]:
    """The rows of a file of MT-bench, each with its turns: of the question, or of the first choice."""
    for where, row in read_rows(Path(source)):
        if isinstance(row, Problem):
            raise ValueError(str(row))
        try:
            turns: Any = row["choices"][0]["turns"] if "choices" in row else row["turns"]
        except (LookupError, TypeError):
            turns = None
        if "question_id" not in row or not isinstance(turns, list) or not all(isinstance(t, str) for t in turns):
            raise ValueError(f"{where}: expected `question_id` and `turns`, or `choices` with `turns`, as in MT-bench")
        yield where, row, turns


def bench_answers(source: str) -> Iterator[tuple[Key, list[Answer]]]:
    """The answers to every question and turn."""
    for _, row, turns in bench_rows(source):
        yield (row["question_id"], 1), [Answer(turns[0])]
        for turn in range(2, len(turns) + 1):
            told = "\n\n".join(f"[answer {i}]\n{text}" for i, text in enumerate(turns[:turn], start=1))
            yield (row["question_id"], turn), [Answer(told)]


def bench_prompts(source: str) -> dict[Key, Prompt]:
    """The questions up to every turn, as a judge reads them."""
    prompts: dict[Key, Prompt] = {}
    for where, row, turns in bench_rows(source):
        for turn in range(1, len(turns) + 1):
            asked = tuple(Message("user", text) for text in turns[:turn])
            prompts[row["question_id"], turn] = Prompt(asked, source=where)
    return prompts


def read_prompts(source: str, *, skip_invalid: bool = False) -> dict[Key, Prompt]:
    """The prompts of a source by their keys: MT-bench's questions, or any rows with prompts."""
    if Path(source).is_file() and has_columns(source, "question_id", "turns"):
        return bench_prompts(source)
    records = data.load(source, Prompt, skip_invalid=skip_invalid).records
    return {key_of(prompt): prompt for prompt in records}


def shared(first: System, second: System, prompts: Mapping[Key, Prompt]) -> Shared:
    """The comparisons of two systems on these prompts: first answer with first, second with second."""
    comparisons, keys, left_out = [], [], 0
    for key, prompt in prompts.items():
        ours, theirs = first.answers.get(key, ()), second.answers.get(key, ())
        left_out += abs(len(ours) - len(theirs))
        for one, other in zip(ours, theirs, strict=False):
            comparisons.append(Comparison(prompt, one, other))
            # The turns of one question belong together.
            keys.append(key[0] if isinstance(key, tuple) and len(key) == 2 and isinstance(key[1], int) else key)
    return Shared(comparisons, keys, left_out)
