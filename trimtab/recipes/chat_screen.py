"""How `trimtab chat` reads lines and shows answers.

Answers go to standard output, everything else to standard error. What a model wrote is shown as text: it moves no
cursor, sets no title and no colour.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.conversation import Reply
from trimtab.progress import console
from trimtab.untrusted import without_controls

NARROW = 80
"""Columns of a terminal below which two answers stand one after the other."""


def lines() -> Iterator[str]:
    """What is typed, line by line, until the input ends; with a prompt sign where somebody types."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    sign = ""
    if sys.stdin.isatty():
        sign = "> "
        with suppress(ImportError):  # keys that go back in the line and in what was typed, where there is such a thing
            import readline  # noqa: F401
    while True:
        try:
            line = input(sign)
        except EOFError:
            return
        yield line


def say(text: str, style: str = "dim") -> None:
    """Something that is no answer."""
    console.print(without_controls(text), markup=False, style=style)


@contextmanager
def working(name: str) -> Iterator[None]:
    """Says on a terminal who is writing, as long as it lasts, in the place of all bars."""
    quiet, console.quiet = console.quiet, True
    try:
        with Console(stderr=True).status(plain(f"{name} ...", "dim")):
            yield
    finally:
        console.quiet = quiet


def show(replies: Sequence[Reply]) -> None:
    """Answers on a terminal side by side where there is room; elsewhere one after the other, their lines unbroken."""
    screen = Console(highlight=False)
    if screen.is_terminal and len(replies) > 1 and screen.width >= NARROW:
        screen.print(side_by_side(replies))
        return
    for reply in replies:
        screen.print(one_of(reply, named=len(replies) > 1), soft_wrap=not screen.is_terminal)


def side_by_side(replies: Sequence[Reply]) -> Table:
    """A column for each answer: whose it is, what it says, what was measured."""
    table = Table(expand=True, show_footer=True)
    for reply in replies:
        header, footer = plain(reply.model, "bold"), plain(reply.figures, "dim")
        table.add_column(header, footer, ratio=1, overflow="fold")
    table.add_row(*(plain(reply.answer.text) for reply in replies))
    return table


def one_of(reply: Reply, *, named: bool) -> Text:
    """An answer and what was measured of it."""
    name = plain(f"{reply.model}:\n", "bold") if named else Text()
    return Text.assemble(name, plain(reply.answer.text), "\n", plain(f"[{reply.figures}]", "dim"))


def plain(text: str, style: str = "") -> Text:
    """Somebody's text as it is."""
    return Text(without_controls(text), style)
