"""What keeps a run from being lost: what is saved and when, signals that ask it to stop, and the random generators."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from trimtab.checkpoint import State, Stateful
from trimtab.progress import console


@dataclass(frozen=True)
class Safety:
    """What keeps a run from being lost: what is saved and when, what stays, what happens to a step that went wrong.

    `save` writes the model, `parts` are all that a later step depends on besides the run itself, and `rows` names the
    rows of a step.
    """

    save: Callable[[Path], None]
    parts: Mapping[str, Stateful]
    every: int = 0
    """Steps between checkpoints; 0: only when the run is asked to stop."""
    save_state: bool = True
    """Off: checkpoints hold the model alone, but for one that is written because the run is asked to stop."""
    keep_last: int = 0
    """How many checkpoints stay; 0: all."""
    keep_best: str | None = None
    """A figure of the evaluations: the model that was best in it stays as checkpoints/best."""
    on_nonfinite: str = "stop"
    rows: Callable[[int], Sequence[str]] = lambda step: ()


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop by a signal, and has ended its step and saved. The text says how to go on."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The signals that asked to stop: SIGTERM and Ctrl-C wait here for the end of a step, a second one does not."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        restore()
        console.print("stopping after this step; once more ends at once, without saving")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()


# ---- Random generators


def random_state() -> State:
    """The state of Python's, NumPy's and torch's generators."""
    version, words, gauss = random.getstate()
    numbers = numpy.random.get_state(legacy=False)
    assert isinstance(numbers, dict)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return {
        "python": [version, list(words), gauss],
        "numpy": {**numbers, "state": {**numbers["state"], "key": numbers["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": {str(i): torch.cuda.get_rng_state(i) for i in devices},
    }


def set_random_state(state: State) -> None:
    """Put the generators into a state that `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numbers = state["numpy"]
    key = numpy.array(numbers["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state({**numbers, "state": {**numbers["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    for device, values in state["cuda"].items():
        torch.cuda.set_rng_state(values, int(device))
