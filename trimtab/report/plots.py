"""Single plots of evaluations as HTML pages that open without a network: reliability, reward against KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.evals.calibration import Calibration
from trimtab.evals.frontier import Frontier
from trimtab.evals.intervals import Estimate


def reliability_plot(reward: str, calibration: Calibration) -> dict[str, Any]:
    """Accuracy against confidence by bins, beside the diagonal of a calibrated reward."""
    bins = calibration.bins
    measured = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"error {calibration.error:.3f}",
        "x": [one.confidence for one in bins],
        "y": [one.accuracy.value for one in bins],
        "text": [f"{one.accuracy.count} pairs" for one in bins],
        "error_y": bars([one.accuracy for one in bins]),
    }
    diagonal = {"type": "scatter", "mode": "lines", "name": "calibrated", "x": [0.5, 1], "y": [0.5, 1]}
    axes = {"xaxis": {"title": {"text": "confidence, sigmoid(|margin|)"}}, "yaxis": {"title": {"text": "accuracy"}}}
    title = f"{reward}: does its confidence mean what it says?"
    return {"data": [measured, diagonal | {"line": {"dash": "dot"}}], "layout": {"title": {"text": title}, **axes}}


def frontier_plot(frontier: Frontier) -> dict[str, Any]:
    """Reward against KL, nats per answer."""
    axes = {"xaxis": {"title": {"text": "KL, nats per answer"}}, "yaxis": {"title": {"text": frontier.measure}}}
    return {"data": frontier_traces(frontier), "layout": {"title": {"text": f"{frontier.measure} against KL"}, **axes}}


def frontier_traces(frontier: Frontier) -> list[dict[str, Any]]:
    """Every run's points joined in the order of their steps, and best-of-n as a curve at its bound on KL."""
    traces = []
    for run in dict.fromkeys(point.run for point in frontier.points):
        points = [point for point in frontier.points if point.run == run]
        points.sort(key=lambda point: float("inf") if point.step is None else point.step)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": run,
                "x": [point.kl.value for point in points],
                "y": [point.reward.value for point in points],
                "text": [point.name for point in points],
                "error_x": bars([point.kl for point in points]),
                "error_y": bars([point.reward for point in points]),
            }
        )
    if frontier.best_of_n:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "best of n (KL at most)",
                "line": {"dash": "dot"},
                "x": [one.kl for one in frontier.best_of_n],
                "y": [one.reward.value for one in frontier.best_of_n],
                "text": [f"best of {one.n}" for one in frontier.best_of_n],
                "error_y": bars([one.reward for one in frontier.best_of_n]),
            }
        )
    return traces


def bars(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Intervals as plotly's error bars; a bound that is not known has none."""
    above = [known(one.high - one.value) for one in estimates]
    below = [known(one.value - one.low) for one in estimates]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below}


def known(width: float) -> float:
    """A bar's width, none where the bound is not known."""
    return width if math.isfinite(width) else 0.0


def write_plot(plot: dict[str, Any], path: Path) -> None:
    """A plot as one page with plotly inside it."""
    from plotly.io import to_html

    path.write_text(to_html(plot, include_plotlyjs=True, full_html=True), encoding="utf-8")
