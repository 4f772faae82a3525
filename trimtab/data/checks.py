"""What is in a set of records: the facts behind `trimtab data check`. No torch, no tokenizer.

Two records say the same when prompt and answers are equal; the other columns of their rows do not matter. Lengths are
in characters here; lengths in tokens need a model and are handed to `render` by the caller.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..records import Demonstration, Feedback, Preference, Prompt, Ranking, Record
from .cycles import cycles
from .files import Problem
from .formats import TIE, pairs_of

EXAMPLES = 5
Graph = dict[str, dict[str, str]]
"""Better answer -> worse answer -> where that was said, for one prompt."""


@dataclass(frozen=True)
class Finding:
    """How often something was found, and where the first few times."""

    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """A summary of lengths in characters."""

    minimum: int
    median: float
    mean: float
    p95: int
    maximum: int


@dataclass(frozen=True)
class Rate:
    """How many of how many, with the Wilson 95% interval of the share."""

    count: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """The share; NaN of nothing."""
        return self.count / self.total if self.total else float("nan")


@dataclass(frozen=True)
class Facts:
    """Everything that `trimtab data check` says. A field is `None` where the kind of record has no such thing."""

    source: str
    kind: str
    rows: int
    records: int
    prompts: int
    plain_text: bool
    invalid: Finding
    duplicates: Finding
    empty_answers: Finding
    lengths: dict[str, Lengths]
    annotators: int | None = None
    desirable: Rate | None = None
    ties: Finding | None = None
    contradictions: Finding | None = None
    cycles: Finding | None = None
    longer_wins: Rate | None = None
    longer_wins_in_words: Rate | None = None
    against: str | None = None
    shared_rows: Finding | None = None
    shared_prompts: Finding | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The facts as plain values that JSON can hold."""
        return asdict(self)


def facts(
    records: Sequence[Record],
    *,
    source: str = "",
    rows: int | None = None,
    skipped: Sequence[Problem] = (),
    notes: Sequence[str] = (),
    against: Sequence[Record] | None = None,
    against_source: str = "",
) -> Facts:
    """What is in these records, which are all of one kind; `against` are those of another file."""
    assert records, "load() never returns an empty list"
    return Facts(
        source=source,
        kind=type(records[0]).__name__,
        rows=len(records) if rows is None else rows,
        records=len(records),
        prompts=len({prompt_of(record).messages for record in records}),
        plain_text=all(prompt_of(record).is_text for record in records),
        invalid=Finding(len(skipped), tuple(str(problem) for problem in skipped[:EXAMPLES])),
        duplicates=duplicates(records),
        empty_answers=finding(where(record) for record in records if not all(map(str.strip, answers(record)))),
        lengths=length_table(records),
        annotators=annotator_count(records),
        notes=tuple(notes),
        **feedback_facts(records),
        **pair_facts(records),
        **({} if against is None else {"against": against_source, **shared(records, against)}),
    )


def prompt_of(record: Record) -> Prompt:
    """The prompt of a record; a prompt is its own."""
    return record if isinstance(record, Prompt) else record.prompt


def where(record: Record) -> str:
    """Where the row of a record stands."""
    return prompt_of(record).source or "?"


def named_answers(record: Record) -> list[tuple[str, str]]:
    """The answers of a record, each with what it is called."""
    match record:
        case Preference():
            return [("chosen", record.chosen), ("rejected", record.rejected)]
        case Ranking():
            return [("completions", response) for response in record.responses]
        case Demonstration() | Feedback():
            return [("completion", record.response)]
    return []


def answers(record: Record) -> list[str]:
    """The texts of the answers of a record."""
    return [text for _, text in named_answers(record)]


def said(record: Record) -> tuple[Any, ...]:
    """What a record says, whoever said it and however much it counts."""
    return (prompt_of(record).messages, *answers(record), record.desirable if isinstance(record, Feedback) else None)


def finding(places: Iterable[str]) -> Finding:
    """A finding from all places where something was found."""
    found = list(places)
    return Finding(len(found), tuple(found[:EXAMPLES]))


def duplicates(records: Sequence[Record]) -> Finding:
    """Records that say what an earlier one said, by the same annotator."""
    first: dict[Any, str] = {}
    found = []
    for record in records:
        key = (said(record), getattr(record, "annotator", None))
        if key in first:
            found.append(f"{where(record)} repeats {first[key]}")
        first.setdefault(key, where(record))
    return finding(found)


def shared(records: Sequence[Record], others: Sequence[Record]) -> dict[str, Finding]:
    """The records that another file says as well, and those whose prompt it has as well."""
    rows = {said(other): where(other) for other in reversed(others)}
    prompts = {prompt_of(other).messages: where(other) for other in reversed(others)}
    return {
        "shared_rows": finding(f"{where(r)} = {rows[said(r)]}" for r in records if said(r) in rows),
        "shared_prompts": finding(
            f"{where(r)} = {prompts[prompt_of(r).messages]}" for r in records if prompt_of(r).messages in prompts
        ),
    }


def lengths_of(values: Sequence[int]) -> Lengths:
    """The summary of some lengths; the 95th percentile is the smallest value that 95% do not exceed."""
    ordered = sorted(values)
    p95 = ordered[-(-95 * len(ordered) // 100) - 1]
    return Lengths(ordered[0], statistics.median(ordered), statistics.fmean(ordered), p95, ordered[-1])


def length_table(records: Sequence[Record]) -> dict[str, Lengths]:
    """The lengths of prompts and of each kind of answer, in characters."""
    values: dict[str, list[int]] = defaultdict(list)
    for record in records:
        values["prompt"].append(sum(len(message.content) for message in prompt_of(record).messages))
        for name, text in named_answers(record):
            values[name].append(len(text))
    return {name: lengths_of(numbers) for name, numbers in values.items()}


def annotator_count(records: Sequence[Record]) -> int | None:
    """How many annotators are named; `None` where nobody is."""
    return len({name for record in records if (name := getattr(record, "annotator", None)) is not None}) or None


def wilson(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval for a share of `count` in `total` (Wilson 1927, eq. 4); (0, 1) of nothing. z: 1.96 is 95%."""
    if not total:
        return 0.0, 1.0
    share, square = count / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z * sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(outcomes: Iterable[bool]) -> Rate:
    """How often something was true."""
    counts = Counter(outcomes)
    return Rate(counts[True], counts.total(), *wilson(counts[True], counts.total()))


def feedback_facts(records: Sequence[Record]) -> dict[str, Any]:
    """How much of the feedback is positive."""
    labels = [record.desirable for record in records if isinstance(record, Feedback)]
    return {"desirable": rate(labels)} if labels else {}


def pair_facts(records: Sequence[Record]) -> dict[str, Any]:
    """What only pairs (and the pairs of rankings) have: ties, contradictions, cycles, and whether length wins."""
    pairs = [pair for record in records for pair in pairs_in(record)]
    if not pairs:
        return {}
    decisions = [decision(pair) for pair in pairs if pair.confidence != TIE]
    return {
        "ties": finding(where(pair) for pair in pairs if pair.confidence == TIE),
        "contradictions": contradictions(pairs),
        "cycles": finding(cycle for graph in preference_graphs(pairs) for cycle in described_cycles(graph)),
        "longer_wins": rate(len(a) > len(b) for a, b in decisions if len(a) != len(b)),
        "longer_wins_in_words": rate(
            len(a.split()) > len(b.split()) for a, b in decisions if len(a.split()) != len(b.split())
        ),
    }


def pairs_in(record: Record) -> list[Preference]:
    """The pairs of a record: itself, those of a ranking, or none."""
    if isinstance(record, Ranking):
        return pairs_of(record)
    return [record] if isinstance(record, Preference) else []


def decision(pair: Preference) -> tuple[str, str]:
    """The better and the worse answer of a pair that is no tie."""
    return (pair.chosen, pair.rejected) if pair.confidence > TIE else (pair.rejected, pair.chosen)


def contradictions(pairs: Sequence[Preference]) -> Finding:
    """Two answers to one prompt of which each is preferred to the other somewhere."""
    first: dict[tuple[Any, str, str], str] = {}
    for pair in pairs:
        if pair.confidence != TIE:
            first.setdefault((pair.prompt.messages, *decision(pair)), where(pair))
    return finding(
        f"{place} against {first[prompt, worse, better]}"
        for (prompt, better, worse), place in first.items()
        if better < worse and (prompt, worse, better) in first
    )


def preference_graphs(pairs: Sequence[Preference]) -> Iterable[Graph]:
    """For every prompt, which answer was preferred to which."""
    graphs: dict[Any, Graph] = defaultdict(lambda: defaultdict(dict))
    for pair in pairs:
        if pair.confidence != TIE:
            better, worse = decision(pair)
            graphs[pair.prompt.messages][better].setdefault(worse, where(pair))
    return graphs.values()


def described_cycles(graph: Graph) -> Iterator[str]:
    """The cycles of one prompt, each as the rows that close it."""
    for nodes in cycles(dict(graph)):
        steps = zip(nodes, [*nodes[1:], nodes[0]], strict=True)
        yield ", ".join(graph[better][worse] for better, worse in steps)


def render(known: Facts, console: Console, *, tokens: Mapping[str, object] | None = None) -> None:
    """Print the facts for people. `tokens` are further lines (label to value): lengths in tokens, say."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, value in [*summary_lines(known), *(tokens or {}).items()]:
        table.add_row(escape(label), escape(str(value)))
    console.print(table)
    for title, found in findings(known):
        for example in found.examples:
            console.print(f"  {title}: {example}", markup=False, highlight=False, soft_wrap=True)
        if found.count > len(found.examples) > 0:
            console.print(f"  {title}: and {found.count - len(found.examples):,} more", markup=False, highlight=False)


def summary_lines(known: Facts) -> Iterator[tuple[str, str]]:
    """The facts as pairs of label and text."""
    yield "source", known.source
    yield "rows", f"{known.rows:,} ({known.invalid.count:,} invalid)"
    yield "kind", f"{known.kind}, {known.records:,} records, {'plain text' if known.plain_text else 'conversations'}"
    yield "prompts", f"{known.prompts:,} different"
    for title, found in findings(known):
        if title != "invalid":
            yield title, f"{found.count:,}"
    if known.annotators is not None:
        yield "annotators", f"{known.annotators:,}"
    for title, share in shares(known):
        yield title, share_line(share)
    for name, lengths in known.lengths.items():
        yield f"{name} length", length_line(lengths)
    for note in known.notes:
        yield "note", note


def findings(known: Facts) -> Iterator[tuple[str, Finding]]:
    """The findings that this kind of record has, each with its title."""
    named = {
        "invalid": known.invalid,
        "duplicates": known.duplicates,
        "empty answers": known.empty_answers,
        "ties": known.ties,
        "contradictory pairs": known.contradictions,
        "preference cycles": known.cycles,
        f"rows also in {known.against}": known.shared_rows,
        f"prompts also in {known.against}": known.shared_prompts,
    }
    yield from ((title, found) for title, found in named.items() if found is not None)


def shares(known: Facts) -> Iterator[tuple[str, Rate]]:
    """The shares that this kind of record has, each with its title."""
    named = {
        "desirable": known.desirable,
        "longer wins (characters)": known.longer_wins,
        "longer wins (words)": known.longer_wins_in_words,
    }
    yield from ((title, share) for title, share in named.items() if share is not None)


def share_line(share: Rate) -> str:
    """A share with its interval, for people."""
    if not share.total:
        return "none to compare"
    return f"{share.share:.3f} (95% interval {share.low:.3f} to {share.high:.3f}; {share.count:,} of {share.total:,})"


def length_line(lengths: Lengths) -> str:
    """A summary of lengths, for people."""
    return (
        f"{lengths.minimum:,} to {lengths.maximum:,} characters, median {lengths.median:,.0f}, "
        f"mean {lengths.mean:,.0f}, 95% up to {lengths.p95:,}"
    )
