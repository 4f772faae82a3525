"""A run: its directory, its seed, its figures on disk, and the only training loop.

The directory is the contract between commands:

    config.yaml         what to type to repeat the run (`trimtab COMMAND --config config.yaml --out OTHER`)
    environment.json    versions, commit, command line, hardware, seed, what is not deterministic
    data.json           what was read, skipped, cut and dropped
    metrics.jsonl       one object a step
    evals.jsonl         one object an evaluation
    samples.jsonl       what the policy says
    rollouts.jsonl      online RL: one object a rollout, with the answers to one of its prompts and their rewards
    checkpoints/        step-00000100/, ... and best/, in `save_pretrained` form
    model/              the final model in `save_pretrained` form
    report.html         the same for people
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml

from trimtab import __version__, parallel
from trimtab.learner import Learner
from trimtab.progress import progress_bar

FORMAT_VERSION = 1
SHOWN = ("loss", "reward", "kl")
"""Figures of a step that the progress bar shows."""


@dataclass
class Run:
    """An open run directory."""

    directory: Path
    seed: int
    step: int = 0
    """The last step that `train` took."""

    @classmethod
    def create(cls, directory: str | Path, *, config: Mapping[str, Any], seed: int, overwrite: bool = False) -> Run:
        """Make the directory, write down what is needed to repeat the run, and seed every generator.

        Of several ranks the first one writes, here and everywhere; the others have the same object and no directory.
        Raises FileExistsError if the directory holds anything and `overwrite` is off.
        """
        path = Path(directory)
        seed_everything(seed)
        if not parallel.is_first():
            return cls(path, seed)
        if path.is_dir() and any(path.iterdir()):
            if not overwrite or not (path / "config.yaml").exists():
                raise FileExistsError(f"{path} already holds something; give another directory, or --overwrite a run.")
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        write_json(path / "environment.json", environment(seed))
        return cls(path, seed)

    def note(self, **facts: str) -> None:
        """Add to environment.json what flags such as `--dtype auto` and `--device auto` came to."""
        if not parallel.is_first():
            return
        path = self.directory / "environment.json"
        known = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**known, **facts})

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one object to a .jsonl file of the run."""
        if not parallel.is_first():
            return
        # A lone surrogate, which is no Unicode text, goes back as the JSON escape that it came as.
        with (self.directory / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({key: _finite(value) for key, value in row.items()}, ensure_ascii=False) + "\n")

    def train(
        self,
        learner: Learner,
        batches: Iterable[Any],
        *,
        steps: int,
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
        eval_every: int = 0,
        save: Callable[[Path], None] | None = None,
        save_every: int = 0,
        title: str = "train",
    ) -> dict[str, float]:
        """Draw a batch, take a step, write it down; `steps` times, or until the batches end.

        Returns the last evaluation.
        `batches` is drawn lazily, one batch before its step, so that a batch sampled from the policy sees the current
        one. `evaluate(step)` runs before the first step, every `eval_every` steps (0: never in between) and at the end.
        """
        evaluation, evaluated = self._evaluate(evaluate, 0), 0
        self.step = 0
        with progress_bar(title, steps) as advance:
            ended = time.perf_counter()
            for batch in batches:
                self.step, began = self.step + 1, time.perf_counter()
                step = self.step
                figures = learner.step(batch)
                seconds = {"seconds": time.perf_counter() - began, "draw_seconds": began - ended}
                self._log_step(step, figures, batch, seconds)
                advance(note=", ".join(f"{name} {figures[name]:.4f}" for name in SHOWN if name in figures))
                if eval_every and step % eval_every == 0 and step < steps:
                    evaluation, evaluated = self._evaluate(evaluate, step), step
                if save and save_every and step % save_every == 0:
                    self.checkpoint(save, f"step-{step:08d}")
                if step == steps:
                    break
                ended = time.perf_counter()
        return evaluation if evaluated == self.step else self._evaluate(evaluate, self.step)

    def _log_step(self, step: int, figures: Mapping[str, float], batch: Any, seconds: Mapping[str, float]) -> None:
        tokens = int(batch.tokens.attention_mask.sum())
        speed = {"tokens": tokens, "tokens_per_second": tokens / seconds["seconds"], **seconds}
        self.append("metrics.jsonl", {"step": step, **figures, **speed})

    def _evaluate(self, evaluate: Callable[[int], Mapping[str, float]] | None, step: int) -> dict[str, float]:
        if evaluate is None:
            return {}
        figures = dict(evaluate(step))
        self.append("evals.jsonl", {"step": step, **figures})
        return figures

    def checkpoint(self, save: Callable[[Path], None], name: str) -> None:
        """A checkpoint, in the place of an earlier one of that name; written aside, so that it is always whole."""
        final = self.directory / "checkpoints" / name
        if not parallel.is_first():
            save(final)  # it takes all ranks to put split weights together, and the first one to write them
            return
        aside, retired = (final.with_name(final.name + suffix) for suffix in (".partial", ".old"))
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save(aside)
        if final.exists():
            final.rename(retired)
        aside.rename(final)
        shutil.rmtree(retired, ignore_errors=True)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, and ask torch for deterministic kernels where it has them."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Otherwise all new memory is first filled with NaN, which shows code that reads what nobody wrote: 5 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def environment(seed: int) -> dict[str, Any]:
    """Where and with what a run was made."""
    packages = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy")
    cuda = torch.cuda.is_available()
    return {
        "format_version": FORMAT_VERSION,
        "trimtab": __version__,
        "commit": source_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "ranks": parallel.ranks(),
        "seed": seed,
        "not_deterministic": ["some CUDA kernels have no deterministic form"] if cuda else [],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def processor_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def source_commit() -> str | None:
    """The commit of the checkout that the package runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    told = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or None


def write_json(path: Path, value: Any) -> None:
    """A JSON file for people and programs."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no NaN; a figure that could not be measured is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
