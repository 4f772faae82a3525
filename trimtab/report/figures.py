"""The report's figures, as the plain objects that plotly.js draws. Colours are names that the page's style defines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import isfinite
from typing import Any

from trimtab.evals.diversity import distinct, words_of
from trimtab.report.read import Rows, RunRecord
from trimtab.report.summary import BEST_OF, START, Interval, interval, is_best_of, method_color, method_name, number

SMOOTHED_FROM = 40
"""Curves with at least this many points get a running mean over a tenth of them; the points stay, faint."""

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One drawing: its heading, what it means in a line, and its plotly traces and axes."""

    title: str
    note: str
    traces: list[Trace]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """A metric of a run: its key in metrics.jsonl and evals.jsonl, its name in the legend, its colour."""

    key: str
    label: str
    color: str


@dataclass(frozen=True)
class Chart:
    """Curves of one run that share their axes."""

    title: str
    note: str
    unit: str
    curves: tuple[Curve, ...]


CHARTS = (
    Chart("Loss", "lower is better", "loss", (Curve("loss", "training", "c1"),)),
    Chart("Accuracy", "chosen above rejected", "accuracy", (Curve("accuracy", "training", "c2"),)),
    Chart("Margin", "chosen minus rejected", "margin", (Curve("margin", "training", "c3"),)),
    Chart(
        "Log-probabilities",
        "per answer",
        "nats",
        (Curve("chosen_logprob", "chosen", "c1"), Curve("rejected_logprob", "rejected", "c2")),
    ),
    Chart(
        "Log-ratios",
        "to the reference",
        "nats",
        (Curve("chosen_log_ratio", "wanted", "c1"), Curve("rejected_log_ratio", "unwanted", "c2")),
    ),
    Chart("Reward", "mean score", "reward", (Curve("reward", "training", "c4"),)),
    Chart("Win rate", "against the start model", "win rate", (Curve("win_rate", "training", "c4"),)),
    Chart("KL", "from the reference", "nats per answer", (Curve("kl", "training", "c5"),)),
    Chart("Length", "of the answers", "tokens", (Curve("length", "training", "c6"),)),
    Chart("Entropy", "of the next token", "nats per token", (Curve("entropy", "training", "c3"),)),
    Chart(
        "Diversity",
        "different n-grams; 1 is as many as of uniform draws",
        "ratio",
        (Curve("distinct", "answers to one prompt", "c2"), Curve("distinct_across", "answers to all prompts", "c1")),
    ),
)


def color_of(place: int) -> str:
    """The colour of a run by its place in the report."""
    return f"c{1 + place % 6}"


def run_figures(run: RunRecord) -> list[Figure]:
    """One figure for every chart that this run has numbers for."""
    run = replace(run, evals=[*run.evals, *sampled_diversity(run.samples)])
    figures = [_chart(run, chart) for chart in CHARTS]
    return [figure for figure in figures if figure.traces]


def _chart(run: RunRecord, chart: Chart) -> Figure:
    alone = len(chart.curves) == 1
    curves = ((trained(run, curve) + held_out(run, curve, alone=alone)) for curve in chart.curves)
    traces = [trace for curve in curves for trace in curve]
    return Figure(chart.title, chart.note, traces, {"xaxis": {"title": "step"}, "yaxis": {"title": chart.unit}})


def sampled_diversity(samples: Rows) -> list[dict[str, float]]:
    """How much the answers in samples.jsonl, the first to each prompt, differ from each other, step by step."""
    by_step: dict[float, dict[str, str]] = {}
    for row in samples:
        step, answer = number(row.get("step")), row.get("response")
        if step is not None and isinstance(answer, str):
            by_step.setdefault(step, {}).setdefault(repr(row.get("prompt")), answer)
    found = {step: distinct(words_of(list(said.values()))) for step, said in by_step.items() if len(said) > 1}
    return [{"step": step, "distinct_across": value} for step, value in sorted(found.items()) if isfinite(value)]


def trained(run: RunRecord, curve: Curve) -> list[Trace]:
    """A curve as it was logged step by step, with a running mean where there are many steps."""
    steps, values = series(run.metrics, curve.key)
    if not values:
        return []
    if len(values) < SMOOTHED_FROM:
        return [_line(steps, values, curve.label, curve.color)]
    faint = _line(steps, values, curve.label, curve.color, opacity=0.25, showlegend=False, hoverinfo="skip")
    return [faint, _line(steps, running_mean(values, len(values) // 10), curve.label, curve.color)]


def held_out(run: RunRecord, curve: Curve, *, alone: bool) -> list[Trace]:
    """The evaluations of a curve, with error bars where every one of them has bounds."""
    steps, values = series(run.evals, curve.key)
    if not values:
        return []
    _, low = series(run.evals, f"{curve.key}_low")
    _, high = series(run.evals, f"{curve.key}_high")
    line = _line(steps, values, "held out" if alone else f"{curve.label}, held out", curve.color)
    bars = {}
    if len(low) == len(high) == len(values):
        bars = _error_bars("y", [Interval(*found) for found in zip(values, low, high, strict=True)])
    return [line | {"mode": "lines+markers", "line": {"dash": "dot", "color": curve.color, "width": 2}} | bars]


def series(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric; rows without it are left out."""
    found = [(row["step"], value) for row in rows if (value := number(row.get(key))) is not None]
    return [step for step, _ in found], [value for _, value in found]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at every point, of fewer at the start."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _line(x: list[float], y: list[float], name: str, color: str, **more: Any) -> Trace:
    mode = "lines" if len(x) > 1 else "markers"
    line, marker = {"color": color, "width": 2}, {"color": color, "size": 8}
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, "line": line, "marker": marker, **more}


def _error_bars(axis: str, found: Sequence[Interval]) -> Trace:
    if all(one.low == one.value == one.high for one in found):
        return {}
    plus, minus = [one.high - one.value for one in found], [one.value - one.low for one in found]
    bars = {"type": "data", "symmetric": False, "array": plus, "arrayminus": minus, "thickness": 1.2, "width": 3}
    return {f"error_{axis}": bars}


def frontier_figure(summary: Mapping[str, Any]) -> Figure | None:
    """Gold reward against KL: best-of-n as a curve, training runs as paths by step, every other method as a point."""
    methods, path_points = (_measured(summary.get(key)) for key in ("methods", "frontier"))
    traces = _best_of_n(methods, [point for point in path_points if is_best_of(point["method"])])
    traces += _paths([point for point in path_points if not is_best_of(point["method"])])
    traces += [_points([entry], method_name(entry["method"])) for entry in methods if not is_best_of(entry["method"])]
    if not traces:
        return None
    return Figure(
        "Reward against KL",
        "what distance from the start model bought: up and to the left is better",
        traces,
        {"xaxis": {"title": "KL from the start model, nats per answer"}, "yaxis": {"title": "gold reward"}},
    )


def _measured(entries: Iterable[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    return [entry for entry in entries or () if interval(entry, "kl") and interval(entry, "gold")]


def _best_of_n(methods: Sequence[Mapping[str, Any]], estimates: Sequence[Mapping[str, Any]]) -> list[Trace]:
    """A curve over n for each way to choose: through the frontier's estimates, else from the start model (n = 1)."""
    family = [entry for entry in methods if is_best_of(entry["method"])]
    if not estimates:
        begin = [entry for entry in methods if entry["method"] == START]
        return [_over_n("best-of-n", begin + family)] if family else []
    by_method = groupby(sorted(estimates, key=lambda entry: entry["method"]), key=lambda entry: entry["method"])
    curves = [_over_n(method, list(entries)) for method, entries in by_method]
    return curves + [_points([entry], "") for entry in family]


def _over_n(method: str, entries: Sequence[Mapping[str, Any]]) -> Trace:
    """One curve over n; dotted where answers were not chosen by the proxy."""
    curve = sorted(entries, key=lambda entry: interval(entry, "kl") or ())
    trace = _points(curve, method_name(method), color="c1") | {"text": [_n_label(entry) for entry in curve]}
    places = ["bottom right"] * (len(curve) - 1) + ["bottom center"]  # the last may be at the edge of the figure
    drawn = {"mode": "lines+markers+text", "textposition": places, "showlegend": True}
    dash = "solid" if method == "best-of-n" else "dot"
    return trace | drawn | {"line": {"color": "c1", "width": 2, "dash": dash}}


def _n_label(entry: Mapping[str, Any]) -> str:
    n = str(entry.get("n") or entry["method"].removeprefix(BEST_OF))
    return f"n = {n}" if n.isdigit() and n != "1" else ""


def _points(entries: Sequence[Mapping[str, Any]], name: str, color: str = "") -> Trace:
    kl, gold = ([found for entry in entries if (found := interval(entry, key))] for key in ("kl", "gold"))
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": name,
        "x": [one.value for one in kl],
        "y": [one.value for one in gold],
        "text": [name] * len(entries),
        "textposition": "bottom right" if entries[0]["method"] == START else "top left",
        "cliponaxis": False,
        "marker": {"size": 11, "color": color or method_color(entries[0]["method"])},
        "showlegend": False,
        **_error_bars("y", gold),
        **_error_bars("x", kl),
    }


def _paths(points: Sequence[Mapping[str, Any]]) -> list[Trace]:
    """A faint line through the points of each method, in order of step; a point without a step is the final model."""
    ordered = sorted(points, key=lambda point: (point["method"], _step(point)))
    return [_path(method, list(group)) for method, group in groupby(ordered, key=lambda point: point["method"])]


def _step(point: Mapping[str, Any]) -> float:
    step = number(point.get("step"))
    return float("inf") if step is None else step


def _path(method: str, points: Sequence[Mapping[str, Any]]) -> Trace:
    x, y = ([found.value for point in points if (found := interval(point, key))] for key in ("kl", "gold"))
    name, color = f"{method_name(method)}, step by step", method_color(method)
    steps = ["final model" if _step(point) == float("inf") else f"step {point['step']}" for point in points]
    line = _line(x, y, name, color, opacity=0.6, text=steps, hoverinfo="text+x+y")
    return line | {"mode": "lines+markers", "marker": {"color": color, "size": 6}}


def lengths_figure(summary: Mapping[str, Any]) -> Figure | None:
    """How long each method's answers are."""
    methods = [entry for entry in summary.get("methods", ()) if interval(entry, "length")]
    if not methods:
        return None
    lengths = [found for entry in methods if (found := interval(entry, "length"))]
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": [one.value for one in lengths],
        "y": [method_name(entry["method"]) for entry in methods],
        "marker": {"color": [method_color(entry["method"]) for entry in methods]},
        "showlegend": False,
        **_error_bars("x", lengths),
    }
    layout = {"xaxis": {"title": "tokens"}, "yaxis": {"autorange": "reversed"}}
    return Figure("Length", "is the reward bought with words?", [bar], layout)
