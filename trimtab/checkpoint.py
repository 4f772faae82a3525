"""Checkpoints: a folder that is complete or absent, and that is verified before any of it is used.

    step-00000100/
        config.json, model.safetensors, ...   the model in `save_pretrained` form, for people and other programs
        state/values.json                     all that a step depends on: numbers and texts,
        state/tensors.safetensors             and tensors, named by their path in the nested state
        manifest.json                         format version, step, and size and sha256 of every file; written last

It is written under a hidden name, every file is brought to the disk, and then it is renamed. So a process that dies at
any moment leaves it whole or not at all. Nothing here can run code: there are JSON and safetensors only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab import parallel

FORMAT_VERSION = 1
MANIFEST, VALUES, TENSORS = "manifest.json", "state/values.json", "state/tensors.safetensors"
MOST_JSON_BYTES = 64 * 2**20
"""No manifest and no values of ours come near it; a larger file is not read into memory."""

State = Mapping[str, Any]
"""Nested mappings whose leaves are tensors and JSON values; keys are texts without a slash."""


@runtime_checkable
class Stateful(Protocol):
    """Something that a later step depends on: it says what it remembers, and can be made to remember it again."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> Any: ...


@dataclass(frozen=True)
class Weights:
    """The weights of a network that no optimizer knows, such as a reference that moves."""

    network: nn.Module

    def state_dict(self) -> State:
        return {name: parallel.gathered(weight) for name, weight in self.network.named_parameters()}

    def load_state_dict(self, state: State) -> None:
        copy_weights(dict(self.network.named_parameters()), state)


@torch.no_grad()
def copy_weights(own: Mapping[str, Tensor], saved: State) -> None:
    """Fill `own` tensors with the saved ones. ValueError, before any is, where they are those of another model."""
    if own.keys() != saved.keys():
        name = min(own.keys() ^ saved.keys())
        where = "this model has no such weight" if name in saved else "the checkpoint has no such weight"
        raise ValueError(f"the checkpoint is of another model: {name}: {where}.")
    for name, value in own.items():
        here, there = (f"{list(one.shape)} {str(one.dtype).removeprefix('torch.')}" for one in (value, saved[name]))
        if here != there:
            raise ValueError(f"the checkpoint is of another model: {name} is {there} there and {here} here.")
    for name, value in own.items():
        value.copy_(parallel.split_as(saved[name], value))


def as_state(value: Any) -> Any:
    """A dataclass as nested mappings of its fields; anything else as it is."""
    if not is_dataclass(value):
        return value
    return {entry.name: as_state(getattr(value, entry.name)) for entry in fields(value)}


def from_state(value: Any, state: Any) -> Any:
    """A dataclass like `value` with the fields of a state that `as_state` gave; in the place of anything else, it."""
    if not is_dataclass(value) or isinstance(value, type):
        return state
    return replace(value, **{name: from_state(getattr(value, name), part) for name, part in state.items()})


# ---- Writing


def write_checkpoint(folder: Path, *, step: int, state: State, save: Callable[[Path], None]) -> None:
    """Write a model and a state; afterwards `folder` is complete on the disk, whatever happens to the process.

    `save` writes the model into the folder that it is given. OSError that says what is needed if the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors_in(state)}
    values = json.dumps(values_in(state))
    needed = sum(tensor.nbytes for tensor in tensors.values()) + len(values)
    with replacing(folder) as aside, full_disk_told(folder, needed):
        save(aside)
        check_room(aside, needed)
        if state:
            (aside / VALUES).parent.mkdir()
            (aside / VALUES).write_text(values)
            save_file(tensors, aside / TENSORS)
            (aside / TENSORS).chmod(0o644)  # safetensors makes files for their owner only
        write_manifest(aside, step)


def tensors_in(state: State, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested state, named by their paths."""
    for key, value in state.items():
        assert isinstance(key, str) and "/" not in key, f"{key!r} cannot be a part of a path"
        if isinstance(value, Tensor):
            yield path + key, value
        elif isinstance(value, Mapping):
            yield from tensors_in(value, f"{path}{key}/")


def values_in(state: State) -> dict[str, Any]:
    """A nested state without its tensors."""
    kept = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    return {key: values_in(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def write_manifest(folder: Path, step: int) -> None:
    """The manifest of all files in a folder, once they are on the disk."""
    found = sorted(folder.rglob("*"))
    for path in found:
        sync(path)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in found
        if path.is_file()
    }
    write_text(folder / MANIFEST, manifest(step, files))


def manifest(step: int, files: Mapping[str, Any]) -> str:
    """The text of a manifest, which holds a sha256 of itself."""
    facts = {"format_version": FORMAT_VERSION, "step": step, "files": files}
    return json.dumps({**facts, "sha256": digest_of(facts)}, indent=2) + "\n"


def digest(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(facts: Mapping[str, Any]) -> str:
    """The sha256 of what a manifest says."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A hidden new folder to write in; renamed to `folder` when all is written, and removed otherwise.

    An earlier folder of that name goes under a hidden name first; `recover` brings it back if the process dies between.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        sync(aside)
        if folder.exists():
            folder.rename(folder.with_name(f".{folder.name}.old"))
        aside.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(folder.with_name(f".{folder.name}.old"), ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """A text file, complete or not at all, in the place of an earlier one."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def check_room(folder: Path, needed: int) -> None:
    """OSError if the disk has less than the bytes that are still to be written."""
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def full_disk_told(folder: Path, needed: int) -> Iterator[None]:
    """Says how many bytes are needed where a disk turns out to be full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if not full:
            raise
        free = shutil.disk_usage(folder.parent).free
        told = f"the disk is full: the state alone of {folder} takes {needed:,} bytes, the model comes on top"
        raise OSError(f"{told}; {free:,} bytes are free there now.") from None


# ---- Reading


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint, every file of which was verified. ValueError that names what is wrong with it."""
    files = verify(folder)
    if TENSORS not in files or VALUES not in files:
        raise ValueError(f"{folder} holds a model without the state of a run: one cannot go on from it.")
    values = read_json(folder / VALUES)
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged: {error}.") from None
    for name, tensor in tensors.items():
        *above, last = name.split("/")
        place = values
        for part in above:
            place = place.get(part)
            if not isinstance(place, dict):
                raise ValueError(f"{folder / TENSORS} is damaged: {VALUES} has no place for {name!r}.")
        place[last] = tensor
    return values


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint can be gone on from."""
    try:
        files = verify(folder)
    except ValueError:
        return False
    return {VALUES, TENSORS} <= files.keys()


def verify(folder: Path) -> dict[str, Any]:
    """The files of a checkpoint, by name, once all of them are what the manifest says.

    Files that the manifest does not name are never opened. ValueError for links, for names that lead elsewhere, for
    another size or other bytes, and for a format that is not known here.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder} is no checkpoint: a folder is needed.")
    check_file(folder / MANIFEST)
    facts = read_json(folder / MANIFEST)
    version = facts.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        told = f"format {version}, and this trimtab reads formats up to {FORMAT_VERSION}"
        raise ValueError(f"{folder} was written by a newer trimtab: it has {told}. Update trimtab.")
    said = facts.pop("sha256", None)
    files = facts.get("files")
    if said != digest_of(facts) or version != FORMAT_VERSION or not isinstance(files, dict):
        raise ValueError(f"{folder / MANIFEST} is damaged: it is not as it was written.")
    for name, known in files.items():
        verify_file(folder, name, known)
    return files


def verify_file(folder: Path, name: str, known: Any) -> None:
    """ValueError unless a file lies in the folder itself and is as the manifest knows it."""
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name:  # an absolute path begins with an empty part
        raise ValueError(f"{folder / MANIFEST} names {name!r}, which lies elsewhere.")
    if not isinstance(known, dict) or known.keys() != {"bytes", "sha256"}:
        raise ValueError(f"{folder / MANIFEST} is damaged: it does not say the size and sha256 of {name}.")
    for i in range(1, len(parts)):
        if folder.joinpath(*parts[:i]).is_symlink():
            raise ValueError(f"{folder.joinpath(*parts[:i])} is a link: checkpoints have none.")
    check_file(folder / name)
    size = (folder / name).stat().st_size
    if size != known["bytes"]:
        raise ValueError(f"{folder / name} is damaged: it has {size:,} bytes, and {known['bytes']:,} were written.")
    if digest(folder / name) != known["sha256"]:
        raise ValueError(f"{folder / name} is damaged: its bytes are not those that were written (sha256).")


def check_file(path: Path) -> None:
    """ValueError unless this is a file: no link, no folder, no device."""
    if not path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is missing, so the checkpoint is damaged.")
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path} is a link or no file at all: checkpoints have only files.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError for one that is cut, absurdly large or absurdly deep."""
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: that is no file of a checkpoint.")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not readable as JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object.")
    return found


# ---- The folder of all checkpoints


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says; -1 for a name that says none."""
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def recover(run: Path) -> None:
    """Clear up after a process that died while it wrote or removed: what was on its way out or not whole goes."""
    folder = run / "checkpoints"
    for old in folder.glob(".*.old"):
        place = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not place.exists():
            old.rename(place)
    for left in (*folder.glob(".*"), *run.glob(".model-*"), *run.glob(".critic-*")):
        shutil.rmtree(left)
    for left in run.glob(".*.partial"):
        left.unlink()


def remove(folder: Path) -> None:
    """Remove a folder in one step: hidden first, so that nobody meets half of it."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


RESUMABLE = 2
"""So many of the newest checkpoints keep their state: the one to go on from, and one before it if it is damaged."""


def thin_out(run: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints (0: none), and the state, not the model, of those that stay
    but are not among the newest two.
    """
    found = checkpoints_of(run)
    for path in found[:-keep_last] if keep_last else ():
        remove(path)
    for path in found[-keep_last:-RESUMABLE]:
        drop_state(path)


def drop_state(checkpoint: Path) -> None:
    """Leave a checkpoint's model, with a manifest that knows only that."""
    if not (checkpoint / "state").exists():
        return
    facts = read_json(checkpoint / MANIFEST)
    files = {name: known for name, known in facts["files"].items() if name not in (VALUES, TENSORS)}
    write_text(checkpoint / MANIFEST, manifest(facts["step"], files))
    shutil.rmtree(checkpoint / "state")
