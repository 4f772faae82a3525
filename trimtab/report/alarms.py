"""The alarms of a run: what its own files say went wrong, in sentences. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimtab.health import SIGNS, sinking
from trimtab.kl import KlBudget
from trimtab.report.read import RunRecord
from trimtab.report.summary import inner, number
from trimtab.report.words import plain


def alarms(run: RunRecord) -> list[str]:
    """Every alarm of a run, the name of the run in front."""
    found = [*signs_seen(run), *sunk(run), *skipped_steps(run), *budget(run), *shared_rows(run)]
    return [f"{run.name}: {text}." for text in found]


def looked_at(runs: Sequence[RunRecord]) -> str:
    """What was searched for alarms, so that silence can be judged."""
    kinds = {
        "step": [run.metrics for run in runs],
        "evaluation": [run.evals for run in runs],
        "rollout": [run.rollouts for run in runs],
    }
    counts = {name: sum(map(len, rows)) for name, rows in kinds.items()}
    return ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for name, count in counts.items())


def signs_seen(run: RunRecord) -> Iterator[str]:
    """The signs of trouble in its rollouts; the last rollout has the counts of all."""
    seen = run.rollouts[-1].get("health") if run.rollouts else None
    for name, count in seen.items() if isinstance(seen, Mapping) else ():
        if name in SIGNS and number(count):
            yield f"{SIGNS[name]}, in {count:g} of {len(run.rollouts)} rollouts"


def sunk(run: RunRecord) -> Iterator[str]:
    """Chosen and rejected answers that have both become less likely than at the first evaluation."""
    names = ("chosen_logprob", "rejected_logprob")
    rows = [row for row in run.evals if all(number(row.get(name)) is not None for name in names)]
    for row in rows:
        if sinking(rows[0], row):
            chosen, rejected = (f"{plain(rows[0][name], 1)} to {plain(row[name], 1)}" for name in names)
            yield (
                f"by step {row['step']:g}, chosen and rejected answers both became less likely (from {chosen} and from "
                f"{rejected} nats an answer): probability went to answers that nobody compared"
            )
            return


def skipped_steps(run: RunRecord) -> Iterator[str]:
    """Steps that were let pass because their gradient was not finite."""
    count = max((number(row.get("skipped")) or 0 for row in run.metrics), default=0)
    if count:
        yield f"steps skipped because their loss or gradient was not finite: {count:g}"


def budget(run: RunRecord) -> Iterator[str]:
    """A KL budget that is spent, or nearly."""
    limit, spent = number(run.settings.get("kl_budget")), highest(run.rollouts, "kl")
    if limit is not None and spent is not None and spent >= KlBudget.warn_share * limit:
        what = "is spent" if spent >= limit else "is nearly spent"
        yield f"KL reached {plain(spent, 1)} nats an answer, and the budget of {limit:g} {what}"


def highest(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The greatest number under a name."""
    return max((value for row in rows if (value := number(row.get(name))) is not None), default=None)


def shared_rows(run: RunRecord) -> Iterator[str]:
    """Held-out rows that the run was trained on."""
    facts = inner(inner(run.data, "eval"), "facts")
    shared, records = number(inner(facts, "shared_rows").get("count")), number(facts.get("records"))
    if shared and records:
        yield f"{shared:,.0f} of {records:,.0f} held-out rows are in the training data as well"
