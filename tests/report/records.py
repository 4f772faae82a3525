"""Runs as the report knows them, made by hand."""

from __future__ import annotations

from typing import Any

from trimtab.report import RunRecord
from trimtab.report.read import measured


def record(name: str = "run", command: str = "rl", **parts: Any) -> RunRecord:
    """A run with nothing but what is given; rows of metrics and evaluations as they are once they are read."""
    settings = {"command": command, **parts.pop("settings", {})}
    rows: dict[str, Any] = dict.fromkeys(("metrics", "evals", "samples", "rollouts", "scores"), ())
    objects: dict[str, Any] = {key: {} for key in ("environment", "data", "frontier", "multiple_choice")}
    given = {**rows, **objects, **parts}
    given |= {key: measured(given[key]) for key in ("metrics", "evals")}
    return RunRecord(name=name, config="", settings=settings, **given)


def evaluation(step: int, **figures: float) -> dict[str, float]:
    """A row of evals.jsonl; every figure has bounds 0.5 below and above it."""
    bounds = {
        f"{name}_{side}": value + d for name, value in figures.items() for side, d in (("low", -0.5), ("high", 0.5))
    }
    return {"step": step, **figures, **bounds}
