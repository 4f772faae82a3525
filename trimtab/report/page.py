"""The page: what stands where, and how it is written down as one file.

Everything that a run or a summary says is text here: the template escapes it, and what scripts read is JSON in which
no tag can end. A content security policy forbids the page every request.
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
from trimtab.report.outcome import outcome
from trimtab.report.read import RunRecord, checked_samples, read_runs
from trimtab.report.stages import stages
from trimtab.report.summary import START, Interval, interval, method_color, method_name
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


@dataclass(frozen=True)
class Answer:
    """One method's answer in a text card; `change` is its gold reward minus the start model's."""

    name: str
    color: str
    text: str
    figures: list[tuple[str, str]]
    change: float | None


@dataclass(frozen=True)
class Text:
    """A prompt and the answers to it, side by side."""

    prompt: str
    answers: list[Answer]

    @property
    def changed(self) -> float:
        """The largest change of the gold reward, either way."""
        return max((abs(answer.change) for answer in self.answers if answer.change is not None), default=0.0)

    @property
    def worst(self) -> float:
        """The change of the answer that lost most, or gained least."""
        return min((answer.change for answer in self.answers if answer.change is not None), default=0.0)


def write_report(runs: Sequence[Path], out: Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Write the report of these run directories, and of a summary that compares methods, to the HTML file `out`.

    Raises FileNotFoundError naming the run whose files are missing.
    """
    page = render(read_runs(runs), summary or {})
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(page.encode("utf-8", "replace"))  # a lone surrogate in a model's text is no reason to fail
    return out


def render(runs: Sequence[RunRecord], summary: Mapping[str, Any]) -> str:
    """The page as text."""
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
        texts=texts(summary, runs),
        commands=summary.get("commands", ()),
        facts=_readable({key: value for key, value in summary.items() if key not in SHOWN_ELSEWHERE}),
        readable=_readable,
        style=_resource("report.css"),
        script=_resource("report.js"),
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


def _resource(name: str) -> Markup:
    return Markup(resources.files("trimtab.report").joinpath("templates", name).read_text(encoding="utf-8"))


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


def texts(summary: Mapping[str, Any], runs: Sequence[RunRecord]) -> list[Text]:
    """The texts to read, most changed first: the summary's, or without any the samples of the runs."""
    found = [_text(entry) for entry in summary.get("texts") or ()]
    found = found or [text for run in runs for text in _sampled(run)]
    return sorted(found, key=lambda text: text.changed, reverse=True)


def _text(entry: Mapping[str, Any]) -> Text:
    answers = entry["answers"]
    before = interval(answers.get(START, {}), "gold")
    return Text(_prompt(entry["prompt"]), [_answer(method, answer, before) for method, answer in answers.items()])


def _answer(method: str, answer: Mapping[str, Any], before: Interval | None) -> Answer:
    gold = interval(answer, "gold")
    figures = [(key, plain(found.value)) for key in ("gold", "proxy") if (found := interval(answer, key))]
    change = gold.value - before.value if gold and before and method != START else None
    return Answer(method_name(method), method_color(method), str(answer["text"]), figures, change)


def _sampled(run: RunRecord) -> list[Text]:
    """What a run's policy said, one card a prompt, its answers in the order of their rows."""
    by_prompt: dict[str, list[Answer]] = {}
    for row in checked_samples(run):
        if "answers" in row:  # the answers of several methods in one row, as in a summary
            by_prompt.setdefault(_prompt(row["prompt"]), []).extend(_text(row).answers)
            continue
        answers = by_prompt.setdefault(_prompt(row["prompt"]), [])
        name = f"step {row['step']}" if "step" in row else f"sample {len(answers) + 1}"
        score = interval(row, "reward")
        figures = [("reward", plain(score.value))] if score else []
        answers.append(Answer(name, "c1", str(row["response"]), figures, None))
    return [Text(prompt, answers) for prompt, answers in by_prompt.items()]


def _prompt(prompt: Any) -> str:
    """A prompt as text: a string as it stands, a conversation with its roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
