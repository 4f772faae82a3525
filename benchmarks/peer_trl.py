"""The peer's side of a comparison, one process: `PEER_PYTHON -m benchmarks.peer_trl JOB.json` prints a `Result`.

It runs in the peer's virtual environment and imports nothing of trimtab. Each trainer is called the way its
documentation shows: a model folder, a data set of text rows, a config. Seconds are taken between the trainer's own
callbacks for the beginning and the end of a step, so collation is left out here as on the other side.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from benchmarks.process import Clock, Job, Result, peak_bytes, resident_bytes, token_facts

BEST = {"gradient_checkpointing": False, "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
"""What makes a step on a CPU faster than the defaults do, at the same precision. Attention is sdpa, the optimizer fused
AdamW and the number of loader workers 0 by default already."""

STORED_REFERENCE = {"precompute_ref_log_probs": True}


def settings(job: Job, folder: str, **own: Any) -> dict[str, Any]:
    """The arguments of a trainer's config: what makes the work the same, then what `best` adds."""
    same = {
        "output_dir": folder,
        "max_steps": 1 + job.steps,
        "per_device_train_batch_size": len(job.read_rows()),
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "bf16": job.dtype == "bfloat16",
        "use_cpu": job.device == "cpu",
        "optim": "sgd" if job.optimizer == "sgd" else "adamw_torch_fused",
        "max_length": job.max_length,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
    }
    reference = STORED_REFERENCE if job.kind in ("dpo", "kto") else {}
    return {**same, **own, **({**BEST, **reference} if job.settings == "best" else {})}


def dpo(job: Job, folder: str, **given: Any) -> Any:
    return trl.DPOTrainer(
        model=model_of(job), args=trl.DPOConfig(**settings(job, folder)), **given, **reference_of(job)
    )


def kto(job: Job, folder: str, **given: Any) -> Any:
    return trl.KTOTrainer(
        model=model_of(job), args=trl.KTOConfig(**settings(job, folder)), **given, **reference_of(job)
    )


def reward(job: Job, folder: str, **given: Any) -> Any:
    return trl.RewardTrainer(model=model_of(job), args=trl.RewardConfig(**settings(job, folder)), **given)


def sft(job: Job, folder: str, **given: Any) -> Any:
    """Packing puts the rows of the file into sequences of `max_length`; a batch is all of these."""
    packed = settings(job, folder, packing=True, completion_only_loss=True)
    return trl.SFTTrainer(model=model_of(job), args=trl.SFTConfig(**packed), **given)


KINDS: dict[str, Callable[..., Any]] = {"dpo": dpo, "kto": kto, "reward": reward, "sft": sft}


def model_of(job: Job) -> Any:
    """A folder with weights, which the trainer loads as float32; or a model of random weights at its shape."""
    if job.has_weights():
        return job.model
    auto = AutoModelForSequenceClassification if job.kind == "reward" else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(job.device):
        return auto.from_config(AutoConfig.from_pretrained(job.model), dtype=torch.float32)


def reference_of(job: Job) -> dict[str, Any]:
    """A live reference of random weights, which a trainer could not load by itself."""
    live = job.settings == "defaults" and not job.has_weights()
    return {"ref_model": model_of(job)} if live else {}


class Watch(TrainerCallback):
    """Takes the time of every step, and the memory once the model is there (before references are computed)."""

    def __init__(self, job: Job) -> None:
        self.job, self.clock, self.loaded = job, Clock(), 0

    def on_init_end(self, *arguments: Any, **named: Any) -> None:
        self.loaded = torch.cuda.memory_allocated() if self.job.device == "cuda" else resident_bytes()

    def on_step_begin(self, *arguments: Any, **named: Any) -> None:
        self.clock.start()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        self.clock.stop()


def run(job: Job) -> Result:
    """All steps of a job, and what they took."""
    watch = Watch(job)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    with tempfile.TemporaryDirectory() as folder:
        rows = Dataset.from_list(job.read_rows())
        trainer = KINDS[job.kind](job, folder, train_dataset=rows, processing_class=tokenizer, callbacks=[watch])
        losses = noted(trainer, "training_step")
        norms = noted(trainer.accelerator, "clip_grad_norm_")
        trainer.train()
    return Result(
        side=f"trl {job.settings}",
        seconds=watch.clock.seconds,
        losses=losses,
        figures={"loss": losses[0], "grad_norm": norms[0]},
        tokens=token_facts(rows_of(trainer.train_dataset)),
        loaded=watch.loaded,
        peak=torch.cuda.max_memory_allocated() if job.device == "cuda" else peak_bytes(),
        threads=torch.get_num_threads(),
        versions=versions(),
    )


def noted(owner: Any, name: str) -> list[float]:
    """The numbers that a method returns from now on."""
    found: list[float] = []
    method = getattr(owner, name)

    def noting(*arguments: Any, **named: Any) -> Any:
        result = method(*arguments, **named)
        found.append(float(result))
        return result

    setattr(owner, name, noting)
    return found


def rows_of(dataset: Any) -> Iterable[Sequence[int]]:
    """The ids of the rows that are trained on, whatever the trainer calls its columns."""
    for row in dataset:
        if "seq_lengths" in row:
            yield from unpacked(row)
        elif "completion_ids" in row:
            yield row["prompt_ids"] + row["completion_ids"]
        else:
            start = row.get("prompt_ids", [])
            yield from (start + row["chosen_ids"], start + row["rejected_ids"])


def unpacked(row: dict[str, list[int]]) -> Iterable[list[int]]:
    """The demonstrations of a packed row."""
    start = 0
    for length in row["seq_lengths"]:
        yield row["input_ids"][start : start + length]
        start += length


def versions() -> dict[str, str]:
    """What this side ran with."""
    known = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"python": platform.python_version(), **known}


if __name__ == "__main__":
    run(Job.read(sys.argv[1])).print()
