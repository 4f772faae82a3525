"""The page: what stands where, and how it is written down as one file.

Everything that a run or a summary says is text here: the template escapes it, and what scripts read is JSON in which
no tag can end. A content security policy forbids the page every request; a page that `trimtab watch` serves may ask its
own origin, and nobody else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from trimtab.report.alarms import alarms, looked_at
from trimtab.report.data_facts import data_table
from trimtab.report.figures import Figure, frontier_figure, lengths_figure, run_figures
from trimtab.report.frontiers import frontier_figures
from trimtab.report.histograms import before_and_after, histogram_figures, of_methods
from trimtab.report.live import Live
from trimtab.report.outcome import outcome
from trimtab.report.read import RunRecord, read_runs, runs_in, summary_in
from trimtab.report.stages import stages
from trimtab.report.summary import START, Interval, interval, method_color, method_name
from trimtab.report.texts import reading
from trimtab.report.words import plain, signed, verdict

SHOWN_ELSEWHERE = {"methods", "texts", "commands", "frontier", "notes"}
"""Keys of a summary that the page shows as tables, figures and texts; all others are listed among the facts."""

STRIP_WIDTH, STRIP_HEIGHT = 130, 18


@dataclass(frozen=True)
class Strip:
    """An interval drawn in a table cell: pixels from the left."""

    low: float
    value: float
    high: float
    zero: float


@dataclass(frozen=True)
class Row:
    """A method in the table; `strip` is its gain drawn, None for the start model."""

    name: str
    color: str
    gold: Interval | None
    gain: Interval | None
    strip: Strip | None
    proxy: Interval | None
    kl: Interval | None
    length: Interval | None


def write_report(runs: Sequence[Path], out: Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Write the report of these run directories, and of a summary that compares methods, to the HTML file `out`.

    A directory of several runs stands for them and for its own summary. Raises FileNotFoundError naming the run whose
    files are missing.
    """
    directories = [Path(run) for run in runs]
    found = read_runs(run for directory in directories for run in runs_in(directory))
    page = render(found, summary_in(directories) if summary is None else summary)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(page.encode("utf-8", "replace"))  # a lone surrogate in a model's text is no reason to fail
    return out


def render(runs: Sequence[RunRecord], summary: Mapping[str, Any], live: Live | None = None) -> str:
    """The page as text; with `live` as it is served while runs go on, and may ask its own origin for news."""
    environment = Environment(loader=PackageLoader("trimtab.report"), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"plain": plain, "signed": signed}
    overview = [figure for figure in (frontier_figure(summary), lengths_figure(summary)) if figure]
    placed: list[dict[str, Any]] = []
    return environment.get_template("report.html").render(
        title=_title(runs, summary),
        verdict=verdict(summary) or [said for run in runs for said in outcome(run)],
        alarms=[said for run in runs for said in alarms(run)],
        looked_at=looked_at(runs),
        stages=stages(runs, summary),
        rows=table(summary.get("methods", ())),
        strip_size=(STRIP_WIDTH, STRIP_HEIGHT),
        overview=overview + frontier_figures(runs),
        sections=[(run, run_figures(run)) for run in runs],
        rewards=_rewards(runs, summary),
        tables=[found for run in runs if (found := data_table(run))],
        place=partial(_place, placed),
        placed=placed,
        texts=reading(summary, runs),
        live=live,
        commands=summary.get("commands", ()),
        facts=_readable({key: value for key, value in summary.items() if key not in SHOWN_ELSEWHERE}),
        readable=_readable,
        style=_resources("report.css", "texts.css", *(["live.css"] if live else [])),
        script=_resources(*(["live.js"] if live else []), "report.js", "texts.js"),
        plotly=Markup(get_plotlyjs()),
    )


def _title(runs: Sequence[RunRecord], summary: Mapping[str, Any]) -> str:
    subject = summary.get("model") or ", ".join(run.name for run in runs) or "no runs"
    return f"Steering {subject}" if summary else f"Training {subject}"


def _rewards(runs: Sequence[RunRecord], summary: Mapping[str, Any]) -> list[tuple[str, list[Figure]]]:
    """What the histograms of rewards are of, and the histograms."""
    compared = {"Methods": of_methods(summary), **{run.name: before_and_after(run) for run in runs}}
    return [(name, figures) for name, found in compared.items() if (figures := histogram_figures(found))]


def _place(placed: list[dict[str, Any]], figure: Figure) -> int:
    """The number of a figure that the template puts down, under which the script finds it."""
    placed.append(_for_script(asdict(figure)))
    return len(placed) - 1


def _for_script(value: Any) -> Any:
    """A figure as JSON has it: texts in which plotly finds no markup, null for a number that is not finite."""
    if isinstance(value, str):
        return value.replace("&", "&amp;").replace("<", "&lt;")
    if isinstance(value, dict):
        return {key: _for_script(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_for_script(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _resources(*names: str) -> Markup:
    folder = resources.files("trimtab.report").joinpath("templates")
    return Markup("\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names))


def _readable(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) if value else ""


def table(methods: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The methods in the order of the summary, their gains drawn on one common scale around zero."""
    gains = [gain for entry in methods if entry["method"] != START and (gain := interval(entry, "gold_gain"))]
    low, high = min([0.0, *(gain.low for gain in gains)]), max([0.0, *(gain.high for gain in gains)])
    return [_row(entry, low, high) for entry in methods]


def _row(entry: Mapping[str, Any], low: float, high: float) -> Row:
    method = entry["method"]
    gain = interval(entry, "gold_gain") if method != START else None
    figures = {key: interval(entry, key) for key in ("gold", "proxy", "kl", "length")}
    strip = _strip(gain, low, high) if gain else None
    return Row(method_name(method), method_color(method), gain=gain, strip=strip, **figures)


def _strip(gain: Interval, low: float, high: float) -> Strip:
    scale = (STRIP_WIDTH - 12) / ((high - low) or 1.0)
    return Strip(*(round(6 + (at - low) * scale, 1) for at in (gain.low, gain.value, gain.high, 0.0)))
