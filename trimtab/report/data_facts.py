"""What `trimtab data check` said of a run's data when the run began, as a table: training and held-out side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.report.read import RunRecord
from trimtab.report.summary import inner, number

PARTS = {"train": "training", "eval": "held out"}

FACTS = {
    "kind": "kind of record",
    "records": "records",
    "prompts": "different prompts",
    "annotators": "annotators",
    "duplicates": "duplicates",
    "empty_answers": "empty answers",
    "ties": "ties",
    "contradictions": "contradictory pairs",
    "cycles": "preference cycles",
    "desirable": "desirable",
    "longer_wins": "the longer answer wins",
    "shared_rows": "rows also in the training data",
    "shared_prompts": "prompts also in the training data",
}
"""The facts that the table has, by their names in data.json."""


@dataclass(frozen=True)
class DataTable:
    """The facts of one run: a column for each part of its data, and rows of a title and a cell for each part."""

    run: str
    parts: list[str]
    rows: list[tuple[str, list[str]]]


def data_table(run: RunRecord) -> DataTable | None:
    """The table of a run; None for runs that wrote no facts down."""
    found = {part: inner(inner(run.data, part), "facts") for part in PARTS if inner(inner(run.data, part), "facts")}
    rows = [(title, [cell(facts.get(name)) for facts in found.values()]) for name, title in FACTS.items()]
    texts = list(dict.fromkeys(name for facts in found.values() for name in inner(facts, "lengths")))
    rows += [
        (f"{text} length", [cell(inner(facts, "lengths").get(text)) for facts in found.values()]) for text in texts
    ]
    kept = [(title, cells) for title, cells in rows if any(cells)]
    return DataTable(run.name, [PARTS[part] for part in found], kept) if kept else None


def cell(fact: Any) -> str:
    """One fact for people: a name, a count, a share with its interval, or a summary of lengths; "" for no fact."""
    if isinstance(fact, str):
        return fact
    if isinstance(fact, Mapping):
        return share_cell(fact) or lengths_cell(fact) or cell(fact.get("count"))
    count = number(fact)
    return "" if count is None else f"{count:,.0f}"


def share_cell(fact: Mapping[str, Any]) -> str:
    """A share with its 95 % interval; "" for what is none, or of nothing."""
    count, total, low, high = (number(fact.get(name)) for name in ("count", "total", "low", "high"))
    if count is None or not total or low is None or high is None:
        return ""
    return f"{count / total:.0%} of {total:,.0f} (95% interval {low:.0%} to {high:.0%})"


def lengths_cell(fact: Mapping[str, Any]) -> str:
    """The middle and the upper end of some lengths; "" for what is none."""
    median, p95, maximum = (number(fact.get(name)) for name in ("median", "p95", "maximum"))
    if median is None or p95 is None or maximum is None:
        return ""
    return f"median {median:,.0f} characters, 95% up to {p95:,.0f}, longest {maximum:,.0f}"
