"""What one run achieved and what it cost, in sentences, from the figures that it wrote down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from trimtab.evals.intervals import bootstrap_difference
from trimtab.report.histograms import groups
from trimtab.report.read import Rows, RunRecord
from trimtab.report.summary import Interval, inner, interval, number
from trimtab.report.words import change_in_words, course, grown, plain, spread

COIN = {"accuracy": "a coin", "win_rate": "the start model"}
"""Shares of which one half is nothing, and what one half is."""


def outcome(run: RunRecord) -> list[str]:
    """What improved and how surely, what it cost, and whether other abilities were kept; empty without evaluations."""
    return [*improved(run), *cost(run), *kept(run)]


# ---- What improved


def improved(run: RunRecord) -> list[str]:
    """The held-out reward of a policy, its win rate, the accuracy on pairs; the loss where there is none of them."""
    said = [*rewarded(run), *(text for name in COIN for text in share_in_words(run, name))]
    return said or loss_in_words(run)


def rewarded(run: RunRecord) -> list[str]:
    """The change of the mean reward; of a reward model, whose mean score means nothing, no sentence."""
    if not any(number(row.get("reward_low")) is not None for row in run.evals):
        return []
    gain = paired_gain(run.scores, "reward")
    if gain is None:
        return course(run.name, "reward", run.evals)
    return [change_in_words(run.name, "held-out reward", gain) + "."]


def paired_gain(scores: Rows, measure: str) -> Interval | None:
    """The last evaluation's mean minus the first one's, paired by prompt; None without two, or with one prompt.

    None as well where all prompts changed alike: the bootstrap's interval is a point then, and nothing is so sure.
    """
    rows = [row for row in scores if row.get("measure") == measure]
    if len(rows) < 2:
        return None
    early, late = (prompt_means(row) for row in (rows[0], rows[-1]))
    pairs = [(a, b) for a, b in zip(late, early, strict=False) if a is not None and b is not None]
    if len(pairs) < 2:
        return None
    found = bootstrap_difference([a for a, _ in pairs], [b for _, b in pairs])
    return Interval(found.value, found.low, found.high) if found.low < found.high else None


def prompt_means(row: Mapping[str, Any]) -> list[float | None]:
    """The mean score of each prompt's answers, None where no answer has one."""
    found = [[score for one in group if (score := number(one)) is not None] for group in groups(row, "scores")]
    return [sum(group) / len(group) if group else None for group in found]


def share_in_words(run: RunRecord, name: str) -> list[str]:
    """The last value of a share, and whether it is clearly above or below one half."""
    row = last_with(run.evals, name)
    if row is None:
        return []
    said = f"Held-out {name.replace('_', ' ')} of {run.name} is {plain(row[name])}{spread(row, name)}"
    low, high = number(row.get(f"{name}_low")), number(row.get(f"{name}_high"))
    if low is None or high is None:
        return [said + "."]
    clearly = "better than" if low > 0.5 else "worse than" if high < 0.5 else "not clearly better than"
    return [f"{said}, {clearly} {COIN[name]}."]


def loss_in_words(run: RunRecord) -> list[str]:
    """Where the held-out loss went."""
    first, last = first_with(run.evals, "loss"), last_with(run.evals, "loss")
    if first is None or last is None or first is last:
        return []
    verb = "fell" if last["loss"] < first["loss"] else "rose"
    return [
        f"Held-out loss of {run.name} {verb} from {plain(first['loss'])} to {plain(last['loss'])}, without an interval."
    ]


# ---- What it cost


def cost(run: RunRecord) -> list[str]:
    """KL, length, diversity and entropy of a policy that was judged by its own answers."""
    if not any(number(row.get(name)) is not None for row in run.evals for name in ("win_rate", "reward_low")):
        return []
    parts = [*moved(run.evals), *changed(run.evals, "length", "longer", "shorter", "about as long")]
    parts += [
        *changed(run.evals, "distinct", "more diverse", "less diverse", "about as diverse"),
        *entropy(run.metrics),
    ]
    return [f"The price of {run.name}: {', '.join(parts)}."] if parts else []


def moved(evals: Rows) -> list[str]:
    """The KL of the last evaluation."""
    row = last_with(evals, "kl")
    return [] if row is None else [f"{plain(row['kl'])} nats of KL per answer from its reference{spread(row, 'kl')}"]


def changed(evals: Rows, name: str, more: str, less: str, same: str) -> list[str]:
    """How a figure of the answers compares with what it was before training."""
    first, last = first_with(evals, name), last_with(evals, name)
    if first is None or last is None or first is last or first[name] <= 0:
        return []
    return [f"answers {grown(first[name], last[name], more, less, same)}"]


def entropy(metrics: Rows) -> list[str]:
    """The entropy over the first and over the last tenth of the steps."""
    values = [value for row in metrics if (value := number(row.get("entropy"))) is not None]
    if len(values) < 2:
        return []
    few = max(1, len(values) // 10)
    first, last = sum(values[:few]) / few, sum(values[-few:]) / few
    return [f"entropy from {plain(first)} to {plain(last)} nats per token"]


def first_with(rows: Rows, name: str) -> Mapping[str, Any] | None:
    """The first row that has a number under a name."""
    return next((row for row in rows if number(row.get(name)) is not None), None)


def last_with(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """The last row that has a number under a name."""
    return first_with(rows[::-1], name)


# ---- What was kept


def kept(run: RunRecord) -> list[str]:
    """Capability before and after, where multiple-choice.json has both. ValueError where that cannot be read."""
    told = run.multiple_choice
    if told.get("before") is None:
        return []
    accuracies = [found for part in ("before", "after") if (found := interval(inner(told, part), "accuracy"))]
    change = interval(inner(told, "change"), "difference")
    if change is None or len(accuracies) < 2:
        raise ValueError(
            f"multiple-choice.json of {run.name}: not what `trimtab evaluate multiple-choice --before M --json` prints."
        )
    before, after = accuracies
    said = change_in_words(run.name, f"accuracy on {PurePath(str(told.get('data'))).name}", change)
    return [f"{said}, from {plain(before.value)} to {plain(after.value)}."]
