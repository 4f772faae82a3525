"""Verdicts that somebody's judge wrote down: the files of AlpacaEval and of MT-bench.

AlpacaEval's annotations have `instruction`, `output_1`, `generator_1`, `output_2`, `generator_2` and `preference`, a
number from 1 to 2 (2: the second output is better; 1.5, and in old files 0, is a tie; null could not be read). The
second generator is the one that is evaluated. `trimtab evaluate win-rate --out` writes this form.

MT-bench's pairwise judgments have `question_id`, `turn`, `model_1`, `model_2`, `g1_winner` and `g2_winner`, the winner
in each order; its human ones have `model_a`, `model_b` and one `winner`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.data.files import Problem, Row, read_rows, shorten
from trimtab.evals.win_rate import TIE, Judged
from trimtab.judges import Verdict
from trimtab.records import Comparison

ALPACA = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "preference")
PAIRWISE = ("question_id", "model_1", "model_2", "g1_winner", "g2_winner")
HUMAN = ("question_id", "model_a", "model_b", "winner")
UNREAD = "error"

Orders = tuple[Judged, Verdict | None]
"""A comparison with its verdict in both orders, where the file has them."""


def read_judged(source: str) -> list[Orders]:
    """The comparisons of a file in any of the three forms, the evaluated system first.

    FileNotFoundError or ValueError for what is no such file.
    """
    if not Path(source).is_file():
        raise FileNotFoundError(f"--verdicts {source}: there is no such file")
    rows = [judged_row(where, row) for where, row in read_rows(Path(source))]
    if not rows:
        raise ValueError(f"{source}: found no rows, expected at least one")
    return rows


def judged_row(where: str, row: Row | Problem) -> Orders:
    """One row, by the form that its columns are of."""
    if isinstance(row, Problem):
        raise ValueError(str(row))
    for columns, read in ((ALPACA, alpaca), (PAIRWISE, pairwise), (HUMAN, human)):
        if all(name in row for name in columns):
            return read(where, row)
    forms = "; ".join(" + ".join(f"`{name}`" for name in columns) for columns in (ALPACA, PAIRWISE, HUMAN))
    raise ValueError(f"{where}: columns: found {', '.join(row) or 'none'}. Expected one of: {forms}")


def alpaca(where: str, row: Row) -> Orders:
    """A row of AlpacaEval's annotations, told from the second generator's side."""
    value = row["preference"]
    value = None if isinstance(value, float) and math.isnan(value) else value  # as pandas writes a missing one
    if value is not None and not (isinstance(value, int | float) and (value == 0 or 1 <= value <= 2)):
        raise bad(where, "preference", value, "a number from 1 to 2, 0 (a tie) or null")
    p = None if value is None else TIE if value == 0 else float(value) - 1
    prompt, first, second = (text(where, row, name) for name in ("instruction", "generator_2", "generator_1"))
    first_length, second_length = (len(text(where, row, name)) for name in ("output_2", "output_1"))
    return Judged(prompt, first, second, p, first_length, second_length), None


def pairwise(where: str, row: Row) -> Orders:
    """A row of MT-bench's pairwise judgments: the mean of both orders, None where one could not be read."""
    values = [winner(where, row, name, "model_1", "model_2") for name in ("g1_winner", "g2_winner")]
    verdict = Verdict(*values)
    return Judged(row["question_id"], text(where, row, "model_1"), text(where, row, "model_2"), verdict.value), verdict


def human(where: str, row: Row) -> Orders:
    """A row of MT-bench's human judgments; where conversations stand in it, their lengths as well."""
    return Judged(
        row["question_id"],
        text(where, row, "model_a"),
        text(where, row, "model_b"),
        winner(where, row, "winner", "model_a", "model_b"),
        said_by_assistant(row.get("conversation_a")),
        said_by_assistant(row.get("conversation_b")),
    ), None


def winner(where: str, row: Row, name: str, first: str, second: str) -> float | None:
    """What a winner's name says; anything that begins with tie is one, `error` was not read."""
    said = row[name]
    if isinstance(said, str) and said.startswith("tie"):
        return TIE
    known = {first: 1.0, second: 0.0, UNREAD: None}
    if said not in known:
        raise bad(where, name, said, f"{first}, {second}, tie or {UNREAD}")
    return known[said]


def said_by_assistant(conversation: Any) -> int | None:
    """Characters of all assistant turns of a conversation; None where there is none."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        return None
    turns = [turn for turn in conversation if isinstance(turn, Mapping) and turn.get("role") == "assistant"]
    return sum(len(str(turn.get("content", ""))) for turn in turns) if turns else None


def text(where: str, row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise bad(where, name, row[name], "text")
    return row[name]


def bad(where: str, name: str, value: Any, expected: str) -> ValueError:
    """The error of a field that holds something else than it should."""
    return ValueError(f"{where}: {name}: found {shorten(value)}, expected {expected}")


def alpaca_rows(judge: str, comparisons: Sequence[Comparison], judged: Sequence[Judged]) -> Iterator[dict[str, Any]]:
    """Judged comparisons as AlpacaEval writes them."""
    for asked, row in zip(comparisons, judged, strict=True):
        yield {
            "instruction": asked.prompt.text,
            "output_1": asked.second.text,
            "generator_1": row.second,
            "output_2": asked.first.text,
            "generator_2": row.first,
            "annotator": judge,
            "preference": None if row.p is None else 1 + row.p,
        }
