"""Runs in processes of their own that can be killed at any moment, and the comparison of what two runs left behind."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.builtin import BUILTIN_MODELS, make_once

TIMES = {"seconds", "draw_seconds", "tokens_per_second"}
"""What differs between two runs of the same command."""

PATIENCE = 120
"""Seconds for a run; a loaded machine may need many times what it takes alone."""


def _command(arguments: list[str], log: str, cache: str) -> None:
    os.environ["TRIMTAB_CACHE"] = cache
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # A suite that runs in the background of a script has been told to ignore Ctrl-C, and its children with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from trimtab.cli import main

    sys.exit(main(arguments))


def cache_of(folder: Path) -> Path:
    """A cache of a test's own that has the model `tiny` already: made once beside the tests' folders, and linked to."""
    cache, (name, write) = folder / "cache", BUILTIN_MODELS["tiny"]
    if not cache.exists():
        make_once(folder.parent / name, write)
        cache.mkdir()
        (cache / name).symlink_to(folder.parent / name)
    return cache


def start(arguments: list[str], log: Path) -> Any:
    """`trimtab ARGUMENTS` in a new process, forked from one that has loaded the libraries and nothing else."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.loaded", "tests.killing"])
    process = processes.Process(target=_command, args=(arguments, str(log), str(cache_of(log.parent))))
    process.start()
    return process


def ended(process: Any) -> int:
    """How a process ended: its exit status, or minus the signal."""
    process.join(PATIENCE)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def run(arguments: list[str], log: Path) -> None:
    """A run to its end."""
    status = ended(start(arguments, log))
    assert status == 0, log.read_text()[-2000:]


def when(moment: Callable[[], bool], process: Any) -> bool:
    """Wait for a moment of a process; False if it ended before."""
    until = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < until:
        if moment():
            return True
        time.sleep(0.0005)
    return False


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def moments(out: Path, draw: random.Random, steps: int) -> tuple[str, Callable[[], bool]]:
    """A moment of a run at which it may be killed: after some step, or while something is being written."""
    step = draw.randint(1, steps)
    kinds: dict[str, Callable[[], bool]] = {
        f"after step {step}": lambda: lines(out / "metrics.jsonl") >= step,
        f"in a checkpoint after step {step}": lambda: (
            lines(out / "metrics.jsonl") >= step and any((out / "checkpoints").glob(".*"))
        ),
        "at the beginning": lambda: out.exists() and any(out.iterdir()),
        "in the final model": lambda: any(out.glob(".model-*")),
        "right after the first samples": lambda: lines(out / "samples.jsonl") >= 1,
    }
    name = draw.choice([*kinds, f"after step {step}", f"in a checkpoint after step {step}"])
    return name, kinds[name]


def killed_and_resumed(arguments: list[str], out: Path, log: Path, *, steps: int, kills: int, seed: str) -> list[str]:
    """Begin a run, kill it `kills` times at random moments, resuming each time, and let it end; the moments."""
    draw, told = random.Random(seed), []
    while len(told) < kills:
        name, moment = moments(out, draw, steps)
        process = start([*arguments, "--out", str(out), "--resume"], log)
        if when(moment, process):
            time.sleep(draw.random() * 0.03)
            process.kill()
        status = ended(process)
        assert status in (0, -signal.SIGKILL), log.read_text()[-2000:]
        if status == 0:  # too late: it had ended. The next one begins anew
            shutil.rmtree(out)
        else:
            told.append(name)
    run([*arguments, "--out", str(out), "--resume"], log)
    return told


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file without times."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def assert_same(one: Path, other: Path) -> None:
    """Two runs left the same behind, to the last bit: figures, texts, weights, and the states of all checkpoints."""
    for name in ("metrics.jsonl", "evals.jsonl", "scores.jsonl", "samples.jsonl", "rollouts.jsonl"):
        assert rows(one / name) == rows(other / name), name
    folders = [sorted(path.name for path in (out / "checkpoints").glob("*")) for out in (one, other)]
    assert folders[0] == folders[1]
    compared = [path.relative_to(one) for path in sorted(one.rglob("*.safetensors"))]
    assert Path("model/model.safetensors") in compared
    for name in compared:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    hidden = [path.name for path in other.rglob(".*")]
    assert hidden == [".lock"], "something that was half written is still there"
