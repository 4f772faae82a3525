"""Where rows come from: a file, a data set on the hub, a function of the user's, or a name in `SOURCES`."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..records import Demonstration, Feedback, Preference, Prompt, Ranking, Record
from . import reviews
from .files import READERS, Located, Problem, Row, checked_object, numbered, read_rows, suffix_of

RECORDS = (Prompt, Demonstration, Preference, Ranking, Feedback)
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")

SOURCES: dict[str, Callable[[], Iterable[Row | Record]]] = {
    "reviews": partial(reviews.review_prompts, 2000, seed=0, split="train"),
    "reviews-heldout": partial(reviews.review_prompts, 500, seed=0, split="heldout"),
    "review-openings": partial(reviews.review_openings, 1000, seed=0, split="train"),
    "review-openings-heldout": partial(reviews.review_openings, 250, seed=0, split="heldout"),
}
"""Built-in names, each with the function that makes its rows or records."""


def accepted_sources() -> str:
    """What a source may be, for error messages."""
    return (
        f"a file ({', '.join(READERS)}, each also with .gz), a hub id (owner/name or owner/name:config), "
        f"a function (package.module:function), or one of {', '.join(SOURCES)}"
    )


def open_source(source: str, split: str) -> Iterator[tuple[str, Row | Record | Problem]]:
    """The rows or records of a source with their places, lazily.

    Errors: `FileNotFoundError` for what does not exist, `ValueError` for what cannot be read and for a `split` other
    than train where there are no splits.
    """
    here = source in SOURCES or exists(source)
    if not here and HUB_ID.fullmatch(source) and suffix_of(Path(source)) not in READERS:
        return hub_rows(source, split)
    if not here and not FUNCTION.fullmatch(source):
        raise FileNotFoundError(f"{source!r} does not exist: expected {accepted_sources()}")
    if split != "train":
        raise ValueError(f"{source!r} has no split {split!r}: only hub data sets have splits")
    if source not in SOURCES and exists(source):
        return read_file(Path(source))
    return given(source, SOURCES.get(source) or imported(source))


def exists(source: str) -> bool:
    """Whether something lies at a path; a source that cannot even be a path does not exist."""
    try:
        return os.path.exists(source)
    except ValueError:  # a NUL in the name
        return False


def read_file(path: Path) -> Iterator[Located]:
    """The rows of a file; for a directory, an error that names the files in it."""
    if not path.is_dir():
        return read_rows(path)
    files = sorted(str(entry) for entry in path.iterdir() if suffix_of(entry) in READERS)
    inside = f"pass one of its files: {', '.join(files[:10])}" if files else "and none of its files is one of these"
    raise ValueError(f"{path} is a directory, expected {accepted_sources()}; {inside}")


def imported(source: str) -> Callable[[], Any]:
    """The function behind `package.module:function`; modules of the current directory are found as well."""
    module_name, name = source.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise FileNotFoundError(
            f"{source!r}: no module {error.name!r} here or installed; a source is {accepted_sources()}"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{source!r}: module {module_name} has no function {name!r}")
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source!r} cannot be called without arguments ({error})") from None
    return function


def given(source: str, function: Callable[[], Any]) -> Iterator[tuple[str, Row | Record | Problem]]:
    """The rows or records that a function returns."""
    items = function()
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes)):
        raise ValueError(f"{source!r} returned {type(items).__name__}, expected an iterable of rows (dict) or records")
    for where, item in numbered(source, items):
        yield where, item if isinstance(item, RECORDS) else checked_object(where, item, "row")


def hub_rows(source: str, split: str) -> Iterator[Located]:
    """The rows of one split of a data set on the hub, fetched or from its cache."""
    import datasets

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source!r} is no file here, and as a hub data set its split {split!r} cannot be loaded: {error}"
        ) from error
    return numbered(f"{source}[{split}]", rows)
