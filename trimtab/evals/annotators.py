"""What the votes of several annotators say about each other: agreement, contradictions, circles, one reward or not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.cycles import cycles
from trimtab.data.votes import Vote
from trimtab.evals.agreement import against_majority, krippendorff, mean_cohen, raw_agreement
from trimtab.evals.intervals import Estimate
from trimtab.evals.transitivity import Tally, Transitivity, transitivity

EXAMPLES = 5
Tallies = dict[Hashable, dict[tuple[Hashable, Hashable], Tally]]


@dataclass(frozen=True)
class Found:
    """How many were found, and where the first few."""

    count: int
    examples: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"count": self.count, "examples": list(self.examples)}


@dataclass(frozen=True)
class Agreement:
    """Agreement between annotators about which of two answers is better; an item is two answers to one prompt.

    `raw` is the share of pairs of votes on one item that agree, `kappa` Cohen's averaged over `kappa_pairs` pairs of
    annotators, `alpha` Krippendorff's for nominal votes (first, second, tie). `annotators` are each one's agreement
    with the majority of the others. `contradictions` are items that one annotator judged both ways, and `split` items
    without a majority; `cycles` are circles among majorities, one of each prompt's tangles.
    """

    votes: int
    items: int
    shared_items: int
    raw: Estimate
    kappa: float
    kappa_pairs: int
    alpha: Estimate
    annotators: dict[str, Estimate]
    split: Found
    contradictions: Found
    cycles: Found
    transitivity: Transitivity

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "votes": self.votes,
            "items": self.items,
            "shared_items": self.shared_items,
            "raw": self.raw.to_dict(),
            "cohen_kappa": {"value": self.kappa if math.isfinite(self.kappa) else None, "pairs": self.kappa_pairs},
            "krippendorff_alpha": self.alpha.to_dict(),
            "annotators": {name: estimate.to_dict() for name, estimate in self.annotators.items()},
            "split": self.split.to_dict(),
            "contradictions": self.contradictions.to_dict(),
            "cycles": self.cycles.to_dict(),
            "transitivity": self.transitivity.to_dict(),
        }


def agreement(votes: Sequence[Vote], *, seed: int = 0) -> Agreement:
    """Everything about the agreement behind these votes.

    Who judged an item several times counts once there, with the last word. ValueError if no item has votes of two
    annotators.
    """
    units: dict[Hashable, dict[str, float]] = defaultdict(dict)
    for vote in votes:
        units[item_of(vote)][vote.annotator] = vote.value
    shared = sum(len(said) > 1 for said in units.values())
    if not shared:
        raise ValueError(f"none of {len(units):,} items was judged by two annotators: there is no agreement to measure")
    kappa, kappa_pairs = mean_cohen(units)
    tallies, places = tallied(votes), places_of(votes)
    return Agreement(
        votes=len(votes),
        items=len(units),
        shared_items=shared,
        raw=raw_agreement(units, seed),
        kappa=kappa,
        kappa_pairs=kappa_pairs,
        alpha=krippendorff([list(said.values()) for said in units.values()], seed=seed),
        annotators=against_majority(units),
        split=split_items(tallies, places),
        contradictions=contradictions(votes),
        cycles=majority_cycles(tallies, places),
        transitivity=transitivity(tallies, seed=seed),
    )


def item_of(vote: Vote) -> tuple[Hashable, str, str]:
    """What a vote is about."""
    return (vote.prompt.messages, vote.first, vote.second)


def tallied(votes: Sequence[Vote]) -> Tallies:
    """The votes for each side of every item, by prompt; ties make an item, and no vote."""
    tallies: Tallies = defaultdict(dict)
    for vote in votes:
        ours, theirs = tallies[vote.prompt.messages].get((vote.first, vote.second), (0, 0))
        tally = (ours + (vote.value == 1), theirs + (vote.value == 0))
        tallies[vote.prompt.messages][vote.first, vote.second] = tally
    return tallies


def places_of(votes: Sequence[Vote]) -> dict[Hashable, str]:
    """Where the first row about each item, and each prompt, stands."""
    places: dict[Hashable, str] = {}
    for vote in votes:
        where = vote.prompt.source or "?"
        places.setdefault(item_of(vote), where)
        places.setdefault(vote.prompt.messages, where)
    return places


def split_items(tallies: Tallies, places: dict[Hashable, str]) -> Found:
    """The items that have votes for both sides, and as many for each."""
    found = [
        places[prompt, *two]
        for prompt, compared in tallies.items()
        for two, (ours, theirs) in compared.items()
        if ours == theirs > 0
    ]
    return Found(len(found), tuple(found[:EXAMPLES]))


def contradictions(votes: Sequence[Vote]) -> Found:
    """The items that one annotator judged both ways."""
    said: dict[Hashable, float] = {}
    found: dict[Hashable, str] = {}
    for vote in votes:
        key = (item_of(vote), vote.annotator)
        if said.setdefault(key, vote.value) + vote.value == 1 and said[key] != vote.value:
            found.setdefault(key, f"{vote.prompt.source or '?'} ({vote.annotator})")
    return Found(len(found), tuple(list(found.values())[:EXAMPLES]))


def majority_cycles(tallies: Tallies, places: dict[Hashable, str]) -> Found:
    """One circle of majorities from every tangle of answers to one prompt."""
    found = []
    for prompt, compared in tallies.items():
        graph: dict[Hashable, list[Hashable]] = defaultdict(list)
        for (first, second), (ours, theirs) in compared.items():
            if ours != theirs:
                better, worse = (first, second) if ours > theirs else (second, first)
                graph[better].append(worse)
        found += [f"{places[prompt]}: {len(around)} answers" for around in cycles(graph)]
    return Found(len(found), tuple(found[:EXAMPLES]))
