"""Reference log-probabilities on disk, so that the next run with the same data and reference finds them.

They stand in windows of consecutive items, one file each. A window's name is a hash of its rows (token ids and response
masks, so data, tokenization and cuts) and of everything that its values depend on to the last bit: the reference's
weights and config, precision, device, how many rows run together, versions. So a value that is read is the value that
would be computed, and a run that was cut short, or has more steps, computes only the windows that are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab import __version__
from trimtab.builtin import cache_folder
from trimtab.progress import console
from trimtab.run import processor_name
from trimtab.tokens import Encoded, digest_of_rows
from trimtab.weights import merged_state

if TYPE_CHECKING:
    from trimtab.models import FrozenPolicy

FORMAT_VERSION = 1
WINDOW_ITEMS = 512
"""Items of one file: enough to group rows by length, few enough that little is lost when a run is cut short."""

NOT_ARITHMETIC = ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache")
"""Entries of a model's config that its numbers do not depend on."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far a stored log-probability may be from one computed now: nats per token, relative above one nat.

They are equal to the last bit on a CPU. Kernels of GPUs that are not deterministic may differ in the last of the 8 bits
of a bf16 number, which comes to some hundredths of a nat.
"""

Rows = list[Tensor]
"""One tensor of log-probabilities per row of an item, `[T]` each, zero outside the response."""


@dataclass(frozen=True)
class ReferenceCache:
    """One reference's folder, how far its values may be from those computed now, and the seed of that sample."""

    folder: Path
    tolerance: float
    seed: int


def references_folder() -> Path:
    """Where all of it stands. It may be deleted at any time; what is missing is computed again."""
    return cache_folder() / "references"


def check_folder() -> None:
    """Refuse (ValueError), before any work, a cache that nothing could be written to."""
    folder = references_folder()
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(
            f"{above} is no folder that can be written to, so reference log-probabilities cannot be kept in {folder}. "
            "Set TRIMTAB_CACHE to another folder, or give --no-reference-cache."
        )


def open_cache(scorer: FrozenPolicy, *, max_rows: int, seed: int) -> ReferenceCache:
    """The cache of a reference that scores at most `max_rows` rows at a time."""
    arithmetic = json.dumps(arithmetic_of(scorer, max_rows), sort_keys=True)
    folder = references_folder() / hashlib.sha256(arithmetic.encode()).hexdigest()[:16]
    return ReferenceCache(folder, TOLERANCE[scorer.policy.arithmetic.autocast or torch.float32], seed)


def arithmetic_of(scorer: FrozenPolicy, max_rows: int) -> dict[str, Any]:
    """Everything but the rows that a log-probability depends on to the last bit."""
    device, config = scorer.device, scorer.model.config
    on_cpu = device.type == "cpu"
    return {
        "format": FORMAT_VERSION,
        "weights": fingerprint(scorer),
        "config": {key: repr(value) for key, value in config.to_dict().items() if key not in NOT_ARITHMETIC},
        "attention": config._attn_implementation,
        "adapter": scorer.adapter_is_on,
        "precision": str(scorer.policy.arithmetic.autocast),
        "arrangement": repr(scorer.policy.body.arrangement),
        "max_rows": max_rows,
        "device": processor_name() if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if on_cpu else 0,
        "versions": [__version__, *(metadata.version(name) for name in ("torch", "transformers"))],
    }


def fingerprint(scorer: FrozenPolicy) -> str:
    """The sha256 of the weights that a reference computes with, under their ordinary names.

    A model whose adapter is switched off has the fingerprint of the model without it. A gigabyte takes about a second.
    """
    network = scorer.model
    state = merged_state(network) if scorer.adapter_is_on else own_state(network)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        digests = pool.map(digest, state.values())
        named = [f"{name}={found}" for name, found in zip(state, digests, strict=True)]
    return hashlib.sha256("\n".join(sorted(named)).encode()).hexdigest()


def own_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers as they are without any adapter; tied ones once."""
    named = [*network.named_parameters(), *network.named_buffers()]
    return {name.replace(".base_layer.", "."): value for name, value in named if ".lora_" not in name}


def digest(values: Tensor) -> str:
    """The sha256 of a tensor: type, shape and bytes."""
    found = hashlib.sha256(f"{values.dtype}{tuple(values.shape)}".encode())
    found.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def window_file(folder: Path, items: Sequence[Encoded]) -> Path:
    """The file of a window: named after its rows, in order."""
    return folder / f"{digest_of_rows(items)[:32]}.safetensors"


def write_window(path: Path, items: Sequence[Encoded], values: Sequence[Rows]) -> None:
    """A window's values as one file, complete or not at all: those of the responses, row after row."""
    rows = [row for item in items for row in item.rows]
    scored = [found for item in values for found in item]
    kept = [found[torch.tensor(row.response, dtype=torch.bool)] for row, found in zip(rows, scored, strict=True)]
    tensors = {"logprobs": torch.cat(kept), "lengths": torch.tensor([len(found) for found in kept])}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, aside, metadata={"sha256": digest(tensors["logprobs"])})
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    finally:
        Path(aside).unlink(missing_ok=True)


def read_window(path: Path, items: Sequence[Encoded]) -> list[Rows] | None:
    """A window's values; None if there are none yet, or if the file is damaged, which is said."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            logprobs, lengths = file.get_tensor("logprobs"), file.get_tensor("lengths").tolist()
            expected = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        return _damaged(path, str(error))
    if digest(logprobs) != expected:
        return _damaged(path, "its values are not those that were written")
    if lengths != [sum(row.response) for item in items for row in item.rows]:
        return _damaged(path, "it holds other rows than its name says")
    rows = iter(logprobs.split(lengths))
    return [[spread(row.response, next(rows)) for row in item.rows] for item in items]


def _damaged(path: Path, reason: str) -> None:
    console.print(f"{path} is damaged ({reason}): its reference log-probabilities are computed again")


def spread(response: Sequence[bool], values: Tensor) -> Tensor:
    """Values of the response tokens as a whole row, zero elsewhere."""
    row = torch.zeros(len(response))
    row[torch.tensor(response, dtype=torch.bool)] = values
    return row
