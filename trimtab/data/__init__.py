"""From sources to records: `load` reads any accepted source as the kind of record that was asked for.

The column formats are those of the ecosystem (docs/data.md): `formats` tells them apart, `files` and `sources` find the
rows, `writing` turns records back into rows, `checks` says what is in a file, `reviews` makes prompts of its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..records import Record
from ..untrusted import MOST_SKIPPED
from .conversations import InvalidField
from .files import Problem, Row
from .formats import convert, format_of, natural_kind, remarks
from .sources import RECORDS, SOURCES, open_source
from .writing import to_row

__all__ = ["SOURCES", "Loaded", "Problem", "kind_of", "load", "to_row"]

R = TypeVar("R", bound=Record)
ROWS_TO_TELL = 100
SKIPPING = ". To skip and count such rows: --skip-invalid"


@dataclass(frozen=True)
class Loaded(Generic[R]):
    """What a source held: its records, the rows that were skipped, how many rows it had, and what people should know.

    `notes` are sentences to print: how rows were read as records of another kind, what was dropped from them.
    """

    records: list[R]
    skipped: list[Problem]
    source: str
    rows: int
    notes: list[str] = field(default_factory=list)


def load(source: str | Path, kind: type[R], *, split: str = "train", skip_invalid: bool = False) -> Loaded[R]:
    """The records of a file, a hub data set, a `package.module:function` or a built-in name, as one kind.

    `split` names the split of a hub data set. Errors: `FileNotFoundError` for a source that does not exist;
    `ValueError` for one that cannot be read or is empty and, unless `skip_invalid`, for the first bad row.
    """
    source = str(source)
    records: list[R] = []
    skipped: list[Problem] = []
    notes: Counter[str] = Counter()
    rows = 0
    for where, item in open_source(source, split):
        rows += 1
        result = read_item(item, where, kind, notes)
        if not isinstance(result, Problem):
            records.extend(result)
        elif skip_invalid and len(skipped) < MOST_SKIPPED:
            skipped.append(result)
        elif skip_invalid:
            raise ValueError(f"{result}; {len(skipped):,} rows were skipped before it, more than bad luck explains")
        else:
            raise ValueError(f"{result}{SKIPPING * (result.field != 'columns')}")
    if not rows:
        raise ValueError(f"{source}: found no rows, expected at least one")
    if not records:
        raise ValueError(f"{source}: none of its {rows:,} rows could be read; the first: {skipped[0]}")
    return Loaded(
        records, skipped, source, rows, [f"{count:,} of {rows:,} rows: {note}" for note, count in notes.items()]
    )


def read_item(item: Row | Record | Problem, where: str, kind: type[R], notes: Counter[str]) -> list[R] | Problem:
    """The records that a row (or a record) gives, or what is wrong with it; adds to the notes."""
    if isinstance(item, Problem):
        return item
    try:
        record: Any = item if isinstance(item, RECORDS) else format_of(item, kind).read(item, where)
        records = convert(record, kind)
    except InvalidField as error:
        return Problem(where, error.field, error.message)
    notes.update(remarks({} if isinstance(item, RECORDS) else item, record, kind))
    return records


def kind_of(source: str | Path, *, split: str = "train") -> type[Record]:
    """The kind of record that the columns of a source are made for, from its first readable row."""
    source = str(source)
    found = "found no rows, expected at least one"
    for where, item in islice(open_source(source, split), ROWS_TO_TELL):
        if isinstance(item, RECORDS):
            return type(item)
        try:
            if not isinstance(item, Problem):
                return natural_kind(item)
            raise InvalidField(item.field, item.message)
        except InvalidField as error:
            found = str(Problem(where, error.field, error.message))
    raise ValueError(f"{source}: {found}")
