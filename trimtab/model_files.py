"""A model's folder, looked at before transformers or peft read it: what is in it may be anything.

Weights come from safetensors alone; settings are JSON objects of sane size; an index names files beside it; a config
does not ask for more layers than there are tensors; and what code a model brings is said before it runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trimtab.untrusted import MOST_TEMPLATE, check_regular, in_megabytes, read_json_object

SETTINGS = (
    *("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json"),
    *("tokenizer_config.json", "special_tokens_map.json"),
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja")
OLD_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
MOST_TOKENIZER = 512 * 2**20
"""Bytes of a tokenizer's file; vocabularies of 260,000 tokens have about 30 MB."""

SAFE = (
    "import torch, safetensors.torch as s; "
    "w = torch.load('{0}', map_location='cpu', weights_only=True); "
    "s.save_file({{n: t.clone() for n, t in w.items()}}, '{1}', {{'format': 'pt'}})"
)


def check_files(folder: Path) -> None:
    """Refuse (ValueError) a folder whose files cannot be what a model's are."""
    for name in (*SETTINGS, *TOKENIZERS):
        if (folder / name).exists() and check_regular(folder / name) > MOST_TOKENIZER:
            raise ValueError(f"{folder / name}: larger than {in_megabytes(MOST_TOKENIZER)}, the most that is read")
    template = folder / "chat_template.jinja"
    if template.exists() and template.stat().st_size > MOST_TEMPLATE:
        raise ValueError(f"{template}: larger than {in_megabytes(MOST_TEMPLATE)}, the most of a chat template")
    settings = {name: read_json_object(folder / name) for name in SETTINGS if (folder / name).exists()}
    _check_index(folder, settings.get("model.safetensors.index.json", {}))
    weights = sorted(folder.glob("*.safetensors"))
    names = sum(len(tensor_names(path)) for path in weights)
    layers = settings.get("config.json", {}).get("num_hidden_layers", 0)
    if weights and isinstance(layers, int) and layers > names:
        raise ValueError(f"{folder / 'config.json'}: num_hidden_layers: found {layers}, but there are {names} tensors")


def _check_index(folder: Path, index: Mapping[str, Any]) -> None:
    files = index.get("weight_map", {})
    found = list(files.values()) if isinstance(files, dict) else [files]
    strange = [name for name in found if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name)]
    if strange:
        raise ValueError(
            f"{folder / 'model.safetensors.index.json'}: weight_map: found {strange[0]!r:.100}, expected for every "
            "tensor the name of a .safetensors file beside it"
        )


def tensor_names(weights: Path) -> list[str]:
    """The names of the tensors in a safetensors file. ValueError for a damaged one."""
    check_regular(weights)
    try:
        with safe_open(weights, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights}: not a readable safetensors file ({error})") from None


def check_safetensors(folder: Path, pattern: str = "*.safetensors") -> None:
    """Refuse (ValueError) a folder without safetensors; says how to convert what is there instead."""
    if any(folder.glob(pattern)):
        return
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OLD_WEIGHTS)
    if not others:
        raise ValueError(f"{folder}: weights are read from {pattern}, but there are none; use save_pretrained.")
    raise ValueError(
        f"{folder}: weights are read from {pattern}, but there are only {', '.join(others)}, and loading these can run "
        f"code. Convert them, {how_to_convert(folder, others, pattern.replace('*', 'model'))}"
    )


def how_to_convert(folder: Path, others: list[str], target: str) -> str:
    """What to type to turn old weights into safetensors without running what else they hold."""
    weights = [name for name in others if name.endswith(".bin") and not name.startswith("training_args")]
    if len(weights) != 1:
        return f"with from_pretrained({str(folder)!r}) and save_pretrained of transformers."
    return f'for example:\n  python -c "{SAFE.format(folder / weights[0], folder / target)}"'


def own_code(folder: Path) -> list[str]:
    """The classes that a model's folder brings Python code for, as its settings name them."""
    maps = [read_json_object(folder / name).get("auto_map") for name in SETTINGS if (folder / name).exists()]
    named = [value for entries in maps if isinstance(entries, dict) for value in entries.values()]
    flat = [name for value in named for name in (value if isinstance(value, list) else [value])]
    return sorted({name for name in flat if isinstance(name, str)})
