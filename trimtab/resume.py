"""Going on with a run: what its directory must be like, where it goes on from, and what goes back to how it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.checkpoint import checkpoints_of, is_whole, read_checkpoint, recover, remove, step_of
from trimtab.lock import LOCK, holds_anything, lock
from trimtab.progress import console
from trimtab.untrusted import read_yaml_mapping


def check_free(directory: Path, *, overwrite: bool) -> None:
    """FileExistsError if a folder holds anything, unless that is a run to overwrite."""
    if not directory.is_dir() or not holds_anything(directory):
        return
    if not overwrite or not (directory / "config.yaml").exists():
        raise FileExistsError(f"{directory} already holds something; give another directory, or --overwrite a run.")


def clear(directory: Path) -> None:
    """Empty a run directory: checkpoints first and at once, so that nobody goes on from what is half gone; its config
    last, so that it can be seen to be a run until then. Its lock stays.
    """
    remove(directory / "checkpoints")
    found = (path for path in directory.iterdir() if path.name != LOCK)
    for path in sorted(found, key=lambda path: path.name == "config.yaml"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


MAY_CHANGE = {"out", "save_every", "save_state", "keep_last", "eval_every", "keep_best", "on_nonfinite", "track"}
"""Flags that change no weight: what is looked at, what is kept."""
ROUNDING = {"micro_batch_rows", "gradient_checkpointing", "share_prompts", "packing", "batch_rows", "device"}
"""Flags that change speed and memory, and with them at most the last digits."""


def check_config(directory: Path, config: Mapping[str, Any]) -> None:
    """ValueError that names every flag in which a run differs from the one that is to go on.

    Flags that a run of an earlier version did not know are not compared.
    """
    stored = read_yaml_mapping(directory / "config.yaml")
    changed = [name for name in stored if name not in MAY_CHANGE and stored[name] != config.get(name)]
    refused = [name for name in changed if name not in ROUNDING]
    if {"steps", "epochs"} >= set(refused) and (config.get("schedule"), config.get("warmup")) == ("constant", 0):
        refused = []  # the learning rate of the steps so far does not depend on how many follow
    told = [f"--{name.replace('_', '-')} {stored[name]} -> {config.get(name)}" for name in (refused or changed)]
    if refused:
        raise ValueError(
            f"--resume: this is not the run in {directory}: {', '.join(told)}. Give the flags that it began with (they "
            "are in its config.yaml), another --out, or --overwrite. More --steps can be asked for with --schedule "
            "constant and --warmup 0, where the learning rate so far does not depend on them."
        )
    if told:
        console.print(f"changed: {', '.join(told)}")


def starting_point(run: Path, config: Mapping[str, Any], source: str | None) -> Path | None:
    """What to go on from, once it is known to be the same run and this is the only process in it, and what a process
    that died left over is cleared up.
    """
    check_config(run, config)
    lock(run)
    recover(run)
    return chosen_checkpoint(run, source)


def chosen_checkpoint(run: Path, source: str | None) -> Path | None:
    """The checkpoint to go on from: `source` (a folder, or its name in the run), or the newest; None without any."""
    found = checkpoints_of(run)
    if source is None:
        return found[-1] if found else None
    for path in found:
        if path.name == source or path.resolve() == Path(source).resolve():
            return path
    known = ", ".join(path.name for path in found) or "none"
    raise FileNotFoundError(f"--resume-from {source}: the run {run} has no such checkpoint. It has: {known}.")


def check_files(directory: Path, sizes: Mapping[str, int]) -> None:
    """ValueError unless the .jsonl files hold at least what they held at the checkpoint, up to the end of a line."""
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size < size:
            raise ValueError(f"{path} is shorter than it was at the checkpoint: it was changed or is damaged.")
        with path.open("rb") as file:
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":
                raise ValueError(f"{path}: no line ends at byte {size}, as it did at the checkpoint. It was changed.")


def cut_back(directory: Path, sizes: Mapping[str, int]) -> None:
    """Cut the .jsonl files to what they held at a checkpoint; those that did not exist yet go."""
    for path in directory.glob("*.jsonl"):
        if path.name in sizes:
            os.truncate(path, sizes[path.name])
        else:
            path.unlink()


def verified(run: Path, checkpoint: Path, go_on: str) -> dict[str, Any]:
    """The state in a checkpoint. ValueError that offers the whole one before it where this is damaged."""
    try:
        return read_checkpoint(checkpoint)
    except ValueError as error:
        before = [path for path in checkpoints_of(run) if step_of(path) < step_of(checkpoint)]
        good = next(filter(is_whole, reversed(before)), None)
        advice = f"Go on from the one before it:\n  {go_on} --resume-from {good.name}" if good else ""
        raise ValueError(f"{error}\n{advice or 'No earlier checkpoint is whole.'}") from None
