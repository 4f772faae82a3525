"""`trimtab report`: run directories as one page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Report:
    """One self-contained HTML file: verdict, alarms, stages, reward against KL, curves, texts. Opens offline."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, or one that holds several runs, such as quickstart's."""
    out: str = "report.html"
    """The page to write; a page that stands there is replaced, anything else is not."""


def report(config: Report) -> None:
    """Read the runs, write the page."""
    from pathlib import Path

    from trimtab.progress import console
    from trimtab.report import write_report

    out = Path(config.out)
    if not config.runs:
        raise ValueError("give at least one run directory.")
    if out.is_dir() or (out.exists() and out.suffix.lower() not in (".html", ".htm")):
        raise FileExistsError(f"--out {out} is not an HTML page, so it is not replaced.")
    page = write_report([Path(run) for run in config.runs], Path(config.out))
    console.print(f"report: {page}")
