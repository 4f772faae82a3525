"""A run: its directory, its seed, its figures on disk, and the only training loop.

The directory is the contract between commands:

    config.yaml         what to type to repeat the run (`trimtab COMMAND --config config.yaml --out OTHER`)
    environment.json    versions, commit, command line, hardware, seed, what is not deterministic
    data.json           what was read, skipped, cut and dropped, and what `data check` says of it
    metrics.jsonl       one object a step
    evals.jsonl         one object an evaluation
    scores.jsonl        online methods: what every held-out answer scored, one object an evaluation
    samples.jsonl       what the policy says
    rollouts.jsonl      online RL: one object a rollout, with the answers to one of its prompts and their rewards
    checkpoints/        step-00000100/, ... and best/: models in `save_pretrained` form, and what is needed to go on
    model/              the final model in `save_pretrained` form
    report.html         the same for people
    tracking/           with --track: what the sinks were sent, and under which name
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml

from trimtab import __version__, parallel
from trimtab.checkpoint import (
    State,
    Stateful,
    checkpoints_of,
    remove,
    step_of,
    sync,
    thin_out,
    write_checkpoint,
    write_text,
)
from trimtab.learner import Learner
from trimtab.lock import holds_anything, lock
from trimtab.progress import console, progress_bar
from trimtab.resume import check_files, check_free, clear, cut_back, starting_point, verified
from trimtab.safety import Interrupted, Safety, random_state, set_random_state, stop_signals
from trimtab.tracking import Sink
from trimtab.untrusted import read_json_object

FORMAT_VERSION = 1
SHOWN = ("loss", "reward", "kl")
"""Figures of a step that the progress bar shows."""


@dataclass
class Run:
    """An open run directory."""

    directory: Path
    seed: int
    command: str = ""
    step: int = 0
    """The last step that `train` took."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The last evaluation, and its step."""
    best: float | None = None
    skipped: int = 0
    """Steps whose gradient was not finite, and that were let pass."""
    checkpoint: Path | None = None
    """What the run goes on from, or the last checkpoint that it wrote."""
    saved: State | None = None
    """What was in it, until `restore` hands it out."""
    sinks: list[Sink] = field(default_factory=list)
    """What else gets the rows of the .jsonl files (--track)."""

    # ---- Beginning, and going on

    @classmethod
    def create(cls, directory: str | Path, *, config: Mapping[str, Any], seed: int, overwrite: bool = False) -> Run:
        """Make the directory, write down what is needed to repeat the run, and seed every generator.

        Of several ranks the first one writes, here and everywhere; the others have the same object and no directory.
        Raises FileExistsError if the directory holds anything and `overwrite` is off, BlockingIOError if another
        process writes to it.
        """
        path = Path(directory)
        seed_everything(seed)
        run = cls(path, seed, str(config.get("command", "")))
        if not parallel.is_first():
            return run
        check_free(path, overwrite=overwrite)
        path.mkdir(parents=True, exist_ok=True)
        lock(path)
        check_free(path, overwrite=overwrite)  # again: a process that has ended since may have made a run here
        if holds_anything(path):
            clear(path)
        write_config(path, config)
        write_json(path / "environment.json", environment(seed))
        return run

    @classmethod
    def reopen(cls, directory: str | Path, *, config: Mapping[str, Any], seed: int, source: str | None = None) -> Run:
        """Open a run to go on from its newest checkpoint, or from `source`; from the start if it has none.

        Raises ValueError, before anything is changed, if the checkpoint is damaged or the config is another one;
        BlockingIOError if another process writes to it.
        """
        path = Path(directory)
        seed_everything(seed)
        run = cls(path, seed, str(config.get("command", "")))
        run.checkpoint = parallel.first_tells(partial(starting_point, path, config, source))
        with parallel.AllOrNone():
            run.saved = verified(path, run.checkpoint, run.go_on) if run.checkpoint else None
        if parallel.is_first():
            note_resumed(path, seed)
            write_config(path, config)
        return run

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Let every part, the files and the random generators be as they were at the checkpoint to go on from."""
        if self.saved is None:  # of a run that died before its first checkpoint
            parallel.first_tells(partial(cut_back, self.directory, {}))
            return
        saved, self.saved = self.saved, None
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            own = saved["run"]
            self.step, self.evaluation = own["step"], own["evaluation"]
            self.best, self.skipped = own["best"], own["skipped"]
            set_random_state(own.get("others_random", {}).get(str(parallel.rank()), own["random"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.checkpoint} cannot be used here: {error}") from error
        parallel.first_tells(partial(self._go_back, own["files"]))
        console.print(f"going on after step {self.step}, from {self.checkpoint}")

    def _go_back(self, sizes: Mapping[str, int]) -> None:
        """Let the files be as they were at the step that the run is at."""
        check_files(self.directory, sizes)
        for later in reversed(checkpoints_of(self.directory)):
            if step_of(later) > self.step:
                console.print(f"{later} is removed: the run goes on from an earlier checkpoint")
                remove(later)
        cut_back(self.directory, sizes)

    @property
    def go_on(self) -> str:
        """What to type to go on."""
        place = shlex.quote(str(self.directory))
        several = f" --nproc {parallel.ranks()}" if parallel.ranks() > 1 else ""
        return f"trimtab {self.command} --config {place} --out {place} --resume{several}"

    # ---- Writing down

    def note(self, **facts: Any) -> None:
        """Add to environment.json what flags such as `--dtype auto` and `--device auto` came to."""
        if not parallel.is_first():
            return
        path = self.directory / "environment.json"
        known = read_json_object(path)
        write_json(path, {**known, **facts})

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one object to a .jsonl file of the run, and to the sinks."""
        if not parallel.is_first():
            return
        # A lone surrogate, which is no Unicode text, goes back as the JSON escape that it came as.
        with (self.directory / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({key: _finite(value) for key, value in row.items()}, ensure_ascii=False) + "\n")
        for sink in self.sinks:
            sink(name, row)

    def close(self) -> None:
        """Nothing more will be written down."""
        for sink in self.sinks:
            sink.close()
        self.sinks = []

    # ---- The loop

    def train(
        self,
        learner: Learner,
        batches: Iterable[Any],
        *,
        steps: int,
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
        eval_every: int = 0,
        safety: Safety | None = None,
        title: str = "train",
    ) -> dict[str, float]:
        """Draw a batch, take a step, write it down; up to step `steps`, or until the batches end.

        Returns the last evaluation.
        `batches` is drawn lazily, one batch before its step, so that a batch sampled from the policy sees the current
        one; after `restore` it begins with the step that comes next. `evaluate(step)` runs before the first step, every
        `eval_every` steps (0: never in between) and at the end. Raises Interrupted after a step in which SIGTERM or
        Ctrl-C came, once the run is saved.
        """
        if steps < self.step:
            raise ValueError(f"--steps {steps}: the run is at step {self.step} already.")
        if not self.step:
            self._evaluate(evaluate, safety)
        with progress_bar(title, steps, done=self.step) as advance, stop_signals() as asked:
            ended = time.perf_counter()
            for batch in itertools.islice(batches, steps - self.step):
                self.step, began = self.step + 1, time.perf_counter()
                figures = self._step(learner, batch, safety)
                seconds = {"seconds": time.perf_counter() - began, "draw_seconds": began - ended}
                self._log_step(self.step, figures, batch, seconds)
                advance(note=", ".join(f"{name} {figures[name]:.4f}" for name in SHOWN if name in figures))
                if eval_every and self.step % eval_every == 0:
                    self._evaluate(evaluate, safety)
                stop = parallel.largest(asked[0] if asked else 0)  # all ranks stop after the same step
                if safety and (stop or (safety.every and (self.step % safety.every == 0 or self.step == steps))):
                    self.save(learner, safety, with_state=safety.save_state or bool(stop))
                if stop:
                    raise Interrupted(self._stopped(steps, safety), stop)
                ended = time.perf_counter()
        if self.evaluation.get("step") != self.step:
            self._evaluate(evaluate, safety)
        return {name: value for name, value in self.evaluation.items() if name != "step"}

    def _step(self, learner: Learner, batch: Any, safety: Safety | None) -> dict[str, float]:
        """A step; one whose loss or gradient is not finite ends the run with its rows named, or is let pass."""
        try:
            return learner.step(batch)
        except FloatingPointError as error:
            rows = safety.rows(self.step) if safety else ()
            named = f" Rows of the batch: {', '.join(rows)}." if rows else ""
            told = f"step {self.step}: {error}{named}"
            if safety is None or safety.on_nonfinite == "stop" or self.skipped == MOST_SKIPPED:
                raise FloatingPointError(f"{told} {self._last_good()}") from None
        self.skipped += 1
        console.print(f"[yellow]{told} It is skipped, the {self.skipped}. of at most {MOST_SKIPPED}.[/yellow]")
        return {**learner.skip(), "skipped": self.skipped}

    def _log_step(self, step: int, figures: Mapping[str, float], batch: Any, seconds: Mapping[str, float]) -> None:
        tokens = int(batch.tokens.attention_mask.sum())
        speed = {"tokens": tokens, "tokens_per_second": tokens / seconds["seconds"], **seconds}
        self.append("metrics.jsonl", {"step": step, **figures, **speed})

    def _evaluate(self, evaluate: Callable[[int], Mapping[str, float]] | None, safety: Safety | None) -> None:
        if evaluate is None:
            return
        figures = dict(evaluate(self.step))
        self.evaluation = {"step": self.step, **figures}
        self.append("evals.jsonl", self.evaluation)
        if safety and safety.keep_best:
            self._keep_best(safety.keep_best, figures, safety)

    def _keep_best(self, name: str, figures: Mapping[str, float], safety: Safety) -> None:
        """Save the model if it is the best so far in the figure `name`."""
        if name not in figures:
            raise ValueError(f"--keep-best {name}: the evaluation has {', '.join(figures)}.")
        value = -figures[name] if name in LOWER_IS_BETTER else figures[name]
        if self.step and math.isfinite(value) and (self.best is None or value > self.best):
            self.best = value
            write_together(self.directory / "checkpoints" / "best", step=self.step, state={}, save=safety.save)

    # ---- Saving

    def save(self, learner: Learner, safety: Safety, *, with_state: bool = True) -> None:
        """A checkpoint of the model, and of all that the next step depends on."""
        if self.checkpoint and step_of(self.checkpoint) == self.step:
            return
        check_weights(learner, self._last_good())
        state = {"run": self._state(), **{name: part.state_dict() for name, part in safety.parts.items()}}
        folder = self.directory / "checkpoints" / f"step-{self.step:08d}"
        try:
            write_together(folder, step=self.step, state=state if with_state else {}, save=safety.save)
        except OSError as error:
            raise OSError(f"{error} {self._last_good()}") from error
        self.checkpoint = folder
        if parallel.is_first():
            thin_out(self.directory, safety.keep_last)

    def _state(self) -> State:
        files = {path.name: path.stat().st_size for path in sorted(self.directory.glob("*.jsonl"))}
        own = {name: getattr(self, name) for name in ("step", "evaluation", "best", "skipped")}
        first, *others = parallel.gather(random_state())
        of_others = {"others_random": {str(rank): state for rank, state in enumerate(others, 1)}} if others else {}
        return {**own, "files": files, "random": first, **of_others}

    def _last_good(self) -> str:
        if self.checkpoint is None:
            return f"There is no checkpoint yet (--save-every). What was written is in {self.directory}."
        return f"The last good checkpoint is {self.checkpoint}; go on from it with:\n  {self.go_on}"

    def _stopped(self, steps: int, safety: Safety | None) -> str:
        told = f"stopped after step {self.step} of {steps}, as asked."
        return f"{told} {self._last_good()}" if safety else told


LOWER_IS_BETTER = ("loss", "kl", "unfinished")
"""Figures of an evaluation of which less is better; of all others more."""

MOST_SKIPPED = 10
"""Steps that may be skipped in a run because their gradient was not finite."""


def write_together(folder: Path, *, step: int, state: State, save: Callable[[Path], None]) -> None:
    """`write_checkpoint` on the first rank, once what the run wrote down is on the disk.

    `save` is called on all ranks, for it takes all of them to put split weights together, and the first one writes.
    """
    if not parallel.is_first():
        save(folder)
        return
    for path in folder.parents[1].glob("*.jsonl"):
        sync(path)
    write_checkpoint(folder, step=step, state=state, save=save)


def check_weights(learner: Learner, advice: str) -> None:
    """Refuse to save what the last step broke; earlier ones were found by the step after them."""
    finite = all(bool(parallel.here(parameter).isfinite().all()) for parameter in learner.parameters)
    if not all(parallel.gather(finite)):
        raise FloatingPointError(
            f"the weights are not finite after the last step, so they were not saved. Try a smaller --lr. {advice}"
        )


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


def note_resumed(run: Path, seed: int) -> None:
    """Add to environment.json when, and with what, a run is gone on with."""
    known = read_json_object(run / "environment.json") if (run / "environment.json").exists() else {}
    now = environment(seed)
    if known and known["versions"] != now["versions"]:
        console.print("[yellow]other versions than at the start of the run: last digits may differ[/yellow]")
    before = [known, *known.get("resumed", ())][-1].get("ranks", 1)
    if before != now["ranks"]:
        console.print(f"[yellow]ranks: {before} before, {now['ranks']} now: last digits may differ[/yellow]")
    resumed = [*known.get("resumed", ()), {name: now[name] for name in ("started", "versions", "commit", "ranks")}]
    known.pop("finished", None)
    write_json(run / "environment.json", {**now, **known, "resumed": resumed})


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


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """config.yaml, complete or not at all."""
    write_text(directory / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def write_json(path: Path, value: Any) -> None:
    """A JSON file for people and programs."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN; a figure that could not be measured is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
