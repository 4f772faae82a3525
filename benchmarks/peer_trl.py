"""The peer's side of a comparison, one process: `PEER_PYTHON -m benchmarks.peer_trl JOB.json` prints a `Result`.

It runs in the peer's virtual environment and imports nothing of trimtab. Each trainer is called the way its
documentation shows: a model folder, a data set of text rows, a config. Seconds are taken between the trainer's own
callbacks for the beginning and the end of a step, so collation is left out here as on the other side.
"""
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
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

from benchmarks.process import Clock, Job, Result, count_of_e, parts_of, peak_bytes, resident_bytes, token_facts

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
    if job.answers:
        del same["max_length"]
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


NEVER = 10**9
"""An id that no vocabulary has: as the end token it leaves every answer at full length."""


def rloo(job: Job, folder: str, **given: Any) -> Any:
    return online(trl.RLOOTrainer, trl.RLOOConfig, job, folder, **given)


def grpo(job: Job, folder: str, **given: Any) -> Any:
    """The loss is averaged as in the paper, over the tokens of an answer and then over answers."""
    return online(trl.GRPOTrainer, trl.GRPOConfig, job, folder, loss_type="grpo", **given)


def online(trainer: Any, config: Any, job: Job, folder: str, *, loss_type: str | None = None, **given: Any) -> Any:
    """One optimizer step for every rollout: all answers to all prompts in one batch, none of which ends early."""
    own = settings(
        job,
        folder,
        per_device_train_batch_size=len(job.read_rows()) * job.answers,
        num_generations=job.answers,
        max_completion_length=job.new_tokens,
        beta=job.beta,
        shuffle_dataset=False,
        generation_kwargs={"eos_token_id": NEVER},
        **({"loss_type": loss_type} if loss_type else {}),
    )
    made = trainer(model=model_of(job), reward_funcs=count_of_e, args=config(**own), **given)
    made.eos_token_ids = [NEVER]
    return made


KINDS: dict[str, Callable[..., Any]] = {
    "dpo": dpo,
    "kto": kto,
    "reward": reward,
    "sft": sft,
    "rloo": rloo,
    "grpo": grpo,
}


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
        rollouts = Rollouts(trainer, job, rows) if job.answers else None
        losses = noted(trainer, "training_step")
        norms = noted(trainer.accelerator, "clip_grad_norm_")
        trainer.train()
    return Result(
        side=f"trl {job.settings}",
        seconds=watch.clock.seconds,
        losses=losses,
        figures={"grad_norm": norms[0], **(rollouts.figures() if rollouts else {"loss": losses[0]})},
        tokens=rollouts.facts() if rollouts else token_facts(rows_of(trainer.train_dataset)),
        loaded=watch.loaded,
        peak=torch.cuda.max_memory_allocated() if job.device == "cuda" else peak_bytes(),
        threads=torch.get_num_threads(),
        versions=versions(),
        parts=parts_of(rollouts.stages(), watch.clock.seconds) if rollouts else {},
    )


class Rollouts:
    """What a trainer draws, its stages' times, and the exchange of the first answers for those in the file.

    The first answers are drawn as ever, and then the rows' own take their place, the same as on the other side.
    """

    def __init__(self, trainer: Any, job: Job, rows: Iterable[dict[str, Any]]) -> None:
        self.trainer, self.fixed = trainer, [ids for row in rows for ids in row["answers"]]
        self.prompts: list[Sequence[int]] = []
        self.answers: list[list[Sequence[int]]] = []
        self.rewards: list[float] = []
        self.kl = math.nan
        self.clocks = {name: Clock() for name in ("sample", "score", "all")}
        self.generate, self.calculate = trainer._generate_single_turn, trainer._calculate_rewards
        self.whole = trainer._generate_and_score_completions
        trainer._generate_single_turn, trainer._calculate_rewards = self.draw, self.score
        trainer._generate_and_score_completions = self.roll_out

    def draw(self, prompts: Sequence[Sequence[int]], *given: Any, **named: Any) -> Any:
        self.clocks["sample"].start()
        drawn = self.generate(prompts, *given, **named)
        self.clocks["sample"].stop()
        first, alone = not self.answers, isinstance(drawn, list)  # RLOO gives ids, GRPO ids and log-probabilities
        self.prompts = self.prompts or list(prompts)
        self.answers.append(drawn if alone else drawn[0])
        if not first:
            return drawn
        return self.fixed if alone else (self.fixed, *drawn[1:])

    def score(self, *given: Any, **named: Any) -> Any:
        self.clocks["score"].start()
        found = self.calculate(*given, **named)
        self.clocks["score"].stop()
        self.rewards.append(float(found.mean()))
        return found

    def roll_out(self, *given: Any, **named: Any) -> Any:
        if len(self.rewards) == 1:  # a logged figure of the step before, which logging would empty at the end
            self.kl = float(self.trainer._metrics["train"]["kl"][0])
        self.clocks["all"].start()
        made = self.whole(*given, **named)
        self.clocks["all"].stop()
        return made

    def stages(self) -> dict[str, list[float]]:
        """Seconds of sampling, scoring, and the rest of a rollout: log-probabilities, mostly."""
        sample, score, whole = (self.clocks[name].seconds for name in ("sample", "score", "all"))
        rest = [all_of - one - other for all_of, one, other in zip(whole, sample, score, strict=True)]
        return {"sample": sample, "score": score, "refer": rest}

    def figures(self) -> dict[str, float]:
        """Mean reward and KL per token of the first step."""
        return {"reward": self.rewards[0], "kl": self.kl}

    def facts(self) -> dict[str, Any]:
        """The rows of the first step, and how many tokens each later one drew."""
        rows = [[*prompt, *answer] for prompt, answer in zip(self.prompts, self.fixed, strict=True)]
        return {**token_facts(rows), "drawn": [sum(map(len, answers)) for answers in self.answers[1:]]}


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
