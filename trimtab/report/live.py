"""Runs that are still going on: whether their files have changed, and reading them while they are written.

A run is read from a copy that ends with its last whole line, so that nothing but this knows that it grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trimtab.report.read import SUMMARY, RunRecord, labelled, read_run, runs_in, summary_in
from trimtab.untrusted import MOST_WHOLE, open_regular, read_whole

NOT_YET = {"config.yaml": "{}", "environment.json": "{}", "metrics.jsonl": ""}
"""Files that every run has in the end, and what they hold until then."""
READ = (".yaml", ".json", ".jsonl")
"""Endings of the files that the page is made of."""

Signature = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Live:
    """What a page says of itself while runs go on: which version it is, and what the reader waits for."""

    version: str
    state: str
    """`waiting` for the first metrics, `live`, or `finished`."""
    changed: int | None
    """When a file changed last, in milliseconds since 1970; None if there is none."""
    notes: Sequence[str] = ()


def signature(directories: Sequence[Path]) -> Signature:
    """Name, time and size of every file that the page depends on. FileNotFoundError if one goes away meanwhile."""
    folders = dict.fromkeys(folder for directory in directories for folder in (directory, *runs_in(directory)))
    return tuple(entry for folder in folders for entry in _entries(folder))


def _entries(folder: Path) -> Iterator[tuple[str, int, int]]:
    for path in sorted(folder.iterdir()):
        if path.suffix in READ and path.is_file() and not path.name.startswith("."):
            status = path.stat()
            yield str(path), status.st_mtime_ns, status.st_size


def read_live(directories: Sequence[Path]) -> tuple[list[RunRecord], Mapping[str, Any]]:
    """The runs as they stand, and the summary that one directory of several runs may have.

    Raises ValueError naming the line that is no JSON; a last line without an end is still being written.
    """
    inside = labelled(run for directory in directories for run in runs_in(directory))
    runs = [read_growing(run, name) for name, run in inside.items()]
    return runs, summary_in(directories)


def read_growing(directory: Path, name: str = "") -> RunRecord:
    """A run that is being written, up to its last whole line; what is not there yet is empty."""
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        for missing, content in NOT_YET.items():
            (copy / missing).write_text(content, encoding="utf-8")
        for path in directory.iterdir():
            if path.suffix in READ and path.is_file():
                (copy / path.name).write_bytes(_whole_lines(path))
        try:
            return read_run(copy, name or directory.resolve().name)
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), str(directory))) from None


def _whole_lines(path: Path) -> bytes:
    """What a file holds; of .jsonl files up to the last line that has an end."""
    with open_regular(path) as stream:
        content = read_whole(path, stream, MOST_WHOLE)
    return content[: content.rfind(b"\n") + 1] if path.suffix == ".jsonl" else content


def notes(runs: Sequence[RunRecord]) -> list[str]:
    """What the reader waits for, in words."""
    return [f"Waiting for the first metrics of {run.name}." for run in runs if not run.metrics]


def state(runs: Sequence[RunRecord], directories: Sequence[Path]) -> str:
    """`finished` if all runs say that they are, `waiting` if none has begun, else `live`.

    In a directory of several runs another one may follow, until it has a summary.
    """
    complete = all(
        (directory / "metrics.jsonl").exists() or (directory / SUMMARY).exists() for directory in directories
    )
    if runs and complete and all(run.environment.get("finished") is not None for run in runs):
        return "finished"
    return "live" if any(run.metrics for run in runs) else "waiting"
