"""The same work here and in the peer, in turns: A B C A B C, each in its own process."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import floor, report
from benchmarks.process import Job, Result
from benchmarks.work import WORKS, Work, rows_of, scaled, write_rows
from trimtab.models import load_tokenizer, resolve
from trimtab.precision import choose_dtype
from trimtab.progress import console
from trimtab.run import processor_name, source_commit

ROOT = Path(__file__).parents[1]
OURS = "trimtab"
SETTINGS = ("best", "defaults")

TOLERANCES = {
    "bfloat16": {"loss": 1e-2, "grad_norm": 5e-2, "reward": 1e-6},
    "float32": {"loss": 1e-4, "grad_norm": 1e-3, "reward": 1e-6},
}
"""How far figures of the first step may lie apart, relative. The loss alone would say little: DPO's first is always
ln 2 and KTO's 1/2, whatever the rows are; the norm of the gradient depends on all of them."""

MOST_KL = 1e-3
"""How far from 0 KL may be in the first step of online RL, in nats per token."""

COMPARED = {"rloo": ("reward", "grad_norm"), "grpo": ("reward", "grad_norm")}
"""What is compared for these kinds of work instead of loss and gradient norm: the first loss of online RL says nothing,
for advantages add up to 0, and two losses with the same gradient differ in value."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


@dataclass(frozen=True)
class Cpu:
    """Speed and memory of training steps beside TRL, on the CPU. Writes one JSON file a work."""

    works: tuple[str, ...] = tuple(WORKS)
    """Which: dpo, dpo_long, dpo_hh, reward, reward_hh, sft, kto, rloo, grpo."""
    model: str = "smollm2-135m-instruct"
    """A model of trimtab's, or a folder."""
    pairs: int = 5
    """How many times every side runs each work, in turns."""
    steps: int = 2
    """Measured steps in a process, after one to warm up."""
    dtype: str = "auto"
    """auto, bfloat16 or float32, on both sides."""
    peer_python: str = ".venv-trl/bin/python"
    """The Python of the peer's virtual environment (`make bench` makes it)."""
    peer_settings: tuple[str, ...] = SETTINGS
    """The peer's settings: best, defaults; none runs this side alone."""
    hh_data: str | None = None
    """Pairs in the form of HH (prompt, chosen, rejected as messages) for dpo_hh and reward_hh, skipped without."""
    scale: float = 1.0
    """Factor on the words of prompts and answers, to try things out."""
    out: str = str(report.RESULTS)
    """Folder of the JSON files."""


def cpu(config: Cpu) -> list[dict[str, Any]]:
    """Run every work in turns, write and print what was measured."""
    check(config)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in config.works:
            if WORKS[name].from_conversations and config.hh_data is None:
                console.print(f"{name}: skipped, it needs --hh-data FILE")
                continue
            results.append(compare(name, config, Path(scratch)))
            console.print(f"{name}: {report.write(results[-1], Path(config.out))}")
    if results:
        print_table(results)
    return results


def print_table(results: Sequence[Mapping[str, Any]]) -> None:
    """The results on the standard output, wide enough for all columns."""
    from rich.console import Console

    console = Console(highlight=False, width=130)
    console.print(report.table(results))
    if parts := report.parts_table(results):
        console.print(parts)


def check(config: Cpu) -> None:
    """Refuse what cannot be run, before anything is."""
    if unknown := set(config.works) - set(WORKS):
        raise ValueError(f"--works {' '.join(sorted(unknown))}: give some of {', '.join(WORKS)}.")
    if unknown := set(config.peer_settings) - set(SETTINGS):
        raise ValueError(f"--peer-settings {' '.join(sorted(unknown))}: give some of {', '.join(SETTINGS)}, or none.")
    if min(config.pairs, config.steps) < 1:
        raise ValueError(f"--pairs {config.pairs} --steps {config.steps}: at least 1 of each is needed.")
    if config.peer_settings and not Path(config.peer_python).exists():
        raise FileNotFoundError(
            f"--peer-python {config.peer_python}: there is no such file. Type `make bench`, which makes the peer's "
            "environment from benchmarks/requirements-trl.txt, or give --peer-settings without a value."
        )
    if config.hh_data and not Path(config.hh_data).exists():
        raise FileNotFoundError(f"--hh-data {config.hh_data}: there is no such file.")


def compare(name: str, config: Cpu, scratch: Path) -> dict[str, Any]:
    """One work on every side, `pairs` times in turns."""
    job = prepare(name, config, scratch)
    sides: dict[str, list[Result]] = {OURS: [], **{f"trl {settings}": [] for settings in config.peer_settings}}
    floors: list[float] = []
    for turn in range(1, config.pairs + 1):
        for side, results in sides.items():
            results.append(start(side, job, config, scratch))
            console.print(f"{name} {turn}/{config.pairs} {side}: {told(results[-1])}")
            check_same_work(sides[OURS][0], results[-1], job.dtype, job.kind)
        floors.append(floor_seconds(job, sides[OURS][0]))
    facts = {
        "kind": job.kind,
        "model": config.model,
        "dtype": job.dtype,
        "commit": source_commit(),
        "processor": processor_name(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }
    return report.summary(name, sides, floors, **facts)


def told(result: Result) -> str:
    """A process's result in a line."""
    steps = ", ".join(f"{seconds:.2f}" for seconds in result.seconds[1:])
    first = ", ".join(f"{name} {result.figures[name]:.6g}" for name in ("loss", "grad_norm") if name in result.figures)
    return f"{steps} s a step, peak {result.peak / report.GIGA:.2f} GB, first {first}"


def prepare(name: str, config: Cpu, scratch: Path) -> Job:
    """The job of a work: its rows in a file, its model in a folder."""
    work: Work = scaled(WORKS[name], config.scale)
    folder = model_folder(config.model)
    if work.kind == "reward":
        folder = reward_folder(folder, scratch / "reward-model")
    conversations = Path(config.hh_data) if config.hh_data else None
    rows = rows_of(work, load_tokenizer(folder), conversations)
    arithmetic = choose_dtype(config.dtype, torch.device("cpu"))
    return Job(
        work=name,
        kind=work.kind,
        model=str(folder),
        rows=str(write_rows(scratch / f"{name}.jsonl", rows)),
        dtype="bfloat16" if arithmetic.autocast else "float32",
        steps=config.steps,
        max_length=work.max_length,
        answers=work.answers,
        new_tokens=work.answer_words if work.answers else 0,
    )


def model_folder(model: str) -> Path:
    """The folder of a model. ValueError for one that has none."""
    found = resolve(model)
    if not isinstance(found, Path):
        raise ValueError(f"--model {model} is a hub id; both sides read one folder, so give that.")
    return found.resolve()


def reward_folder(model: Path, folder: Path) -> Path:
    """A reward model with a new head, made once by a process of its own so that this one stays small."""
    if not folder.exists():
        run([sys.executable, "-m", "benchmarks.ours", "--save-reward-model", str(model), str(folder)])
    return folder


def start(side: str, job: Job, config: Cpu, scratch: Path) -> Result:
    """One process of a side."""
    if side == OURS:
        command = [sys.executable, "-m", "benchmarks.ours"]
    else:
        job = replace(job, settings=side.split()[1])
        # absolute(), for resolve() would follow the link out of the virtual environment.
        command = [str(Path(config.peer_python).absolute()), "-m", "benchmarks.peer_trl"]
    return Result.parse(run([*command, str(job.write(scratch / "job.json"))]))


def run(command: Sequence[str]) -> str:
    """The standard output of a Python command in the repository; RuntimeError with the end of its errors."""
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise RuntimeError(f"python {shlex.join(command[1:])} ended with status {done.returncode}\n{last}".strip())
    return done.stdout


def check_same_work(ours: Result, other: Result, dtype: str, kind: str = "dpo") -> None:
    """RuntimeError unless two processes read the same tokens, used as many threads and began with the same figures."""
    for name in ("rows", "tokens", "digest", "drawn"):
        if ours.tokens.get(name) != other.tokens.get(name):
            raise RuntimeError(f"{ours.side} and {other.side} read other tokens: {ours.tokens} and {other.tokens}")
    if ours.threads != other.threads:
        raise RuntimeError(f"{ours.side} used {ours.threads} threads, {other.side} {other.threads}")
    if kind in COMPARED and max(abs(side.figures["kl"]) for side in (ours, other)) > MOST_KL:
        raise RuntimeError(f"KL before the first step is {ours.figures['kl']:.3g} and {other.figures['kl']:.3g}, not 0")
    for name in COMPARED.get(kind, ("loss", "grad_norm")):
        left, right, tolerance = ours.figures[name], other.figures[name], TOLERANCES[dtype][name]
        if not math.isclose(left, right, rel_tol=tolerance):
            raise RuntimeError(
                f"{ours.side} and {other.side} did other work: {name} of the first step is {left:.6g} and {right:.6g}, "
                f"more than {tolerance:g} apart"
            )


def floor_seconds(job: Job, ours: Result) -> float:
    """The time of the products that the work needs, here and now."""
    return floor.seconds(job.model, floor.Counts.of(ours.tokens), getattr(torch, job.dtype))
