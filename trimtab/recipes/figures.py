"""How the `evaluate` commands say what they found: one JSON object, or tables with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.evals.intervals import Estimate


def print_json(about: Mapping[str, Any], result: Any) -> None:
    """What was asked about, then the result, as one JSON object; what could not be measured is null."""
    from trimtab.evals.intervals import to_json

    found = result.to_dict() if hasattr(result, "to_dict") else to_json(result)
    print(json.dumps({**about, **found}, indent=2, ensure_ascii=False))


def print_estimates(
    title: str, rows: Mapping[str, Estimate | None], *, unit: str = "", counted: str = "pairs", digits: int = 3
) -> None:
    """A table of figures with their 95 % intervals and how many observations they rest on; None is a dash."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column(f"{unit} [95 % interval]".strip(), justify="right")
    table.add_column(counted, justify="right")
    for name, estimate in rows.items():
        figure = "-" if estimate is None else f"{estimate:.{digits}f}"
        table.add_row(name, figure, "" if estimate is None else str(estimate.count))
    Console(highlight=False).print(table)


def say(text: str) -> None:
    """A sentence among the tables."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(text)


def check_plot(out: str | None) -> None:
    """Refuse a page that cannot be written, before any work is done for it; a page that stands there is replaced."""
    if out is None:
        return
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--plot {out}: give a file that ends with .html, in a folder that exists.")
