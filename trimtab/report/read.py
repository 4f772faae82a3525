"""What the report knows about a run: the files of its directory, read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.report.summary import checked, number
from trimtab.untrusted import read_json_lines, read_json_object, read_text, read_yaml_mapping

Rows = Sequence[Mapping[str, Any]]

DEEPEST = 20
"""Directories of runs that may stand inside each other."""
SUMMARY = "summary.json"
"""What `trimtab quickstart` writes beside its runs, to compare them."""


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory tells it: .jsonl files as rows, config.yaml as text and as settings, the rest as objects.

    `metrics` and `evals` are rows with a `step`, and every number in them is finite. `data`, `frontier` and
    `multiple_choice` are empty where the directory has no such file.
    """

    name: str
    config: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Rows
    evals: Rows
    samples: Rows
    rollouts: Rows
    scores: Rows
    data: Mapping[str, Any]
    frontier: Mapping[str, Any]
    multiple_choice: Mapping[str, Any]

    @property
    def command(self) -> str:
        """The command that made the run, such as dpo."""
        return str(self.settings.get("command", ""))


def runs_in(directory: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    """The directory itself if it is a run's, else the runs inside, oldest first; itself if there is none.

    Links to a directory above are passed by. Raises FileNotFoundError if there is no such directory, ValueError where
    directories stand inside each other more than `DEEPEST` times.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"There is no directory '{directory}'. Give the --out directory of a trimtab command that has begun."
        )
    above |= {directory.resolve()}
    if len(above) > DEEPEST:
        raise ValueError(f"{directory}: runs more than {DEEPEST} directories deep. Give a directory further down.")
    inside = [path.parent for path in directory.glob("*/config.yaml") if path.parent.resolve() not in above]
    if (directory / "metrics.jsonl").exists() or not inside:
        return [directory]
    inside.sort(key=lambda run: ((run / "config.yaml").stat().st_mtime_ns, run.name))
    return [run for one in inside for run in runs_in(one, above)]


def summary_in(directories: Sequence[Path]) -> dict[str, Any]:
    """The summary that a single directory of several runs may have. ValueError naming what is wrong in it."""
    if len(directories) != 1:
        return {}
    path = directories[0] / SUMMARY
    return checked(str(path), _optional_object(path))


def read_runs(directories: Iterable[str | Path]) -> list[RunRecord]:
    """The runs in these directories, each by a name of its own."""
    return [read_run(path, name) for name, path in labelled(directories).items()]


def labelled(directories: Iterable[str | Path]) -> dict[str, Path]:
    """Run directories by a short name each: the last part of the path, the whole of it where that is not enough."""
    paths = [Path(directory) for directory in directories]
    names = [path.resolve().name for path in paths]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, paths, strict=True)}


def read_run(directory: Path, name: str = "") -> RunRecord:
    """The run in `directory`; only config.yaml, environment.json and metrics.jsonl must be there.

    Raises FileNotFoundError naming the run and the file, ValueError naming the line that is not a JSON object.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"No run directory at '{directory}'. Give the --out directory of a trimtab command.")
    config = _required(directory, "config.yaml")
    return RunRecord(
        name=name or directory.resolve().name,
        config=read_text(config),
        settings=read_yaml_mapping(config),
        environment=read_json_object(_required(directory, "environment.json")),
        metrics=measured(read_json_lines(_required(directory, "metrics.jsonl"))),
        evals=measured(_optional_rows(directory / "evals.jsonl")),
        samples=_optional_rows(directory / "samples.jsonl"),
        rollouts=_optional_rows(directory / "rollouts.jsonl"),
        scores=_optional_rows(directory / "scores.jsonl"),
        data=_optional_object(directory / "data.json"),
        frontier=_optional_object(directory / "frontier.json"),
        multiple_choice=_optional_object(directory / "multiple-choice.json"),
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


def _optional_object(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def measured(rows: Rows) -> list[dict[str, Any]]:
    """The rows that have a step; a number that no figure can show (NaN, infinite) is None."""
    return [
        {key: number(value) if isinstance(value, int | float) else value for key, value in row.items()}
        for row in rows
        if number(row.get("step")) is not None
    ]
