"""What the processes of a comparison share: the job they read and the result they print.

Standard library only: the peer runs in its own virtual environment, where trimtab's dependencies are not installed.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Job:
    """One process's work: `1 + steps` optimizer steps on one batch, all rows of the file `rows`.

    `model` is a folder; where it holds no weights they are random, from its config and seed 0. `settings` are the
    peer's: `defaults` or `best`. `share` and `attention` are about this side: prompts shared or every row alone, and
    what runs shared sequences. `optimizer` is adamw or sgd. `answers` of `new_tokens` tokens each are drawn to every
    prompt where the work is online RL, with `beta` as the price of KL.
    """

    work: str
    kind: str
    model: str
    rows: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"
    steps: int = 2
    lr: float = 1e-6
    max_length: int = 4096
    settings: str = "best"
    share: bool = True
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    optimizer: str = "adamw"
    answers: int = 0
    new_tokens: int = 0
    beta: float = 0.05

    @classmethod
    def read(cls, path: str | Path) -> Job:
        """The job in a file that `write` made."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> Path:
        """Write the job to a file and return its path."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    def read_rows(self) -> list[dict[str, Any]]:
        """The text rows of the batch."""
        return [json.loads(line) for line in Path(self.rows).read_text(encoding="utf-8").splitlines()]

    def has_weights(self) -> bool:
        """Whether the model's folder holds weights."""
        return any(Path(self.model).glob("*.safetensors"))


@dataclass
class Result:
    """What a process measured. Sizes in bytes, times in seconds; `seconds[0]` is the warm-up step.

    A step is everything from a collated batch to changed weights: forward, backward, clipping, optimizer.
    `figures` belong to the first step. `loaded` is the resident memory once the model is there, `peak` the process's
    high-water mark, imports and loading included; on a GPU both are what torch has allocated there. `laid_out` says
    whether this side ran rows in shared sequences rather than as they are, `attention` which implementation ran them.
    `parts` are the seconds of a step's stages, where it has several: one list a stage, as long as `seconds`.
    """

    side: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    loaded: int = 0
    peak: int = 0
    threads: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    note: str = ""
    laid_out: bool = False
    attention: str = ""
    parts: dict[str, list[float]] = field(default_factory=dict)

    def print(self) -> None:
        """Hand the result to the process that waits for it: the last line of the standard output."""
        print(json.dumps(asdict(self)), flush=True)

    @classmethod
    def parse(cls, output: str) -> Result:
        """The result that a process printed."""
        return cls(**json.loads(output.strip().splitlines()[-1]))


@dataclass
class Clock:
    """Seconds between `start` and `stop`, each time."""

    seconds: list[float] = field(default_factory=list)
    began: float = 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def count_of_e(completions: Sequence[str], **columns: Any) -> list[float]:
    """The reward of online RL, on both sides: how often an answer has the letter e. Costs nothing, seldom ties."""
    return [float(text.count("e")) for text in completions]


def parts_of(stages: Mapping[str, Sequence[float]], seconds: Sequence[float]) -> dict[str, list[float]]:
    """The seconds of every stage of a step, `train` being what the others leave of it."""
    used = [sum(step) for step in zip(*stages.values(), strict=True)]
    train = [whole - part for whole, part in zip(seconds, used, strict=True)]
    return {**{name: list(values) for name, values in stages.items()}, "train": train}


def token_facts(rows: Iterable[Sequence[int]]) -> dict[str, Any]:
    """How many rows and tokens, and a digest of all ids that does not depend on the order of the rows."""
    ordered = sorted(list(row) for row in rows)
    digest = hashlib.sha256(json.dumps(ordered).encode()).hexdigest()
    return {"rows": len(ordered), "tokens": sum(map(len, ordered)), "digest": digest}


def resident_bytes() -> int:
    """Memory that the process holds now; 0 where the system does not say."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most memory that the process ever held."""
    # Linux hands ru_maxrss on from the process that forked this one, so its own file is asked first.
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """A size in the kernel's description of this process."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else 0
