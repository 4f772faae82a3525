"""Every two of several systems under a judge: win rates, ratings, and what is to be known about the judge."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from trimtab.evals.answers import Key, System, shared
from trimtab.evals.intervals import Estimate
from trimtab.evals.judged_files import alpaca_rows
from trimtab.evals.position_bias import PositionBias, position_bias
from trimtab.evals.ratings import bradley_terry
from trimtab.evals.win_rate import Judged, WinRate, by_pair, matches, win_rate
from trimtab.judges import (
    Asked,
    BothOrders,
    Judge,
    LabelJudge,
    RewardJudge,
    RuleJudge,
    Verdict,
    asked_of,
    compared,
)
from trimtab.judges.asking import is_same
from trimtab.records import Comparison, Prompt

SYMMETRIC = (RewardJudge, RuleJudge, LabelJudge)
"""Judges that look at each answer by itself, so that its place cannot matter; all others are asked in both orders."""


@dataclass(frozen=True)
class Tournament:
    """Win rates of every two systems; `ratings` of more than two, or why there are none.

    `position_bias` is None for a judge that cannot have one; `asked` tells of a language model's replies; `left_out`
    counts answers without a counterpart.
    """

    judge: str
    rates: list[WinRate]
    ratings: dict[str, Estimate] | None
    no_ratings: str | None
    position_bias: PositionBias | None
    asked: Asked | None = None
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        bias, ratings = self.position_bias, self.ratings
        return {
            "judge": self.judge,
            "win_rates": [rate.to_dict() for rate in self.rates],
            "ratings": None if ratings is None else {name: rating.to_dict() for name, rating in ratings.items()},
            "no_ratings": self.no_ratings,
            "position_bias": None if bias is None else bias.to_dict(),
            "asked": None if self.asked is None else self.asked.to_dict(),
            "left_out": self.left_out,
        }

    def remarks(self) -> list[str]:
        """What a person should know beside the figures, in sentences."""
        bias, unjudged = self.position_bias, sum(rate.unjudged for rate in self.rates)
        told = [] if self.no_ratings is None else [self.no_ratings]
        if bias is not None:
            favoured = f"the judge favours the answer shown {bias.found}" if bias.found else "no position bias found"
            told.append(
                f"{favoured}: the first wins {bias.first_wins:.3f} of the time, the order decides {bias.flipped:.3f}"
            )
        if self.asked is not None:
            told.append(str(self.asked))
        if unjudged:
            told.append(f"{unjudged} comparisons without a verdict are in no figure")
        if self.left_out:
            told.append(f"{self.left_out} answers have no counterpart and were left out")
        return told


def tournament(
    judge: str,
    judged: Sequence[Judged],
    verdicts: Sequence[tuple[Hashable, Verdict]] = (),
    *,
    asked: Asked | None = None,
    left_out: int = 0,
    seed: int = 0,
) -> Tournament:
    """The figures of comparisons that were judged; `verdicts` are those of both orders, with their prompts."""
    rates = [win_rate(pair, seed=seed) for pair in by_pair(judged)]
    bias = position_bias([verdict for _, verdict in verdicts], [prompt for prompt, _ in verdicts], seed)
    ratings, why = None, None
    if len({name for row in judged for name in (row.first, row.second)}) > 2:
        try:
            ratings = bradley_terry(matches(judged), seed)
        except ValueError as error:
            why = str(error)
    return Tournament(judge, rates, ratings, why, bias if verdicts else None, asked, left_out)


def play_all(
    judge: Judge, systems: Sequence[System], prompts: Mapping[Key, Prompt], *, seed: int = 0
) -> tuple[Tournament, list[dict[str, Any]]]:
    """Every two systems on the prompts they share, and the single verdicts as rows of AlpacaEval's form.

    The judge gets all comparisons in one call. ValueError where two systems share no prompt.
    """
    comparisons: list[Comparison] = []
    names: list[tuple[str, str]] = []
    keys: list[Hashable] = []
    left_out = 0
    for first, second in combinations(systems, 2):
        both = shared(first, second, prompts)
        if not both.comparisons:
            raise ValueError(f"{first.name} and {second.name} share no prompt to compare answers on")
        comparisons += both.comparisons
        keys += both.prompts
        names += [(first.name, second.name)] * len(both.comparisons)
        left_out += both.left_out
    values, verdicts = judged_values(judge, comparisons)
    rows = [
        Judged(key, *two, p, len(asked.first.text), len(asked.second.text))
        for key, two, p, asked in zip(keys, names, values, comparisons, strict=True)
    ]
    told = zip(keys, verdicts, comparisons, strict=True) if verdicts else ()
    found = tournament(
        judge.name,
        rows,
        # The same answer twice was not asked about, so it tells nothing of the judge.
        [(key, said) for key, said, asked in told if not is_same(asked)],
        asked=asked_of(judge),
        left_out=left_out,
        seed=seed,
    )
    return found, list(alpaca_rows(judge.name, comparisons, rows))


def judged_values(judge: Judge, comparisons: Sequence[Comparison]) -> tuple[list[float | None], list[Verdict]]:
    """P(first is better), and, of a judge that position can sway, what it said in each order."""
    if isinstance(judge, SYMMETRIC):
        return compared(judge, comparisons), []
    verdicts = (judge if isinstance(judge, BothOrders) else BothOrders(judge)).verdicts(comparisons)
    return [verdict.value for verdict in verdicts], verdicts
