"""What the report knows about a run: the files of its directory, read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.untrusted import read_json_lines, read_json_object, read_text

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
        config=read_text(_required(directory, "config.yaml")),
        environment=read_json_object(_required(directory, "environment.json")),
        metrics=read_json_lines(_required(directory, "metrics.jsonl")),
        evals=_optional_rows(directory / "evals.jsonl"),
        samples=_optional_rows(directory / "samples.jsonl"),
    )


def _required(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.exists():
        raise FileNotFoundError(
            f"Run '{directory}' has no {name}, so it is not a finished trimtab run. "
            "Give the --out directory of a trimtab command that trained a model."
        )
    return path


def _optional_rows(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.exists() else []
