"""Where the figures of a run go besides its own files, if the user asks for it: TensorBoard, trackio, Weights & Biases.

The files of the run directory are the record, a sink is a copy to look at. So a sink that cannot be opened ends a run
before its first step, but one that fails later is told once, what it misses is counted, and the run goes on without it.

`RUN/tracking/SINK.json` says under which name the sink knows the run and up to which step it was sent what. A run that
is resumed goes on under that name and sends nothing twice.

TensorBoard was tried for real. trackio and wandb are called as their documentation says (of the autumn of 2026) and
tested with stand-ins; against their services they were not run.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from trimtab.progress import console
from trimtab.untrusted import printable, read_json_object, read_yaml_mapping

SinkName = Literal["tensorboard", "trackio", "wandb"]
Send = Callable[[int, Mapping[str, float | str]], None]
"""Takes a step and what belongs to it: figures, and texts."""

GROUPS = {"metrics.jsonl": "train", "evals.jsonl": "eval", "samples.jsonl": "samples"}
"""The files whose rows are sent, and what stands before the names of docs/metrics.md."""
PROJECT = "trimtab"


@dataclass
class Sent:
    """What a sink has of a run: its name there, the last step of each group, and the rows that it missed."""

    identity: str
    steps: dict[str, int] = field(default_factory=dict)
    missed: int = 0


@dataclass(frozen=True)
class Place:
    """What a sink is opened for: a run directory, the run's name there, and the step that the run is at.

    `config` is None where the sink has it already, since the run goes on.
    """

    directory: Path
    identity: str
    step: int
    config: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """What people call the run."""
        return self.directory.resolve().name


# ---- Sinks


@contextmanager
def tensorboard(place: Place) -> Iterator[Send]:
    """Event files in RUN/tensorboard. What they hold of later steps than the run is at no longer counts."""
    from torch.utils.tensorboard import SummaryWriter

    # At the first opening, too: TensorBoard takes the first mark for a beginning and forgets at the later ones.
    with SummaryWriter(str(place.directory / "tensorboard"), purge_step=place.step + 1) as writer:

        def send(step: int, values: Mapping[str, float | str]) -> None:
            for name, value in values.items():
                if isinstance(value, str):
                    writer.add_text(name, as_code(value), step)
                else:
                    writer.add_scalar(name, value, step)
            writer.flush()

        if place.config is not None:
            send(place.step, {"config": json.dumps(place.config, indent=2, ensure_ascii=False)})
        yield send


def as_code(text: str) -> str:
    """A text as Markdown that shows it as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


@contextmanager
def trackio(place: Place) -> Iterator[Send]:
    """A trackio run: on this machine, or where its own settings (TRACKIO_SPACE_ID, ...) say."""
    run = import_module("trackio").init(
        project=PROJECT, name=f"{place.name}-{place.identity}", config=place.config, resume="allow"
    )
    yield lambda step, values: run.log(dict(values), step=step)
    run.finish()


@contextmanager
def wandb(place: Place) -> Iterator[Send]:
    """A run of Weights & Biases, with its own files in RUN/wandb; project, account and mode are its own settings'."""
    service = import_module("wandb")
    run = service.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=place.identity,
        name=place.name,
        dir=str(place.directory),
        config=place.config,
        resume="allow",
    )

    def send(step: int, values: Mapping[str, float | str]) -> None:
        shown = {
            name: service.Table(columns=["text"], data=[[value]]) if isinstance(value, str) else value
            for name, value in values.items()
        }
        run.log(shown, step=step)

    yield send
    run.finish()


SINKS: dict[str, Callable[[Place], AbstractContextManager[Send]]] = {
    "tensorboard": tensorboard,
    "trackio": trackio,
    "wandb": wandb,
}
PURGED = {"tensorboard"}
"""Sinks that forget what came after the step that a run goes on from, and get it again."""


def check_sinks(names: Sequence[str]) -> None:
    """ValueError for a sink that is named twice or whose package is not there."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--track {' '.join(names)}: {name} is named twice.")
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--track {name}: the package {name} is not installed. Type: pip install {name} (trimtab's extra "
                "`track` brings all three: pip install '.[track]')."
            )


# ---- What a run sends to them


class TrackingFailed(Exception):
    """Something went wrong in a sink, whatever its package calls it."""


@contextmanager
def failing_by_name() -> Iterator[None]:
    """A block of somebody else's code, of which any error is a `TrackingFailed`."""
    try:
        yield
    except Exception as error:
        raise TrackingFailed(printable(f"{type(error).__name__}: {error}")) from error


@dataclass
class Sink:
    """An open sink of a run: takes the rows that the run writes, and sends on those that the sink does not have.

    `before` is what it had when it was opened. Once it has failed, rows are only counted.
    """

    name: str
    directory: Path
    send: Send
    sent: Sent
    end: ExitStack
    before: dict[str, int]
    failed: bool = False
    numbered: tuple[tuple[str, int], int] = (("", 0), 0)
    """The last group and step, and how many rows it has so far."""

    def __call__(self, file: str, row: Mapping[str, Any]) -> None:
        """Take one row of one of the run's files."""
        group, step = GROUPS.get(file), int(row.get("step", 0))
        if group is None or step <= self.before.get(group, -1):
            return
        last, count = self.numbered
        self.numbered = ((group, step), count + 1 if last == (group, step) else 1)
        if not self.failed:
            self._attempt(lambda: self.send(step, values_of(group, row, self.numbered[1])), f"at step {step}")
        if self.failed:
            self.sent.missed += 1
        else:
            self.sent.steps[group] = step
        write_sent(self.directory, self.name, self.sent)

    def close(self) -> None:
        """Let the sink know that nothing more comes; says how much it missed."""
        atexit.unregister(self.close)
        self._attempt(self.end.close, "at the end")
        if self.sent.missed:
            self._say(f"{self.sent.missed} rows were not tracked. They are in {self.directory}.")

    def _attempt(self, work: Callable[[], None], when: str) -> None:
        try:
            with failing_by_name():
                work()
        except TrackingFailed as error:
            self.failed = True
            self._say(f"failed {when} and gets nothing more; the run itself goes on. {error}")

    def _say(self, text: str) -> None:
        console.print(f"--track {self.name}: {text}", markup=False, style="yellow")


def values_of(group: str, row: Mapping[str, Any], number: int) -> dict[str, float | str]:
    """What a sink gets of a row: its figures, those that could not be measured left out; of a sample its texts."""
    if group == "samples":
        return {f"{group}/{number}": f"{row['prompt']}\n\n--> {row['response']}"}
    figures = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
    return {f"{group}/{name}": float(value) for name, value in figures.items() if math.isfinite(value)}


def open_sinks(names: Sequence[str], directory: Path, step: int) -> list[Sink]:
    """The sinks of a run that is at `step`. ValueError where one cannot be opened."""
    return [open_sink(name, directory, step) for name in names]


def open_sink(name: str, directory: Path, step: int) -> Sink:
    """One sink, new or gone on with."""
    known = read_sent(directory, name)
    sent = known or Sent(secrets.token_hex(8))
    config = None if known else read_yaml_mapping(directory / "config.yaml")
    end = ExitStack()
    try:
        with failing_by_name():
            send = end.enter_context(SINKS[name](Place(directory, sent.identity, step, config)))
    except TrackingFailed as error:
        raise ValueError(f"--track {name} cannot be opened. {error}") from error
    if sent.steps.get("train", 0) >= step:
        sent.missed = 0  # what it missed comes again
    if name in PURGED:
        sent.steps = {group: min(last, step) for group, last in sent.steps.items()}
    sink = Sink(name, directory, send, sent, end, before=dict(sent.steps))
    write_sent(directory, name, sent)
    atexit.register(sink.close)
    return sink


# ---- What they have


def sent_file(directory: Path, name: str) -> Path:
    return directory / "tracking" / f"{name}.json"


def read_sent(directory: Path, name: str) -> Sent | None:
    """What a sink has of a run; None if it has nothing."""
    path = sent_file(directory, name)
    if not path.exists():
        return None
    found = read_json_object(path)
    identity, steps, missed = (found.get(key) for key in ("identity", "steps", "missed"))
    numbers = [missed, *steps.values()] if isinstance(steps, dict) else [None]
    if set(found) != {"identity", "steps", "missed"} or not (
        isinstance(identity, str) and all(type(number) is int for number in numbers)
    ):
        raise ValueError(f"{path} does not say what was sent to {name}. Remove it to track the rest as another run.")
    return Sent(**found)


def write_sent(directory: Path, name: str, sent: Sent) -> None:
    """Keep what a sink has, whole at every moment."""
    path = sent_file(directory, name)
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(asdict(sent)), encoding="utf-8")
    aside.replace(path)
