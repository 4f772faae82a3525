"""The wiring that the training commands share: rows in, batches out, a learner, held-out figures."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trimtab import data, parallel
from trimtab.batches import batch_indices, batch_starts
from trimtab.builtin import BUILTIN_MODELS
from trimtab.checkpoint import State, Stateful, Weights, checkpoints_of
from trimtab.data.checks import facts as data_facts
from trimtab.evals.intervals import wilson
from trimtab.health import sinking
from trimtab.learner import Learner, make_optimizer, make_schedule
from trimtab.losses.arguments import check_arguments, defaults, parse_arguments
from trimtab.memory import choose_checkpointing, recompute_layers
from trimtab.models import FrozenPolicy, Policy, load_policy
from trimtab.objectives import Objective
from trimtab.progress import console
from trimtab.recipes.options import (
    DataOptions,
    OnlineStepOptions,
    RunOptions,
    SamplingOptions,
    StepOptions,
    flatten,
)
from trimtab.records import Prompt
from trimtab.reference_cache import check_folder, open_cache
from trimtab.references import LiveReference, NoReference, Reference, blend, item_batches, moving, store
from trimtab.report import write_report
from trimtab.rewards import RULES
from trimtab.run import Run, check_weights, seed_everything, write_json
from trimtab.safety import Safety
from trimtab.sampling import Sampler, VllmServer, sample
from trimtab.tokens import Encoded, digest_of_rows
from trimtab.tracking import open_sinks
from trimtab.untrusted import read_json_object

SAMPLE_VALUES = 1024

Collate = Callable[[Sequence[Encoded], int], Any]


@dataclass(frozen=True)
class Items:
    """Tokenized records and how they become batches; with a reference, batches carry its log-probabilities."""

    encoded: Sequence[Encoded]
    collate: Collate
    pad_id: int
    reference: Reference | None = None

    def batch(self, index: Sequence[int]) -> Any:
        """The batch of some items."""
        batch = self.collate([self.encoded[i] for i in index], self.pad_id)
        return self.reference.attach(batch, index) if self.reference else batch

    def epochs(self, *, batch_size: int, seed: int, steps: int, start: int = 0) -> Iterator[Any]:
        """The shuffled batches of the steps after `start`, drawn lazily; the order is a function of the seed alone."""
        for index in batch_indices(len(self.encoded), batch_size, seed=seed, steps=steps, start=start):
            yield self.batch(index)

    def in_order(self, batch_size: int) -> Iterator[Any]:
        """Every item once, in order."""
        for start in range(0, len(self.encoded), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self.encoded))))


def open_run(command: str, config: Any, model: Any, facts: Mapping[str, Any]) -> Run:
    """The run directory of a command, with its resolved config and what was read for it."""
    resolved = {"command": command, **flatten(config)}
    for name in ("overwrite", "resume", "resume_from", "shard"):  # for one time, not a part of what is repeated
        del resolved[name]
    for name in {"data", "eval_data", "model", "ref_model", "critic", "ptx_data"} & resolved.keys():
        resolved[name] = absolute(resolved[name])
    if "reward" in resolved:
        resolved["reward"] = [name if name in RULES else absolute(name) for name in resolved["reward"]]
    kind, _, name = (resolved.get("judge") or "").partition(":")
    if kind in ("reward", "labels"):
        resolved["judge"] = f"{kind}:{absolute(name)}"
    options: RunOptions = config.run
    facts = {**facts, "start": {"model": config.model.model, "sample_sha256": digest_of_sample(model)}}
    out = Path(options.out)
    goes_on = (options.resume or options.resume_from is not None) and (out / "config.yaml").exists()
    parallel.meet()  # until every rank has seen what the directory is like
    if goes_on:
        parallel.first_tells(partial(check_data, out, facts))
        run = Run.reopen(out, config=resolved, seed=options.seed, source=options.resume_from)
    else:
        run = Run.create(out, config=resolved, seed=options.seed, overwrite=options.overwrite)
    if parallel.is_first():
        write_json(run.directory / "data.json", facts)
    run.note(device=str(model.device), arithmetic=model.arithmetic.why)
    return run


def track(run: Run, config: Any) -> None:
    """Open what --track names for the rows that the run writes from here on; the first rank sends them."""
    if not config.run.track:
        return
    with parallel.AllOrNone():
        if parallel.is_first():
            run.sinks = open_sinks(config.run.track, run.directory, run.step)


def check_data(run: Path, facts: Mapping[str, Any]) -> None:
    """ValueError if a run that is to go on would meet other rows, or another start model, than before."""
    path = run / "data.json"
    if checkpoints_of(run) and path.exists() and without_names(read_json_object(path)) != without_names(facts):
        raise ValueError(
            f"the data or the start model are not those of the run in {run} any more (its data.json tells "
            "what they were). Put them back as they were, or begin another run."
        )


def without_names(facts: Mapping[str, Any]) -> str:
    """What data.json says of rows and model themselves, not of the path that they were read by."""
    names = ("source", "skipped", "model", "facts")
    kept = {part: {key: value for key, value in told.items() if key not in names} for part, told in facts.items()}
    return json.dumps(kept)


def digest_of_sample(model: Any) -> str:
    """The sha256 of the first values of every weight: enough to tell a model from what was trained or changed of it."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        found.update(f"{name}{tuple(weight.shape)}".encode())
        found.update(weight.detach().flatten()[:SAMPLE_VALUES].cpu().float().numpy().tobytes())
    return found.hexdigest()


def absolute(source: str | None) -> str | None:
    """A path that exists as an absolute one, so that a stored config works from anywhere; other names unchanged."""
    if source is None or source in BUILTIN_MODELS or source in data.SOURCES or not Path(source).exists():
        return source
    return str(Path(source).resolve())


def read(source: str, kind: type, *, skip_invalid: bool) -> data.Loaded:
    """Records of a file, with what was skipped said aloud."""
    loaded = data.load(source, kind, skip_invalid=skip_invalid)
    for note in loaded.notes:
        console.print(f"{source}: {note}")
    if loaded.skipped:
        console.print(f"{source}: skipped {len(loaded.skipped)} of {loaded.rows} rows that are not valid")
    return loaded


def read_parts(options: DataOptions, kind: type) -> dict[str, data.Loaded]:
    """The records of `--data` ("train") and, where given, `--eval-data` ("eval")."""
    sources = {"train": options.data, "eval": options.eval_data}
    return {
        part: read(source, kind, skip_invalid=options.skip_invalid)
        for part, source in sources.items()
        if source is not None
    }


def encode_parts(
    loaded: Mapping[str, data.Loaded], encoder: Callable[..., Any], options: DataOptions, collate: Collate, pad_id: int
) -> tuple[dict[str, Items], dict[str, Any]]:
    """Tokenize every part; says what was cut or dropped and returns it as facts for the run's data.json."""
    items, facts = {}, {}
    for part, records in loaded.items():
        encoded, counts = encoder(records.records, max_length=options.max_length, overlong=options.overlong)
        console.print(f"{part}: {counts}")
        items[part] = Items(encoded, collate, pad_id)
        skipped = [asdict(problem) for problem in records.skipped]
        facts[part] = {"source": records.source, "rows": records.rows, "skipped": skipped, "overlong": asdict(counts)}
        facts[part]["tokens_sha256"] = digest_of_rows(encoded)
        facts[part]["facts"] = facts_of(records.records, loaded.get("train", records).records)
    return items, facts


def facts_of(records: Sequence[Any], train: Sequence[Any]) -> dict[str, Any]:
    """What `trimtab data check` says of some records; of others than those of training, also what is in both."""
    against = None if records is train else train
    return data_facts(records, against=against, against_source="the training data").to_json()


def load(loader: Callable[..., Any], config: Any, **arguments: Any) -> Any:
    """A model of a command's options, from `load_policy` or `load_scalar`; new weights depend on the seed alone."""
    seed_everything(config.run.seed)
    model, lora = config.model, config.lora
    loaded = loader(
        model.model,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        lora_rank=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        seed=config.run.seed,
        **arguments,
    )
    lay_out(loaded, config)
    console.print(f"{model.model} on {loaded.device}: {loaded.arithmetic.why}; {loaded.body.why}")
    return loaded


def lay_out(model: Any, config: Any) -> None:
    """Let rows share prompts and sequences as the options say, where the family can; says where it cannot."""
    packing = getattr(config, "packing", True)
    share = config.steps.optimizer.share_prompts and packing
    wanted, possible = share or (packing and hasattr(config, "packing")), model.body.can_lay_out
    if wanted and not possible:
        console.print(f"{config.model.model} cannot run several rows in one sequence: every row runs alone.")
    # Rows that share prompts are packed as well; the limit is only needed without.
    capacity = config.data.max_length if wanted and not share else 0
    model.body.use_layout(share=share and possible, capacity=capacity if possible else 0, precision=model.arithmetic)


def scoring(options: Any) -> dict[str, Any]:
    """The model options of a reward, as arguments of `parse_reward`."""
    return {"dtype": options.dtype, "device": options.device, "trust_remote_code": options.trust_remote_code}


def load_for_sampling(config: Any) -> Any:
    """The policy of a command that only samples."""
    model = config.model
    policy = load_policy(model.model, dtype=model.dtype, device=model.device, trust_remote_code=model.trust_remote_code)
    console.print(f"{model.model} on {policy.device}: {policy.arithmetic.why}")
    return policy


def sampler_of(options: SamplingOptions) -> Sampler:
    """What draws the answers: this library, or a server that answers already."""
    kind, _, url = options.sampler.partition(":")
    if options.sampler == "own":
        return sample
    if kind != "vllm" or not url.startswith(("http://", "https://")):
        raise ValueError(f"--sampler {options.sampler}: give own, or vllm:URL such as vllm:http://127.0.0.1:8000.")
    return VllmServer(url)


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as a .jsonl file, complete or not at all; says how many there are."""
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    count = 0
    # A lone surrogate, which is no Unicode text, goes back as the JSON escape that it came as.
    with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    aside.replace(path)
    console.print(f"{path}: {count} rows")


def check_reference(config: Any, *, needed: bool) -> None:
    """Refuse reference options that would have no effect or cannot work together."""
    if not needed and (config.reference != "stored" or config.ref_model):
        raise ValueError(f"--loss {config.loss} reads no reference, so --reference and --ref-model have no effect.")
    if not config.reference_cache and (not needed or config.reference != "stored"):
        raise ValueError("--no-reference-cache: only --reference stored, for a loss that reads it, keeps anything.")
    arguments = getattr(config, "reference_args", ())
    if config.reference != "moving" and arguments:
        raise ValueError(f"--reference-args {' '.join(arguments)}: only --reference moving has arguments.")
    if needed and config.reference == "stored" and config.reference_cache:
        check_folder()
    if config.reference == "moving":
        check_arguments(moving, parse_arguments(arguments))
        if config.lora.lora_rank:
            raise ValueError("--reference moving needs full fine-tuning: adapters cannot be averaged factor by factor.")


def check_moves(config: Any, steps: int) -> None:
    """Refuse a moving reference that would stand still for the whole run."""
    if config.reference == "moving":
        given = check_arguments(moving, parse_arguments(config.reference_args))
        every = given.get("every", defaults(moving)["every"])
        if every >= steps:
            raise ValueError(f"every={every}: the reference would never move in {steps} steps. Give a smaller one.")


def reference_of(policy: Any, config: Any, *, needed: bool) -> Any:
    """What the policy is compared with: itself as it starts, or `--ref-model`; None where no loss reads it."""
    if not needed:
        return None
    if config.ref_model is not None:
        return other_reference(policy, config)
    if config.reference == "stored":  # it is asked before the first step, so no copy is needed
        return FrozenPolicy(policy, without_adapter=policy.adapter is not None)
    return policy.reference()


@dataclass(frozen=True)
class Moves:
    """What happens beside the steps: `follow` passes batches on from step `start`, `parts` are what it remembers."""

    follow: Callable[[Iterator[Any], int], Iterator[Any]] = lambda batches, start: batches
    parts: Mapping[str, Stateful] = field(default_factory=dict)


def with_reference(
    items: Mapping[str, Items], scorer: Any, policy: Any, config: Any, *, steps: int
) -> tuple[dict[str, Items], Moves]:
    """Items whose batches carry the reference's log-probabilities, and what keeps a moving reference moving."""
    if scorer is None:
        return {part: replace(some, reference=NoReference()) for part, some in items.items()}, Moves()
    if config.reference == "stored":
        return with_stored(items, scorer, config, steps=steps), Moves()
    if parallel.ranks() > 1 and config.run.shard != "none":
        scorer.split_weights()
    live = LiveReference(scorer, config.steps.micro_batch_rows)
    items = {part: replace(some, reference=live) for part, some in items.items()}
    if config.reference == "live":
        return items, Moves()
    arguments = check_arguments(moving, parse_arguments(config.reference_args))
    update = partial(blend, scorer.model, policy.model)
    follow = lambda batches, start: moving(batches, update, start=start, **arguments)  # noqa: E731
    return items, Moves(follow, {"reference": Weights(scorer.model)})


def with_stored(items: Mapping[str, Items], scorer: Any, config: Any, *, steps: int) -> dict[str, Items]:
    """Items with the log-probabilities of all that the run will draw, from the cache as far as it has them."""
    count, max_rows = len(items["train"].encoded), config.steps.micro_batch_rows
    drawn = batch_indices(count, config.steps.batch_size, seed=config.run.seed, steps=steps)
    wanted = list(dict.fromkeys(i for index in drawn for i in index))
    # Everything is asked for in the order of the data, which is the same for every seed.
    orders = {"train": wanted if len(wanted) < count else None}
    cache = open_cache(scorer, max_rows=max_rows, seed=config.run.seed) if config.reference_cache else None
    return {
        part: replace(
            some,
            reference=store(
                scorer, some.encoded, pad_id=some.pad_id, max_rows=max_rows, wanted=orders.get(part), cache=cache
            ),
        )
        for part, some in items.items()
    }


def other_reference(policy: Any, config: Any) -> Any:
    """Another model as the reference; it must read the same tokens."""
    model = config.model
    other = load_policy(
        config.ref_model, dtype=model.dtype, device=model.device, trust_remote_code=model.trust_remote_code
    )
    if other.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(f"--ref-model {config.ref_model} has another vocabulary than --model {model.model}.")
    lay_out(other, config)
    return FrozenPolicy(other)


def train(
    run: Run,
    learner: Learner,
    items: Mapping[str, Items],
    config: Any,
    steps: int,
    moves: Moves | None = None,
    finish: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train for `steps`, evaluate before and after, save the model, and say where it is; returns the last figures."""
    options: StepOptions = config.steps
    moves = moves or Moves()
    sequences, length = largest_shape(learner.model, items["train"], options)
    save_memory(run, [learner.model], options.optimizer.gradient_checkpointing, sequences, length)
    evaluate = HeldOut(learner, items["eval"], options.batch_size) if "eval" in items else None
    safety = safety_of(config, learner, moves.parts, evaluate, items["train"])
    run.restore(safety.parts)
    track(run, config)
    size, seed = options.batch_size, config.run.seed
    batches = items["train"].epochs(batch_size=size, seed=seed, steps=steps, start=run.step)
    prompts = prompts_of(items.get("eval", items["train"]))
    if not run.step:
        write_samples(run, learner.model, prompts, config, step=0)
    evaluation = run.train(
        learner,
        moves.follow(batches, run.step),
        steps=steps,
        evaluate=evaluate,
        eval_every=config.run.eval_every,
        safety=safety,
    )
    check_weights(learner, f"The figures are in {run.directory}.")
    finish()
    finished(run, learner, learner.model, prompts, config)
    return evaluation


def safety_of(
    config: Any, learner: Learner, parts: Mapping[str, Stateful], evaluate: Stateful | None, items: Items | None = None
) -> Safety:
    """What the options say about checkpoints, for a learner and all else that a later step depends on."""
    options: RunOptions = config.run
    return Safety(
        save=learner.model.save,
        parts={"learner": learner, **parts, **({"held_out": evaluate} if evaluate else {})},
        every=options.save_every,
        save_state=options.save_state,
        keep_last=options.keep_last,
        keep_best=options.keep_best,
        on_nonfinite=options.on_nonfinite,
        rows=partial(rows_of_step, items, config) if items else lambda step: (),
    )


def rows_of_step(items: Items, config: Any, step: int) -> list[str]:
    """Where the rows of a step's batch stand, such as train.jsonl:17."""
    size, seed = config.steps.batch_size, config.run.seed
    index = next(batch_indices(len(items.encoded), size, seed=seed, steps=step, start=step - 1))
    records = [items.encoded[i].record for i in index]
    return [(record if isinstance(record, Prompt) else record.prompt).source for record in records]


def finished(run: Run, learner: Learner, policy: Any, prompts: Sequence[Prompt], config: Any) -> None:
    """The last samples, the final model and the report; the run says that it is finished."""
    write_samples(run, policy, prompts, config, step=run.step)
    learner.model.save(run.directory / "model")
    if parallel.is_first():
        write_report([run.directory], run.directory / "report.html")
    run.note(finished=run.step)
    run.close()
    console.print(f"model: {run.directory / 'model'}\nreport: {run.directory / 'report.html'}")


def train_online(
    run: Run,
    learner: Learner,
    batches: Iterator[Any],
    evaluate: Callable[[int], Mapping[str, float]] | None,
    policy: Policy,
    prompts: Sequence[Prompt],
    config: Any,
    *,
    safety: Safety,
    finish: Callable[[], None] = lambda: None,
) -> None:
    """Train for as long as there are batches, at most `--steps`; save the model, and say where it is."""
    if not run.step:
        write_samples(run, policy, prompts, config, step=0)
    run.train(
        learner,
        batches,
        steps=config.steps.steps,
        evaluate=evaluate,
        eval_every=config.run.eval_every,
        safety=safety,
    )
    check_weights(learner, f"The figures are in {run.directory}.")
    finish()
    if run.step < config.steps.steps:
        console.print(f"ended after {run.step} of {config.steps.steps} steps")
    finished(run, learner, policy, prompts, config)


def save_memory(run: Run, models: Sequence[Any], requested: str, rows: int, length: int) -> None:
    """Switch gradient checkpointing on where it is asked for or needed; says which and why.

    `rows` sequences of `length` tokens run through each model before anything is freed.
    """
    chosen = choose_checkpointing(requested, models[0], rows * len(models), length)
    if chosen.on:
        for model in models:
            recompute_layers(model.model)
    console.print(f"gradient checkpointing {chosen.why}")
    run.note(gradient_checkpointing=chosen.why)


def largest_shape(model: Any, items: Items, options: StepOptions) -> tuple[int, int]:
    """Sequences of the largest micro-batch, that of the longest items, and their tokens."""
    longest_first = sorted(range(len(items.encoded)), key=lambda i: -items.encoded[i].longest)
    largest = next(item_batches(items.encoded, longest_first, options.micro_batch_rows))
    tokens = items.collate([items.encoded[i] for i in largest], items.pad_id).tokens
    layout = model.body.layout(tokens)
    sequences, length = (tokens if layout is None else layout).ids.shape
    return sequences, length


SAMPLE_TOKENS = 64


def prompts_of(items: Items) -> list[Prompt]:
    """The prompts of some items, each once."""
    records = [item.record for item in items.encoded]
    return list(dict.fromkeys(record if isinstance(record, Prompt) else record.prompt for record in records))


def write_samples(run: Run, model: Any, prompts: Sequence[Prompt], config: Any, *, step: int) -> None:
    """What the policy says to the first held-out prompts (or training prompts), for people to read."""
    if not isinstance(model, Policy) or not config.run.samples:
        return
    some = [prompt for prompt in prompts if prompt.text][: config.run.samples]
    if some:
        answers = sample(model, some, max_new_tokens=SAMPLE_TOKENS, seed=config.run.seed).texts
        for prompt, answer in zip(some, answers, strict=True):
            run.append("samples.jsonl", {"step": step, "prompt": prompt.text, "response": answer})


NORMALIZE_ITEMS = 256


@torch.no_grad()
def normalize(model: Any, items: Items, options: StepOptions) -> None:
    """Scale the head of a reward model so that its scores of the first items have standard deviation 1."""
    few = replace(items, encoded=items.encoded[:NORMALIZE_ITEMS])
    batches = few.in_order(max(1, options.micro_batch_rows // 2))
    spread = torch.cat([model.scores(batch.tokens).cpu() for batch in batches]).std().item()
    if spread > 0:
        model.scale_by(1 / spread)


def split_weights(run: Run, config: Any, *models: Any) -> None:
    """Split the weights of models over the ranks, unless --shard none; before anything holds on to them."""
    if parallel.ranks() == 1:
        return
    told = "a copy on each"
    if config.run.shard != "none":
        told = "weights split over them (FSDP2)"
        for model in models:
            model.split_weights()
    console.print(f"{parallel.ranks()} ranks: {told}")
    run.note(shard=told)


def total_steps(options: StepOptions, items: int) -> int:
    """`--steps`, or as many as `--epochs` needs."""
    return options.steps or math.ceil(len(batch_starts(items, options.batch_size)) * (options.epochs or 1))


def make_learner(
    model: Any,
    objective: Objective,
    options: StepOptions | OnlineStepOptions,
    steps: int,
    *,
    critic: tuple[Any, float] | None = None,
) -> Learner:
    """AdamW on the weights that train, with the schedule and the micro-batches of the options.

    A critic's weights learn at their own rate.
    """
    others = [(critic[0].trainable_parameters(), critic[1])] if critic else []
    parameters, how = model.trainable_parameters(), options.optimizer
    optimizer = make_optimizer(parameters, lr=options.lr, weight_decay=how.weight_decay, others=others)
    schedule = make_schedule(optimizer, kind=how.schedule, warmup_steps=round(how.warmup * steps), steps=steps)
    return Learner(model, objective, optimizer, schedule, options.micro_batch_rows, how.max_grad_norm)


@dataclass
class HeldOut:
    """Evaluation of loss and metrics on held-out items, accuracy with its 95 % Wilson interval.

    Says once if chosen and rejected answers have both become less likely since the first evaluation.
    """

    learner: Learner
    items: Items
    batch_size: int
    first: dict[str, float] = field(default_factory=dict)
    told: bool = False

    def __call__(self, step: int) -> dict[str, float]:
        figures = self.figures()
        console.print(f"held out, step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
        self.first = self.first or figures
        warning = sinking(self.first, figures)
        if warning and not self.told:
            self.told = True
            console.print(f"[yellow]{warning}[/yellow]")
        return figures

    def figures(self) -> dict[str, float]:
        """Loss and metrics of all items."""
        loss, metrics = self.learner.evaluate(list(self.items.in_order(self.batch_size)))
        figures = {"loss": loss.item(), **{name: mean.item() for name, mean in metrics.items()}}
        if "accuracy" in metrics:
            right, count = metrics["accuracy"].total, metrics["accuracy"].count
            interval = wilson(round(float(right)), round(float(count)))
            figures |= {"accuracy_low": interval.low, "accuracy_high": interval.high, "pairs": float(count)}
        return figures

    def state_dict(self) -> State:
        return {"first": self.first, "told": self.told}

    def load_state_dict(self, state: State) -> None:
        self.first, self.told = dict(state["first"]), state["told"]
