"""Rewards of answers before and after training as histograms: of all answers, and of short, middle and long ones.

A reward that rose among long answers alone was bought with words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from trimtab.report.figures import Figure
from trimtab.report.read import RunRecord
from trimtab.report.summary import START, interval, method_color, method_name, number

BINS = 16
FEWEST = 6
"""Answers below which a histogram says nothing."""


class Scored(NamedTuple):
    """An answer's reward and its length."""

    reward: float
    length: float


class Compared(NamedTuple):
    """Answers of several origins that share a scale: names to answers and to colours, and the unit of their lengths."""

    measure: str
    unit: str
    answers: Mapping[str, Sequence[Scored]]
    colors: Mapping[str, str]


def histogram_figures(compared: Compared | None) -> list[Figure]:
    """Histograms of all answers and of those in each third by length; none for too few answers.

    Where all answers fall into one third, for they are equally long, there are no thirds.
    """
    if compared is None or any(len(found) < FEWEST for found in compared.answers.values()):
        return []
    pooled = [one for found in compared.answers.values() for one in found]
    edges = bin_edges([one.reward for one in pooled])
    parts = zip(("short", "middle", "long"), thirds([one.length for one in pooled]), strict=True)
    by_length = [
        histogram(compared, f"{name} answers, {bounds_in_words(*ends, compared.unit)}", edges, ends)
        for name, ends in parts
    ]
    drawn = [figure for figure in by_length if figure.traces]
    whole = histogram(compared, "all answers", edges, (float("-inf"), float("inf")))
    return [whole, *drawn] if len(drawn) > 1 else [whole]


def histogram(compared: Compared, note: str, edges: Sequence[float], lengths: tuple[float, float]) -> Figure:
    """The shares of the answers with a length in `(low, high]` that fall into each bin, one outline for each origin."""
    low, high = lengths
    traces = []
    for name, found in compared.answers.items():
        rewards = [one.reward for one in found if low < one.length <= high]
        if rewards:
            traces.append(outline(f"{name} ({len(rewards)})", shares(rewards, edges), edges, compared.colors[name]))
    layout = {"xaxis": {"title": compared.measure}, "yaxis": {"title": "share of answers", "rangemode": "tozero"}}
    return Figure(f"{compared.measure[:1].upper()}{compared.measure[1:]}", note, traces, layout)


def outline(name: str, heights: Sequence[float], edges: Sequence[float], color: str) -> dict[str, Any]:
    """A histogram as a step through the middles of its bins, down to zero at both ends."""
    width = edges[1] - edges[0]
    middles = [edges[0] - width / 2, *(edge + width / 2 for edge in edges)]
    line = {"color": color, "width": 2, "shape": "hvh"}
    heights = [0.0, *heights, 0.0]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": middles,
        "y": heights,
        "line": line,
        "fill": "tozeroy",
    }


def bin_edges(values: Sequence[float], bins: int = BINS) -> list[float]:
    """The edges of equally wide bins from the least to the greatest value; a single value in the middle of one."""
    low, high = min(values), max(values)
    width = (high - low) / bins
    if width == 0:
        width = 1 / bins
        low -= (bins // 2 + 0.5) * width
    return [low + width * i for i in range(bins + 1)]


def shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    """The share of the values in each bin; a value on an edge falls into the bin above it, the last into the last."""
    counts = [0] * (len(edges) - 1)
    width = edges[1] - edges[0]
    for value in values:
        counts[min(int((value - edges[0]) / width), len(counts) - 1)] += 1
    return [count / len(values) for count in counts]


def thirds(lengths: Sequence[float]) -> list[tuple[float, float]]:
    """Where the short, the middle and the long third begin (left out) and end."""
    ordered = sorted(lengths)
    first, second = (ordered[-(-len(ordered) * i // 3) - 1] for i in (1, 2))
    return [(float("-inf"), first), (first, second), (second, float("inf"))]


def bounds_in_words(low: float, high: float, unit: str) -> str:
    """The lengths between two bounds."""
    if low == float("-inf"):
        return f"up to {high:g} {unit}"
    return f"more than {low:g} {unit}" if high == float("inf") else f"more than {low:g}, up to {high:g} {unit}"


# ---- Where the answers come from


def before_and_after(run: RunRecord) -> Compared | None:
    """The held-out answers of a run's first and last evaluation; else those of samples.jsonl that have a reward."""
    rows, unit = run.scores, "tokens"
    found = [(number(row.get("step")), answers_of(row)) for row in rows]
    if not found:
        found, unit = sampled(run.samples), "characters"
    kept = [(step, some) for step, some in found if step is not None and some]
    if len(kept) < 2:
        return None
    named = {f"{when}, step {step:g}": some for when, (step, some) in (("before", kept[0]), ("after", kept[-1]))}
    measure = str(rows[0].get("measure", "reward")) if rows else "reward"
    return Compared(measure.replace("_", " "), unit, named, dict(zip(named, ("c0", "c1"), strict=True)))


def answers_of(row: Mapping[str, Any]) -> list[Scored]:
    """The answers of a row of scores.jsonl that have a score."""
    return [
        one
        for scores, lengths in zip(groups(row, "scores"), groups(row, "lengths"), strict=False)
        for one in scored(scores, lengths)
    ]


def groups(row: Mapping[str, Any], name: str) -> list[list[Any]]:
    """The lists, one for each prompt, under a name of a row of scores.jsonl."""
    found = row.get(name)
    return [group if isinstance(group, list) else [] for group in found] if isinstance(found, list) else []


def scored(scores: Iterable[Any], lengths: Iterable[Any]) -> list[Scored]:
    """Numbers side by side; what has no score is left out."""
    pairs = ((number(score), number(length)) for score, length in zip(scores, lengths, strict=False))
    return [Scored(score, length) for score, length in pairs if score is not None and length is not None]


def sampled(samples: Sequence[Mapping[str, Any]]) -> list[tuple[float | None, list[Scored]]]:
    """The answers of samples.jsonl by their step, in its order; lengths in characters."""
    by_step: dict[float | None, list[Scored]] = {}
    for row in samples:
        text = str(row.get("response", ""))
        by_step.setdefault(number(row.get("step")), []).extend(scored([row.get("reward")], [len(text)]))
    return list(by_step.items())


def of_methods(summary: Mapping[str, Any]) -> Compared | None:
    """The gold rewards of a summary's texts, method by method."""
    answers: dict[str, list[Scored]] = {}
    for entry in summary.get("texts") or ():
        for method, answer in entry["answers"].items():
            gold = interval(answer, "gold")
            if gold:
                answers.setdefault(method, []).append(Scored(gold.value, len(str(answer["text"]))))
    if START not in answers or len(answers) < 2:
        return None
    named = {method_name(method): found for method, found in answers.items()}
    return Compared("gold reward", "characters", named, {method_name(name): method_color(name) for name in answers})
