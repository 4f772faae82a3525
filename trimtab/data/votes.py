"""Who said what of which two answers: the votes behind preferences.

A row of preferences is one vote, its `annotator` the voter. Some data sets keep all votes of a pair in one row: a list
`annotators` beside `output_1` and `output_2` (1 or 2 is the better output, 0 a tie), or a list `votes` of
`[worker, vote]` beside `chosen` and `rejected` (1 for chosen, 0 for rejected, 0.5 for neither).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..records import Preference, Prompt
from .conversations import InvalidField, is_list, unexpected
from .files import Problem, Row
from .formats import JUDGED, PREFERENCES, TIE, convert, format_of
from .sources import RECORDS, open_source


@dataclass(frozen=True)
class Vote:
    """One annotator's word on two answers: 1 for the first, 0 for the second, 0.5 for neither.

    `first` comes before `second` in the alphabet, so that the same two answers are always the same item.
    """

    prompt: Prompt
    first: str
    second: str
    annotator: str
    value: float


def read_votes(source: str, *, split: str = "train", skip_invalid: bool = False) -> list[Vote]:
    """All votes of a source. ValueError for a bad row (unless skipped), and for a preference that says no annotator."""
    found: list[Vote] = []
    for where, item in open_source(source, split):
        try:
            if isinstance(item, Problem):
                raise InvalidField(item.field, item.message)
            found += votes_of(item, where)
        except InvalidField as error:
            if not skip_invalid:
                raise ValueError(f"{Problem(where, error.field, error.message)}") from None
    if not found:
        raise ValueError(f"{source}: found no votes")
    return found


def votes_of(item: Row | Any, where: str) -> Iterator[Vote]:
    """The votes of a row or of a record."""
    if not isinstance(item, RECORDS):
        if is_list(item.get("annotators")) and JUDGED.has_columns({**item, "label": 1}):
            yield from listed(item, where)
            return
        if is_list(item.get("votes")) and PREFERENCES.has_columns(item):
            yield from counted(item, where)
            return
    record = item if isinstance(item, RECORDS) else format_of(item, Preference).read(item, where)
    for pair in convert(record, Preference):
        if pair.annotator is None:
            raise InvalidField("annotator", "found none, expected who judged: agreement is between annotators")
        yield vote(pair, pair.annotator, vote_value(pair))


def vote_value(pair: Preference) -> float:
    """What the confidence of a preference says as a vote."""
    return 1.0 if pair.confidence > TIE else TIE if pair.confidence == TIE else 0.0


def listed(row: Row, where: str) -> Iterator[Vote]:
    """The votes of a row with a list `annotators`: its n-th entry is the n-th annotator's."""
    pair = JUDGED.read({**row, "label": 1}, where)
    assert isinstance(pair, Preference)
    for place, said in enumerate(row["annotators"], start=1):
        if said is None:
            continue
        if said not in (0, 1, 2):
            raise unexpected(f"annotators[{place - 1}]", said, "1 or 2 (the better output), 0 (a tie) or null")
        yield vote(pair, f"annotator {place}", {0: TIE, 1: 1.0, 2: 0.0}[said])


def counted(row: Row, where: str) -> Iterator[Vote]:
    """The votes of a row with a list `votes` of workers and what they said."""
    pair = PREFERENCES.read(row, where)
    assert isinstance(pair, Preference)
    for place, said in enumerate(row["votes"]):
        if not is_list(said) or len(said) != 2 or said[1] not in (0, 0.5, 1):
            raise unexpected(f"votes[{place}]", said, "[worker, vote] with 1 (chosen), 0 (rejected) or 0.5 (neither)")
        yield vote(pair, str(said[0]), float(said[1]))


def vote(pair: Preference, annotator: str, value: float) -> Vote:
    """A vote whose `value` speaks for the chosen answer, its answers put in order."""
    if pair.chosen <= pair.rejected:
        return Vote(pair.prompt, pair.chosen, pair.rejected, annotator, value)
    return Vote(pair.prompt, pair.rejected, pair.chosen, annotator, 1 - value)
