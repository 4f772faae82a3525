"""The groups of options that commands share. Every field is a flag; the text under it is its `--help`.

Groups are composed in a recipe's config and flat on the command line and in `config.yaml`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.lock import check_unlocked, holds_anything
from trimtab.tracking import SinkName, check_sinks
from trimtab.untrusted import read_json_object, read_yaml_mapping

Dtype = Literal["auto", "float32", "bfloat16"]
Overlong = Literal["error", "drop", "truncate-prompt-left", "truncate-response"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it computes."""

    model: str
    """Hub id, folder, run directory (its final model), or built-in: smollm2-135m-instruct, tiny."""
    dtype: Dtype = "auto"
    """Arithmetic of the model's body: auto is bf16 autocast over float32 weights where the processor has bf16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such models are refused."""


@dataclass(frozen=True)
class LoraOptions:
    """Train a low-rank adapter instead of all weights (Hu et al. 2021)."""

    lora_rank: int = 0
    """Rank of the adapters on all linear layers; 0 trains all weights."""
    lora_alpha: float | None = None
    """Scale of the adapters; 2 * rank unless given."""


@dataclass(frozen=True)
class DataOptions:
    """Which rows, and how long they may be."""

    data: str
    """File (.jsonl .json .csv .parquet, also .gz), hub id, package.module:function, or a built-in name."""
    eval_data: str | None = None
    """Held-out rows in the same form, for --eval-every."""
    max_length: int = 1024
    """Most tokens of prompt and answer together."""
    overlong: Overlong = "error"
    """What to do with longer rows; what was cut or dropped is counted and written to the run."""
    skip_invalid: bool = False
    """Skip and count bad rows instead of stopping at the first."""


@dataclass(frozen=True)
class OptimizerOptions:
    """How a step is taken, whatever it is made of."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after warm-up."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm here; 0 does not clip."""
    weight_decay: float = 0.0
    """AdamW's weight decay on matrices."""
    share_prompts: bool = True
    """Run a prompt once for its answers in a micro-batch, where that saves tokens; changes speed, no result."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Run layers again in the backward pass: less memory, a third more time; auto: on a GPU if memory is short."""


@dataclass(frozen=True)
class StepOptions:
    """How the weights move."""

    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    steps: int | None = None
    """Optimizer steps; instead of --epochs."""
    epochs: float | None = None
    """Passes over the data; 1 unless --steps is given."""
    batch_size: int = 16
    """Pairs, rankings or demonstrations per optimizer step, whatever the micro-batches."""
    micro_batch_rows: int = 16
    """Most rows (a pair is two) of one forward and backward pass; bounds memory, changes no result."""
    optimizer: OptimizerOptions = OptimizerOptions()


@dataclass(frozen=True)
class OnlineStepOptions:
    """How the weights move in online RL, where a step's answers are drawn and not read."""

    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    steps: int = 100
    """Optimizer steps."""
    micro_batch_rows: int = 16
    """Most answers of one forward and backward pass; bounds memory, changes no result."""
    optimizer: OptimizerOptions = OptimizerOptions()


@dataclass(frozen=True)
class RunOptions:
    """Where the run goes and what it writes down."""

    out: str
    """The run directory to make."""
    seed: int = 0
    """Seed of data order, initialization and sampling."""
    eval_every: int = 0
    """Evaluate on --eval-data every so many steps; 0: only before and after."""
    save_every: int = 0
    """Write a checkpoint every so many steps and at the end; 0: only the final model, and when the run is stopped."""
    save_state: bool = True
    """Off: checkpoints hold the model alone, a quarter of the size, and only a run that is stopped can be resumed."""
    keep_last: int = 0
    """Keep only so many of the newest checkpoints; 0: all. One can go on from the newest two."""
    keep_best: str | None = None
    """Keep the model that was best in this figure of the evaluations as checkpoints/best, such as accuracy or loss."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite ends the run, or is skipped and counted, ten times at most."""
    samples: int = 4
    """Prompts that a policy answers before and after training, online also at evaluations, into samples.jsonl."""
    resume: bool = False
    """Go on with the run in --out from its newest checkpoint; a directory that does not exist is begun."""
    resume_from: str | None = None
    """Go on from this checkpoint of the run instead, such as step-00000100."""
    overwrite: bool = False
    """Replace a run directory that exists."""
    track: tuple[SinkName, ...] = ()
    """Also send figures and samples there: tensorboard (RUN/tensorboard), trackio, wandb; several are possible."""
    shard: Literal["full", "none"] | None = None
    """Of several processes (--nproc N, torchrun): split weights over them (full) or give each a copy; full if unset."""


class AlreadyFinished(Exception):
    """A run that is to go on has reached its end."""


def flatten(config: Any) -> dict[str, Any]:
    """The fields of a composed config as one flat mapping, as they stand in `config.yaml`."""
    flat: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        flat |= flatten(value) if is_dataclass(value) else {entry.name: value}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def check_options(config: Any) -> None:
    """Refuse what cannot be done or would have no effect, before anything is read."""
    check_steps(config.steps)
    check_ranks(config)
    check_out(config.run)
    check_unfinished(config)
    check_inputs(config)
    check_sinks(config.run.track)
    if not -(2**63) <= config.run.seed < 2**63:
        raise ValueError(f"--seed {config.run.seed}: a number of at most 63 bits is needed.")
    if config.run.eval_every and config.data.eval_data is None:
        raise ValueError(f"--eval-every {config.run.eval_every} has no effect without --eval-data.")
    every = {"--eval-every": config.run.eval_every, "--save-every": config.run.save_every}
    for flag, value in {**every, "--samples": config.run.samples, "--keep-last": config.run.keep_last}.items():
        if value < 0:
            raise ValueError(f"{flag} {value}: a number of at least 0 is needed.")
    check_keeping(config)
    if config.data.max_length < 2:
        raise ValueError(f"--max-length {config.data.max_length}: at least 2 tokens are needed.")
    if config.lora.lora_rank < 0 or (config.lora.lora_alpha is not None and not config.lora.lora_rank):
        raise ValueError(
            f"--lora-rank {config.lora.lora_rank} --lora-alpha {config.lora.lora_alpha}: a rank above 0 trains an "
            "adapter, 0 trains all weights and has no alpha."
        )


def check_ranks(config: Any) -> None:
    """Refuse flags of several processes for one, and what several cannot do."""
    count, shard = int(os.environ.get("WORLD_SIZE", "1")), config.run.shard
    if count == 1 and shard is not None:
        raise ValueError(f"--shard {shard} has no effect on one process: add --nproc N, or leave it out.")
    if count > 1 and config.model.device.startswith("cuda:"):
        raise ValueError(f"--device {config.model.device}: each of {count} processes has its own. Give --device cuda.")
    if count > 1 and getattr(getattr(config, "sampling", None), "sampler", "own") != "own":
        raise ValueError(f"--sampler {config.sampling.sampler}: {count} processes sample themselves. Leave it out.")
    if count > 1 and shard != "none" and getattr(getattr(config, "ptx", None), "ptx_data", None):
        raise ValueError("--ptx-data runs the policy more often on some ranks than on others: add --shard none.")


def check_inputs(config: Any) -> None:
    """Refuse inputs that do not exist by name, and those inside the directory that --overwrite would replace."""
    given = {"--model": config.model.model, "--data": config.data.data, "--eval-data": config.data.eval_data}
    for flag, value in {**given, "--ref-model": getattr(config, "ref_model", None)}.items():
        check_outside(config.run.out, flag, value)


def check_outside(out: str, flag: str, value: str | None) -> None:
    """Refuse an empty name, and one inside the directory that --overwrite would replace."""
    if value == "":
        raise ValueError(f"{flag} is empty.")
    if value and Path(value).exists() and Path(value).resolve().is_relative_to(os.path.realpath(out)):
        raise ValueError(f"{flag} {value} lies in --out {out}, which would be replaced. Give another --out.")


def check_steps(options: StepOptions | OnlineStepOptions) -> None:
    """Refuse numbers that cannot mean anything, by the name of their flag."""
    at_least_one = {"--micro-batch-rows": options.micro_batch_rows}
    if isinstance(options, StepOptions):
        at_least_one["--batch-size"] = options.batch_size
        check_epochs(options)
    if options.steps is not None:
        at_least_one["--steps"] = options.steps
    for flag, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{flag} {value}: at least 1 is needed.")
    how = options.optimizer
    if not 0 <= how.warmup <= 1:
        raise ValueError(f"--warmup {how.warmup}: it is a share of the steps, from 0 to 1.")
    numbers = {"--lr": options.lr, "--max-grad-norm": how.max_grad_norm, "--weight-decay": how.weight_decay}
    for flag, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{flag} {value}: a number that is not negative is needed.")


def check_epochs(options: StepOptions) -> None:
    """Refuse passes over the data that mean nothing or contradict the number of steps."""
    if options.epochs is not None and options.steps is not None:
        raise ValueError(f"--steps {options.steps} and --epochs {options.epochs}: give one of them.")
    if options.epochs is not None and not 0 < options.epochs < float("inf"):
        raise ValueError(f"--epochs {options.epochs}: a number above 0 is needed.")


def check_limit(limit: int | None) -> None:
    """Refuse a limit that leaves nothing."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: at least 1 is needed.")


def check_out(options: RunOptions, *, resumes: bool = True) -> None:
    """Refuse a run directory that holds something, before any work is done for it.

    `resumes`: whether the command can go on with a run.
    """
    out = Path(options.out)
    if out.is_symlink() and not out.exists():
        raise FileNotFoundError(f"--out {out} is a link that leads nowhere. Remove it, or give another directory.")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file; give a directory that does not exist yet.")
    if not options.out:
        raise ValueError("--out is empty; give a directory.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out}: {above} is no folder that can be written to.")
    if options.overwrite and (options.resume or options.resume_from):
        raise ValueError("--resume and --overwrite: give one of them.")
    if out.is_dir():
        check_unlocked(out)
    if out.is_dir() and holds_anything(out):
        check_run(options, resumes)
    elif options.resume_from:
        raise FileNotFoundError(f"--resume-from {options.resume_from}: there is no run in --out {out}.")


def check_run(options: RunOptions, resumes: bool) -> None:
    """Refuse to touch a run directory unless a flag says what shall become of it."""
    out = Path(options.out)
    if not (out / "config.yaml").exists():
        told = "already holds something that is no run (no config.yaml)"
        able = "to --resume or to --overwrite" if resumes else "to --overwrite"
        raise FileExistsError(f"--out {out} {told}, so there is nothing {able}. Give another directory.")
    if not (options.overwrite or options.resume or options.resume_from):
        raise FileExistsError(
            f"--out {out} already holds a run. Add {'--resume to go on with it or ' if resumes else ''}--overwrite to "
            "replace it, or give another directory."
        )


def check_unfinished(config: Any) -> None:
    """AlreadyFinished if a run that is to go on has ended, and no other number of steps is asked for now."""
    stored, environment = (Path(config.run.out) / name for name in ("config.yaml", "environment.json"))
    if not config.run.resume or not environment.exists() or not stored.exists():
        return
    step = read_json_object(environment).get("finished")
    then = read_yaml_mapping(stored)
    asked = {name: getattr(config.steps, name, None) for name in ("steps", "epochs")}
    if step is not None and all(then.get(name) == value for name, value in asked.items()):
        raise AlreadyFinished(f"the run in {config.run.out} is finished (step {step}): nothing is left to do.")


def check_keeping(config: Any) -> None:
    """Refuse flags about checkpoints that would have no effect."""
    run = config.run
    if not run.save_every and (run.keep_last or not run.save_state):
        flag = f"--keep-last {run.keep_last}" if run.keep_last else "--no-save-state"
        raise ValueError(f"{flag} has no effect without --save-every.")
    if run.keep_best and not run.eval_every:
        raise ValueError(f"--keep-best {run.keep_best} has no effect without --eval-every.")


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn."""

    max_new_tokens: int = 64
    """Most tokens of an answer."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the most likely tokens that hold this much probability."""
    min_p: float = 0.0
    """Draw among tokens at least this many times as likely as the most likely one; 0: all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that stand in the prompt or the answer already; 1: none."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are left out of it."""
    batch_rows: int = 32
    """Answers sampled at the same time; changes speed, not the samples (in float32)."""
    sampler: str = "own"
    """own, or vllm:URL, a vLLM server of this model's architecture, such as vllm:http://127.0.0.1:8000."""


def settings_of(options: SamplingOptions) -> dict[str, Any]:
    """What a sampler is told, by the names of its arguments."""
    return {entry.name: getattr(options, entry.name) for entry in fields(options) if entry.name != "sampler"}


@dataclass(frozen=True)
class RewardChoice:
    """Which reward; several are added up."""

    reward: tuple[str, ...]
    """A reward model's run, folder or hub id, implicit:RUN, py:package.module:function, length, sentiment,
    exact-match, or ensemble:mean(R1,R2,...), :min, :uwo. The sum of several."""
    reward_weights: tuple[float, ...] = ()
    """One factor for each reward; 1 unless given."""


@dataclass(frozen=True)
class RewardOptions:
    """How the reward computes."""

    choice: RewardChoice
    dtype: Dtype = "auto"
    """Arithmetic of the model's body: auto is bf16 autocast over float32 weights where the processor has bf16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    max_length: int = 1024
    """Most tokens of prompt and answer together."""
    overlong: Literal["error", "truncate-prompt-left", "truncate-response"] = "error"
    """What to do with longer ones; every answer is scored, so none can be dropped."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such models are refused."""


def check_file(out: str, *, overwrite: bool) -> None:
    """Refuse an output file that exists or cannot be written, before any work is done for it."""
    if not out:
        raise ValueError("--out is empty; give a file.")
    path = Path(out)
    if path.exists() and not overwrite:
        raise FileExistsError(f"--out {out} exists; give another file or add --overwrite.")
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: give a file in a folder that exists.")
