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
        kl = [point.kl for point in points]
        curve = joined(run, [one.value for one in kl], [point.reward for point in points], [one.name for one in points])
        traces.append(curve | {"error_x": bars(kl)})
    if frontier.best_of_n:
        kl, rewards = [one.kl for one in frontier.best_of_n], [one.reward for one in frontier.best_of_n]
        curve = joined("best of n (KL at most)", kl, rewards, [f"best of {one.n}" for one in frontier.best_of_n])
        traces.append(curve | {"line": {"dash": "dot"}})
    return traces


def joined(name: str, kl: list[float], rewards: Sequence[Estimate], texts: list[str]) -> dict[str, Any]:
    """Rewards with their intervals at some KL, joined in their order."""
    curve = {"type": "scatter", "mode": "lines+markers", "name": name, "x": kl, "text": texts}
    return curve | {"y": [reward.value for reward in rewards], "error_y": bars(rewards)}


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
