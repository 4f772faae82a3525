"""The three stages of RLHF as a picture, each filled with the curves of the runs that belong there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.report.figures import CHARTS, Figure, color_of, held_out, trained
from trimtab.report.read import RunRecord
from trimtab.report.summary import is_best_of, method_name


@dataclass(frozen=True)
class Stage:
    """A stage: what goes in, what is done with it, what comes out; its commands, and the metrics that tell of it."""

    name: str
    takes: str
    method: str
    makes: str
    commands: tuple[str, ...]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Filled:
    """A stage with what the report has of it; without names the stage is not in the report."""

    stage: Stage
    names: list[str]
    figures: list[Figure]


STAGES = (
    Stage("Imitate", "demonstrations", "SFT", "a policy that answers", ("sft",), ("loss",)),
    Stage("Learn what is preferred", "comparisons", "reward model", "a score", ("reward",), ("accuracy", "loss")),
    Stage(
        "Steer",
        "prompts or comparisons",
        "RL, DPO or best-of-n, under a price on KL",
        "an aligned policy",
        ("rl", "dpo", "kto", "online-dpo", "raft"),
        ("reward", "win_rate", "accuracy", "kl"),
    ),
)


def stages(runs: Sequence[RunRecord], summary: Mapping[str, Any]) -> list[Filled]:
    """The stages in their order; best-of-n, which leaves no run, is known from the summary."""
    chosen = [method_name(entry["method"]) for entry in summary.get("methods", ()) if is_best_of(entry["method"])]
    filled = [fill(stage, runs) for stage in STAGES]
    return [*filled[:-1], replace(filled[-1], names=filled[-1].names + chosen)]


def fill(stage: Stage, runs: Sequence[RunRecord]) -> Filled:
    """A stage with its runs, each in the colour of its place in the report, and a figure for each metric they have."""
    own = [(run, color_of(i)) for i, run in enumerate(runs) if run.command in stage.commands]
    figures = [overlaid(metric, own) for metric in stage.metrics]
    return Filled(stage, [run.name for run, _ in own], [figure for figure in figures if figure.traces])


def overlaid(metric: str, runs: Sequence[tuple[RunRecord, str]]) -> Figure:
    """One metric of several runs: training drawn through, held-out data dotted; with several, every curve is named."""
    chart = next(chart for chart in CHARTS if chart.curves[0].key == metric)
    curves = [(run, replace(chart.curves[0], label=run.name, color=color)) for run, color in runs]
    traces = [trace for run, curve in curves for trace in trained(run, curve) + held_out(run, curve, alone=False)]
    named = {"showlegend": True} if len(runs) > 1 else {}
    layout = {"xaxis": {"title": "step"}, "yaxis": {"title": chart.unit}, **named}
    return Figure(chart.title, chart.note, traces, layout)
