"""Training steps on a GPU at the shapes of real models, with random weights: no model has to be fetched.

Every arrangement runs in a process of its own: prompts shared or row by row, sdpa or FlexAttention, and TRL where this
Python can import it. MFU counts the operations of the tokens that the arrangement has to run (each prompt once where
prompts are shared, no padding) and is a share of the rate of one large bf16 product, measured first.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import alternate, report
from benchmarks.floor import Counts, flops, product_rate
from benchmarks.process import Job, Result
from benchmarks.work import Row, write_rows
from trimtab.progress import console
from trimtab.run import processor_name, source_commit


@dataclass(frozen=True)
class Shape:
    """A model's architecture and the batch that fits beside its weights. SGD where AdamW's state would not."""

    config: Mapping[str, Any]
    pairs: int = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"


def sizes(*, hidden: int, inner: int, layers: int, heads: int, key_heads: int, words: int) -> dict[str, int]:
    """The sizes of a transformer, by the names that configs of Llama and Qwen give them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": words,
    }


QWEN = {"model_type": "qwen2", "tie_word_embeddings": True}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}

SHAPES: dict[str, Shape] = {
    "0.5b": Shape(QWEN | sizes(hidden=896, inner=4864, layers=24, heads=14, key_heads=2, words=151936)),
    "1.5b": Shape(QWEN | sizes(hidden=1536, inner=8960, layers=28, heads=12, key_heads=2, words=151936)),
    "8b": Shape(
        LLAMA | sizes(hidden=4096, inner=14336, layers=32, heads=32, key_heads=8, words=128256),
        pairs=2,
        optimizer="sgd",
    ),
}
TINY = Shape(LLAMA | sizes(hidden=64, inner=128, layers=2, heads=4, key_heads=2, words=512), pairs=2)

FLEX = "shared, flex"
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "shared, sdpa": {"share": True, "attention": "sdpa"},
    "rows, sdpa": {"share": False, "attention": "sdpa"},
    FLEX: {"share": True, "attention": "flex"},
}
PEERS = {"trl best": {"settings": "best"}, "trl defaults": {"settings": "defaults"}}


@dataclass(frozen=True)
class Gpu:
    """Training steps at the shapes of real models on a GPU: tokens a second, MFU, memory, shared against rows."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Which: 0.5b, 1.5b (Qwen 2.5), 8b (Llama 3.1)."""
    works: tuple[Literal["dpo", "reward"], ...] = ("dpo", "reward")
    """Which: dpo, reward."""
    prompt_tokens: int = 512
    """Tokens of a prompt."""
    answer_tokens: int = 256
    """Tokens of an answer."""
    pairs: int | None = None
    """Pairs in a batch; unless given, what the shape is meant for."""
    steps: int = 5
    """Measured steps in a process, after one to warm up."""
    tiny: bool = False
    """A tiny model and short rows, on the CPU where there is no GPU: to see that everything runs."""
    out: str = str(report.RESULTS)
    """Folder of the JSON file."""


def gpu(config: Gpu) -> list[dict[str, Any]]:
    """Run every shape, work and arrangement; write and print what was measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not config.tiny:
        raise ValueError("this Python's torch sees no CUDA device; add --tiny to try the command on the CPU.")
    if unknown := set(config.shapes) - set(SHAPES):
        raise ValueError(f"--shapes {' '.join(sorted(unknown))}: give some of {', '.join(SHAPES)}.")
    if config.tiny:
        config = replace(
            config, prompt_tokens=min(config.prompt_tokens, 24), answer_tokens=min(config.answer_tokens, 12)
        )
    rate = product_rate(device, 512 if config.tiny else 8192)
    console.print(f"bf16 products on {name_of(device)}: {rate / 1e12:.1f} TFLOP/s")
    shapes = {"tiny": TINY} if config.tiny else {name: SHAPES[name] for name in config.shapes}
    results = []
    for name, shape in shapes.items():
        for work in config.works:
            results += arranged(name, shape, work, config, device, rate)
    written(results, config, device, rate)
    print_table(results)
    return results


def arranged(name: str, shape: Shape, work: str, config: Gpu, device: str, rate: float) -> list[dict[str, Any]]:
    """One shape and work in every arrangement; one that fails is told with its reason, and the others go on."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare(shape, work, config, device, Path(scratch))
        for arrangement in available(device):
            told: dict[str, Any] = {"shape": name, "work": work, "arrangement": arrangement}
            try:
                told |= measured(start(arrangement, job, Path(scratch)), job, rate)
            except RuntimeError as error:
                told["failed"] = str(error).splitlines()[-1]
            console.print(f"{name} {work} {arrangement}: {told.get('failed') or told['seconds']}")
            results.append(told)
    return results


def available(device: str) -> list[str]:
    """The arrangements that can run: FlexAttention has no backward pass on a CPU, and TRL may not be installed."""
    own = [name for name in ARRANGEMENTS if name != FLEX or device == "cuda"]
    return [*own, *(PEERS if importlib.util.find_spec("trl") else ())]


def start(arrangement: str, job: Job, scratch: Path) -> Result:
    """One process of an arrangement. RuntimeError if it fails, or if the model cannot run rows that way."""
    module = "benchmarks.peer_trl" if arrangement in PEERS else "benchmarks.ours"
    job = replace(job, **(ARRANGEMENTS | PEERS)[arrangement])
    result = Result.parse(alternate.run([sys.executable, "-m", module, str(job.write(scratch / "job.json"))]))
    if arrangement in ARRANGEMENTS:
        check_arrangement(result, job)
    return result


def check_arrangement(result: Result, job: Job) -> None:
    """RuntimeError unless rows ran the way that was asked for."""
    if result.laid_out != job.share:
        raise RuntimeError(f"prompts cannot be shared with {job.attention} here")
    if result.attention != job.attention:
        raise RuntimeError(f"{result.attention} ran where {job.attention} was asked for")


def measured(result: Result, job: Job, rate: float) -> dict[str, Any]:
    """An arrangement's figures. `tokens` count a prompt once per answer, whatever the arrangement ran."""
    taken = statistics.median(result.seconds[1:])
    return {
        "seconds": report.spread(result.seconds[1:]),
        "warmup_seconds": result.seconds[0],
        "tokens_per_second": result.tokens["tokens"] / taken,
        "mfu": flops(job.model, run_counts(job, shared=result.laid_out)) / taken / rate,
        "peak_bytes": result.peak,
        "loss": result.losses[0],
        "grad_norm": result.figures["grad_norm"],
        "versions": result.versions,
        "note": result.note,
    }


def run_counts(job: Job, *, shared: bool) -> Counts:
    """What an arrangement has to run, from the rows: one token a word, one that closes each answer."""
    total = Counts(0, 0)
    for row in job.read_rows():
        prompt = len(row["prompt"].split())
        answers = [len(row[name].split()) + 1 for name in ("chosen", "rejected")]
        total = added(total, pair_counts(prompt, answers, shared=shared, scores=job.kind == "reward"))
    return total


def pair_counts(prompt: int, answers: list[int], *, shared: bool, scores: bool) -> Counts:
    """The tokens, predictions and pairs of tokens that see each other of one prompt and its answers."""
    prompts = 1 if shared else len(answers)
    seen = prompts * prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in answers)
    return Counts(prompts * prompt + sum(answers), 0 if scores else sum(answers), seen=seen)


def added(left: Counts, right: Counts) -> Counts:
    """The counts of two works together."""
    return Counts(*(a + b for a, b in zip(asdict(left).values(), asdict(right).values(), strict=True)))


# ---- A model without weights, and rows of exactly so many tokens


def prepare(shape: Shape, work: str, config: Gpu, device: str, scratch: Path) -> Job:
    """The job of a shape: a folder with config and tokenizer, rows in a file."""
    folder = scratch / "model"
    write_model(shape, folder, labels=1 if work == "reward" else None)
    words = shape.config["vocab_size"] - len(SPECIAL)
    rows = pair_rows(config.pairs or shape.pairs, config.prompt_tokens, config.answer_tokens, words)
    return Job(
        work=work,
        kind=work,
        model=str(folder),
        rows=str(write_rows(scratch / "rows.jsonl", rows)),
        device=device,
        steps=config.steps,
        optimizer=shape.optimizer,
    )


SPECIAL = ("<pad>", "<end>")


def write_model(shape: Shape, folder: Path, labels: int | None) -> None:
    """A config and a tokenizer with one token a word ("w0 w1 ...") in a folder."""
    from transformers import AutoConfig, PreTrainedTokenizerFast

    words = shape.config["vocab_size"] - len(SPECIAL)
    special = {"pad_token_id": words, "eos_token_id": words + 1, "bos_token_id": None}
    head = {} if labels is None else {"num_labels": labels}
    entries = {name: value for name, value in shape.config.items() if name != "model_type"}
    AutoConfig.for_model(shape.config["model_type"], **entries, **special, **head).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(words), pad_token="<pad>", eos_token="<end>")
    tokenizer.save_pretrained(folder)


def word_tokenizer(words: int) -> Any:
    """A tokenizer whose tokens are the words w0, w1, ... and the special tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{number}": number for number in range(words)}
    numbered = {name: words + place for place, name in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, **numbered}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def pair_rows(pairs: int, prompt: int, answer: int, words: int) -> list[Row]:
    """Pairs of exactly so many tokens, the one that closes an answer included."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(f"w{number}" for number in torch.randint(words, (length,), generator=generator).tolist())

    return [
        {"prompt": text(prompt), "chosen": " " + text(answer - 1), "rejected": " " + text(answer - 1)}
        for _ in range(pairs)
    ]


# ---- What people see


def name_of(device: str) -> str:
    """The name of the GPU, or of the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else processor_name()


def written(results: list[dict[str, Any]], config: Gpu, device: str, rate: float) -> None:
    """The JSON file."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"date": time.strftime("%Y-%m-%d"), "device": name_of(device), "commit": source_commit()}
    told = {**facts, **asdict(config), "products_per_second": rate, "arrangements": results}
    path = folder / ("gpu-tiny.json" if config.tiny else "gpu.json")
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    console.print(str(path))


def print_table(results: list[dict[str, Any]]) -> None:
    """One row an arrangement."""
    made = Table(title="training steps: median [least, most]")
    for column in ("shape", "work", "arrangement", "seconds", "tokens/s", "MFU", "peak GB"):
        made.add_column(column, justify="left" if column in ("shape", "work", "arrangement") else "right")
    for one in results:
        made.add_row(one["shape"], one["work"], one["arrangement"], *cells(one))
    Console(highlight=False, width=120).print(made)


def cells(one: Mapping[str, Any]) -> list[str]:
    """An arrangement's figures, or why there are none."""
    if "failed" in one:
        return [one["failed"][:60], "", "", ""]
    seconds = "{median:.3f} [{min:.3f}, {max:.3f}]".format(**one["seconds"])
    return [seconds, f"{one['tokens_per_second']:.0f}", f"{one['mfu']:.2f}", f"{one['peak_bytes'] / report.GIGA:.2f}"]
