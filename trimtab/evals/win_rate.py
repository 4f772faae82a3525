"""How often one system's answers are better than another's, and what that would be at equal lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.evals.intervals import Estimate
from trimtab.evals.length_control import LengthControlled, length_controlled
from trimtab.evals.ratings import Match
from trimtab.evals.shares import share_over_prompts

TIE = 0.5


@dataclass(frozen=True)
class Judged:
    """The answers of two systems to one prompt and P(first is better); None where nobody could say.

    Lengths are characters, None where the answers are not there. `prompt` says which comparisons belong together.
    """

    prompt: Hashable
    first: str
    second: str
    p: float | None
    first_length: int | None = None
    second_length: int | None = None

    def exchanged(self) -> Judged:
        """The same, told from the other side."""
        p = None if self.p is None else 1 - self.p
        return Judged(self.prompt, self.second, self.first, p, self.second_length, self.first_length)


@dataclass(frozen=True)
class WinRate:
    """The mean of P(first is better) over the comparisons that have a verdict, a tie counting half.

    `wins`, `ties`, `losses` count P above, at and below 0.5; `unjudged` have no verdict and are in no figure.
    `lengths` are the mean characters of both sides' answers; `length_controlled` is None where they are not known, or
    where length cannot be told from system. Intervals are over prompts.
    """

    first: str
    second: str
    rate: Estimate
    wins: int
    ties: int
    losses: int
    unjudged: int
    lengths: tuple[float, float] | None
    length_controlled: LengthControlled | None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        controlled = self.length_controlled
        return {
            "first": self.first,
            "second": self.second,
            "win_rate": self.rate.to_dict(),
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "unjudged": self.unjudged,
            "lengths": None if self.lengths is None else list(self.lengths),
            "length_controlled": None if controlled is None else controlled.to_dict(),
        }


def win_rate(judged: Sequence[Judged], *, seed: int = 0) -> WinRate:
    """The win rate of the first system over the second, from comparisons of these two alone.

    ValueError if no comparison has a verdict.
    """
    first, second = judged[0].first, judged[0].second
    assert all((row.first, row.second) == (first, second) for row in judged), "comparisons of two systems"
    said = [(row, row.p) for row in judged if row.p is not None]
    if not said:
        raise ValueError(f"none of {len(judged)} comparisons of {first} and {second} has a verdict")
    verdicts, prompts = [p for _, p in said], [row.prompt for row, _ in said]
    known = [
        (row.first_length, row.second_length)
        for row, _ in said
        if row.first_length is not None and row.second_length is not None
    ]
    is_known = len(known) == len(said)
    difference = [one - other for one, other in known]
    return WinRate(
        first=first,
        second=second,
        rate=share_over_prompts(verdicts, prompts, seed),
        wins=sum(p > TIE for p in verdicts),
        ties=sum(p == TIE for p in verdicts),
        losses=sum(p < TIE for p in verdicts),
        unjudged=len(judged) - len(said),
        lengths=(mean([one for one, _ in known]), mean([other for _, other in known])) if is_known else None,
        length_controlled=length_controlled(verdicts, difference, prompts, seed) if is_known else None,
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def by_pair(judged: Sequence[Judged]) -> list[list[Judged]]:
    """The comparisons of every two systems, each told in the order in which the two first met."""
    pairs: dict[frozenset[str], list[Judged]] = defaultdict(list)
    for row in judged:
        rows = pairs[frozenset((row.first, row.second))]
        rows.append(row if not rows or rows[0].first == row.first else row.exchanged())
    return list(pairs.values())


def matches(judged: Sequence[Judged]) -> list[Match]:
    """What ratings are made of: the comparisons with a verdict."""
    return [Match(row.prompt, row.first, row.second, row.p) for row in judged if row.p is not None]
