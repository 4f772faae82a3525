"""Reward against KL as the runs wrote it down: every evaluation a point, the KL budgets as lines to stay left of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.evals.frontier import Frontier, Point, frontier, logged_points, read_frontier
from trimtab.report.figures import Figure, color_of
from trimtab.report.plots import frontier_traces
from trimtab.report.read import RunRecord
from trimtab.report.summary import number

WHAT = {"reward": "held-out reward", "win_rate": "win rate against the start model"}


@dataclass(frozen=True)
class Mark:
    """A KL, in nats per answer, that means something: a budget, say, or where the gold reward is foreseen to peak."""

    kl: float
    label: str


def frontier_figures(runs: Sequence[RunRecord]) -> list[Figure]:
    """A figure for each thing that the runs measured, and one for each frontier.json, which measured all runs alike."""
    marks, colors = budgets(runs), {run.name: color_of(i) for i, run in enumerate(runs)}
    return [drawn(found, note, marks, colors) for found, note in [*measured_alike(runs), *logged(runs)]]


def logged(runs: Sequence[RunRecord]) -> list[tuple[Frontier, str]]:
    """The runs' own evaluations along training, by what they measured; each with a line on what it is."""
    found: dict[str, list[Point]] = {}
    for run in runs:
        for measure, points in logged_points(run.name, run.evals).items():
            found.setdefault(measure, []).extend(points)
    note = "each run by its own reward, evaluation by evaluation: up and to the left is better"
    return [(frontier(WHAT[measure], points), note) for measure, points in found.items()]


def measured_alike(runs: Sequence[RunRecord]) -> list[tuple[Frontier, str]]:
    """What `evaluate frontier --json` measured of all checkpoints. ValueError naming the run whose file is none."""
    note = "all checkpoints on the same prompts: up and to the left is better"
    found = []
    for run in runs:
        if run.frontier:
            try:
                found.append((read_frontier(run.frontier), note))
            except ValueError as error:
                raise ValueError(f"frontier.json of {run.name}: {error}") from None
    return found


def budgets(runs: Sequence[RunRecord]) -> list[Mark]:
    """The --kl-budget of every run that has one."""
    given = [(run.name, number(run.settings.get("kl_budget"))) for run in runs]
    return [Mark(budget, f"KL budget of {name}") for name, budget in given if budget is not None]


def drawn(found: Frontier, note: str, marks: Sequence[Mark], colors: Mapping[str, str]) -> Figure:
    """Points, curves and marks; what is no run of the report is grey."""
    traces = [painted(trace, colors.get(trace["name"], "c0")) for trace in frontier_traces(found)]
    layout = {
        "xaxis": {"title": "KL, nats per answer", "rangemode": "tozero"},
        "yaxis": {"title": found.measure},
        "shapes": [line_at(mark.kl) for mark in marks],
        "annotations": [label_at(mark) for mark in marks],
    }
    return Figure(f"{found.measure[:1].upper()}{found.measure[1:]} against KL", note, traces, layout)


def painted(trace: Mapping[str, Any], color: str) -> dict[str, Any]:
    return {
        **trace,
        "line": {**trace.get("line", {}), "color": color, "width": 2},
        "marker": {"color": color, "size": 7},
        "cliponaxis": False,
        "hoverinfo": "text+x+y",
        "showlegend": True,
    }


def line_at(kl: float) -> dict[str, Any]:
    """A vertical line through the whole figure."""
    line = {"color": "c5", "width": 1.5, "dash": "dash"}
    return {"type": "line", "x0": kl, "x1": kl, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def label_at(mark: Mark) -> dict[str, Any]:
    """What a mark says, beside its line."""
    place = {"x": mark.kl, "y": 0, "yref": "paper", "xanchor": "right", "yanchor": "bottom", "textangle": -90}
    return {**place, "text": mark.label, "showarrow": False, "font": {"color": "c5", "size": 11}}
