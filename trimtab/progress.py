"""What a person sees of long work: a bar on a terminal, a line now and then elsewhere. All of it goes to stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Steady(Console):
    """A console whose reader may leave (`2>&1 | head`, a `tee` that died): work goes on, and what it says is lost."""

    def on_broken_pipe(self) -> None:
        """Let standard error lead nowhere, for all that write to it."""
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())


console = Steady(stderr=True, highlight=False, soft_wrap=True)

_shown: list[str] = []
"""The titles of the bars under way; only the first speaks."""


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar for `total` units of work, some of them done; yields `advance(count=1, note="")`.

    Silent inside another one: what belongs to a step, such as the scores of its answers, is told with the step.
    """
    _shown.append(title)
    try:
        if len(_shown) > 1:
            yield lambda count=1, note="": None
        else:
            with shown_bar(title, total, done) as advance:
                yield advance
    finally:
        _shown.pop()


@contextmanager
def shown_bar(title: str, total: int, done: int) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, a line every tenth of the way elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    began = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done
            before, done = done, done + count
            bar.update(task, advance=count, note=note)
            tenth = max(1, total // 10)
            if not console.is_terminal and (before // tenth != done // tenth or done == total):
                console.print(f"{title} {done}/{total} {note} ({time.monotonic() - began:.0f} s)")

        yield advance
