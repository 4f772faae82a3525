"""Rows of files whose columns are not those of training data: read as they stand, checked by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from trimtab.data.files import Problem, Row, shorten
from trimtab.data.sources import open_source
from trimtab.records import Message, Prompt

Located = tuple[str, Row]

V = TypeVar("V")


def read_rows(source: str, *, split: str = "train") -> list[Located]:
    """The rows of any source with their places. ValueError for a source without rows and for a row that is none."""
    rows: list[Located] = []
    for where, item in open_source(source, split):
        if isinstance(item, Problem):
            raise ValueError(str(item))
        if not isinstance(item, Mapping):
            raise ValueError(f"{where}: found a {type(item).__name__}, expected a row with columns")
        rows.append((where, item))
    if not rows:
        raise ValueError(f"{source}: found no rows, expected at least one")
    return rows


def cell(located: Located, name: str, kind: type[V], check: Callable[[V], bool] = lambda value: True) -> V:
    """One column of a row. ValueError, naming place and column, where it is absent or of another kind."""
    where, row = located
    value = row.get(name)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)) and check(value):
        return value
    found = f"found {shorten(value)}" if name in row else f"the row has no such column (it has {', '.join(row)})"
    raise ValueError(f"{where}: {name}: {found}, expected {kind.__name__}")


def texts(located: Located, name: str) -> list[str]:
    """A column that is a text or a list of at least one text."""
    where, row = located
    value = row.get(name)
    found = [value] if isinstance(value, str) else value
    if isinstance(found, list | tuple) and found and all(isinstance(text, str) for text in found):
        return list(found)
    raise ValueError(f"{where}: {name}: found {shorten(value)}, expected a text or a list of texts")


def conversation(located: Located, name: str = "prompt") -> Prompt:
    """A column that is a conversation, or one user turn as a text; other columns come along."""
    where, row = located
    value = row.get(name)
    if isinstance(value, str):
        messages = (Message("user", value),)
    elif isinstance(value, list | tuple) and value and all(isinstance(turn, Mapping) for turn in value):
        turns = [(turn.get("role"), turn.get("content")) for turn in value]
        messages = tuple(Message(str(role), str(content)) for role, content in turns)
    else:
        raise ValueError(f"{where}: {name}: found {shorten(value)}, expected a text or a list of messages")
    return Prompt(messages, columns=dict(row), source=where)
