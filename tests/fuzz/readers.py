"""Coverage-guided fuzzing of what reads the files of others: by hand, not in the suite, after `pip install atheris`.

    python -m tests.fuzz.readers jsonl -max_total_time=300

What a target reads ends in a result or in the one kind of error that is told to users; anything else is a find, and
libFuzzer leaves the bytes that led to it in a file `crash-...`.
"""

import gzip
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import pyarrow.parquet
import safetensors.torch
import torch

with atheris.instrument_imports(include=["trimtab.data", "trimtab.untrusted", "trimtab.report.read"]):
    from trimtab import data
    from trimtab.report.read import read_run
    from trimtab.untrusted import parse_json, read_yaml_mapping
with atheris.instrument_imports(include=["trimtab.checkpoint", "trimtab.model_files"]):
    from trimtab.checkpoint import MANIFEST, verify
    from trimtab.checkpoint import manifest as checkpoint_manifest
    from trimtab.model_files import check_files, tensor_names

from trimtab.records import Demonstration, Feedback, Preference, Prompt, Ranking

KINDS = (Prompt, Demonstration, Preference, Ranking, Feedback)
FOLDER = Path(tempfile.mkdtemp(prefix="trimtab-fuzz-"))
RUN = ("config.yaml", "environment.json", "metrics.jsonl", "evals.jsonl", "samples.jsonl", "rollouts.jsonl")


def rows(suffix: str) -> Callable[[bytes], None]:
    """A data file of this kind. The first byte says which records are wanted, and whether bad rows are skipped."""
    path = FOLDER / f"rows{suffix}"

    def read(content: bytes) -> None:
        first = content[0] if content else 0
        path.write_bytes(content[1:])
        try:
            data.load(path, KINDS[first % len(KINDS)], skip_invalid=first >= 128)
        except (ValueError, FileNotFoundError) as error:
            assert str(path) in str(error)
            str(error).encode()

    return read


def json_value(content: bytes) -> None:
    """One JSON value."""
    try:
        parse_json(content.decode("utf-8", "surrogateescape"))
    except ValueError:
        return


def settings(content: bytes) -> None:
    """A config file."""
    path = FOLDER / "config.yaml"
    path.write_bytes(content)
    try:
        read_yaml_mapping(path)
    except ValueError as error:
        assert str(path) in str(error)


def run_directory(content: bytes) -> None:
    """The files of a run, a NUL byte between them."""
    for name, part in zip(RUN, content.split(b"\0"), strict=False):
        (FOLDER / name).write_bytes(part)
    try:
        read_run(FOLDER)
    except (ValueError, FileNotFoundError) as error:
        assert str(FOLDER) in str(error)


def manifest(content: bytes) -> None:
    """A checkpoint's manifest."""
    (FOLDER / MANIFEST).write_bytes(content)
    try:
        verify(FOLDER)
    except ValueError as error:
        assert str(FOLDER) in str(error)


def model(content: bytes) -> None:
    """A model's settings, a NUL byte, and its weights."""
    folder = FOLDER / "model"
    folder.mkdir(exist_ok=True)
    config, _, weights = content.partition(b"\0")
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(weights)
    try:
        check_files(folder)
        tensor_names(folder / "model.safetensors")
    except ValueError as error:
        assert str(folder) in str(error)


TARGETS: dict[str, Callable[[bytes], None]] = {
    **{suffix.removeprefix("."): rows(suffix) for suffix in (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz")},
    "json-value": json_value,
    "settings": settings,
    "run": run_directory,
    "manifest": manifest,
    "model": model,
}


ROW = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c", "completion": "d", "label": True}


def parquet_file() -> bytes:
    """A row as a parquet file."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), buffer)
    return buffer.getvalue()


def seeds() -> dict[str, bytes]:
    """Something whole to begin with, for every target."""
    line, weights = json.dumps(ROW).encode() + b"\n", safetensors.torch.save({"a": torch.zeros(2)})
    files = (b"command: sft\nsteps: 3\n", b'{"seed": 0}', b'{"step": 1, "loss": 0.5}\n', line, line, line)
    return {
        "jsonl": b"\2" + line,
        "json": b"\2[" + line + b"]",
        "csv": b'\2prompt,chosen,rejected\n"a, b",c,d\n',
        "parquet": b"\2" + parquet_file(),
        "jsonl.gz": b"\2" + gzip.compress(line),
        "json-value": line,
        "settings": b"model: tiny\nsteps: 3\nreward: [a, b]\nlr: 1.0e-5\n",
        "run": b"\0".join(files),
        "manifest": checkpoint_manifest(3, {"state/values.json": {"bytes": 2, "sha256": "0" * 64}}).encode(),
        "model": b'{"num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]}\0' + weights,
    }


def fuzz() -> None:
    """Fuzz the target that the first word names; the others are libFuzzer's."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"give one of {', '.join(TARGETS)}")
    name = sys.argv.pop(1)
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seeds()[name])
    atheris.Setup([*sys.argv, str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz()
