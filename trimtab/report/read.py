"""What the report knows about a run: the files of its directory, read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory tells it: text files as they stand, .jsonl files as rows."""

    name: str
    config: str
    environment: Mapping[str, Any]
    metrics: Rows
    evals: Rows
    samples: Rows


def read_run(directory: Path) -> RunRecord:
    """The run in `directory`; evaluations and samples may be absent.

    Raises FileNotFoundError naming the run and the file, ValueError naming the line that is not a JSON object.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"No run directory at '{directory}'. Give the --out directory of a trimtab command.")
    return RunRecord(
        name=directory.resolve().name,
        config=_required(directory, "config.yaml").read_text(encoding="utf-8"),
        environment=json.loads(_required(directory, "environment.json").read_text(encoding="utf-8")),
        metrics=read_rows(_required(directory, "metrics.jsonl")),
        evals=_optional_rows(directory / "evals.jsonl"),
        samples=_optional_rows(directory / "samples.jsonl"),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, one a line."""
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 inside a string ends no row
    return [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number} is not JSON ({error.msg}). Was the run cut off? Remove the line.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{number} holds {type(row).__name__}, but every line must be a JSON object.")
    return row


def _required(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(
            f"Run '{directory}' has no {name}, so it is not a finished trimtab run. "
            "Give the --out directory of a trimtab command that trained a model."
        )
    return path


def _optional_rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.is_file() else []
