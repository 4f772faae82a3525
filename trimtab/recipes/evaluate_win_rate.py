"""`trimtab evaluate win-rate`: which of two systems answers better, under a judge; ratings of more than two."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.recipes.options import Dtype, SamplingOptions, check_file, check_limit, settings_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from trimtab.evals.answers import Key, System
    from trimtab.evals.tournament import Tournament
    from trimtab.judges import Judge
    from trimtab.records import Prompt


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges, and how models compute."""

    judge: str | None = None
    """reward:R (any --reward), rule:NAME, py:package.module:function, llm:URL#MODEL, or labels:FILE."""
    dtype: Dtype = "auto"
    """Arithmetic of the models' bodies: auto is bf16 autocast over float32 weights where the processor has bf16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    max_length: int = 1024
    """Most tokens of prompt and answer together, for a judge that is a reward model."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Off: such models are refused."""


@dataclass(frozen=True)
class EvaluateWinRate:
    """The mean of P(first is better) over shared prompts, a tie counting half; intervals are over prompts.

    Two or more --systems under a --judge, or --verdicts that somebody's judge wrote down. More than two also get
    Bradley-Terry ratings.
    """

    systems: tuple[str, ...] = ()
    """NAME=SOURCE or SOURCE: a model (hub id, folder, run directory, built-in), or a file of answers."""
    judging: JudgeOptions = JudgeOptions()
    verdicts: tuple[str, ...] = ()
    """Instead of systems and a judge: files of AlpacaEval's annotations or of MT-bench's judgments."""
    data: str | None = None
    """The prompts: needed for models and for MT-bench's answers; otherwise those that the files share."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    limit: int | None = None
    """Only the first so many prompts."""
    seed: int = 0
    """Seed of the draws and of the intervals."""
    out: str | None = None
    """A .jsonl file for the single verdicts, in AlpacaEval's form."""
    json: bool = False
    """Print one JSON object instead of tables."""
    skip_invalid: bool = False
    """Skip and count bad rows instead of stopping at the first."""
    overwrite: bool = False
    """Replace --out if it exists."""


def evaluate_win_rate(config: EvaluateWinRate) -> None:
    """Collect answers, judge them, print the shares. ConnectionError, after printing, if answers are missing."""
    import json

    from rich.console import Console

    check_sources(config)
    found = read_verdicts(config) if config.verdicts else play(config)
    if config.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_tables(found, Console(highlight=False))
    if found.asked is not None and found.asked.missing:
        raise ConnectionError(
            f"the figures are incomplete: {found.asked}. What was answered is kept; run the same command again."
        )


def check_sources(config: EvaluateWinRate) -> None:
    """Refuse flags that mean nothing together, before anything is read."""
    check_limit(config.limit)
    if config.out is not None:
        check_file(config.out, overwrite=config.overwrite)
    if config.verdicts:
        given = {"--systems": config.systems, "--judge": config.judging.judge, "--data": config.data}
        given |= {"--limit": config.limit, "--out": config.out}
        for flag, value in given.items():
            if value:
                raise ValueError(f"{flag} has no effect with --verdicts, which say who won already.")
        return
    if len(config.systems) < 2:
        raise ValueError("give at least two --systems to compare (and a --judge), or --verdicts.")
    if config.judging.judge is None:
        raise ValueError(
            "--judge is missing: reward:R, rule:NAME, py:package.module:function, llm:URL#MODEL, labels:FILE"
        )


def read_verdicts(config: EvaluateWinRate) -> Tournament:
    """The figures behind verdicts that were written down."""
    from trimtab.evals.judged_files import read_judged
    from trimtab.evals.tournament import tournament

    rows = [row for source in config.verdicts for row in read_judged(source)]
    both = [(judged.prompt, verdict) for judged, verdict in rows if verdict is not None]
    return tournament(", ".join(config.verdicts), [judged for judged, _ in rows], both, seed=config.seed)


def play(config: EvaluateWinRate) -> Tournament:
    """Every two systems on the prompts they share, under the judge."""
    from trimtab.evals.tournament import play_all
    from trimtab.recipes import training

    sources = named_sources(config.systems)
    judge_text = config.judging.judge
    assert judge_text is not None
    judge = load_judge(config)
    systems, prompts = load_systems(config, sources)
    result, rows = play_all(judge, systems, prompts, seed=config.seed)
    if config.out is not None:
        training.write_rows(config.out, rows)
    return result


def load_judge(config: EvaluateWinRate) -> Judge:
    from trimtab.judges import parse_judge
    from trimtab.recipes import training

    judging = config.judging
    assert judging.judge is not None
    return parse_judge(judging.judge, **training.scoring(judging), max_length=judging.max_length)


def named_sources(given: tuple[str, ...]) -> dict[str, str]:
    """NAME=SOURCE as a mapping; a source without a name is called by its last part. ValueError for one name twice."""
    sources: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals:
            name, source = called(text), text
        if not name or not source:
            raise ValueError(f"--systems {text!r} is not of the form NAME=SOURCE")
        if name in sources:
            raise ValueError(f"--systems names {name!r} twice; say NAME=SOURCE, such as {name}2={source}")
        sources[name] = source
    return sources


def called(source: str) -> str:
    """The last part of a source, without what says how a file is read."""
    from trimtab.evals.answers import is_file

    path = Path(source)
    while is_file(str(path)) or path.suffix.lower() == ".gz":
        path = path.with_suffix("")
    return path.name or source


def load_systems(config: EvaluateWinRate, sources: Mapping[str, str]) -> tuple[list[System], dict[Key, Prompt]]:
    """All answers, those of models drawn now, and the prompts that they are compared on."""
    from trimtab.evals.answers import is_file, read_prompts, read_system
    from trimtab.progress import console

    files = {
        name: read_system(name, source, skip_invalid=config.skip_invalid)
        for name, source in sources.items()
        if is_file(source)
    }
    models = [name for name in sources if name not in files]
    if not models and config.sampling != SamplingOptions():
        raise ValueError("flags of sampling have no effect: all systems are files of answers.")
    if config.data is not None:
        prompts = read_prompts(config.data, skip_invalid=config.skip_invalid)
    else:
        prompts = {key: prompt for system in files.values() for key, prompt in system.prompts.items()}
        if not prompts:
            raise ValueError("--data is missing: the prompts (for MT-bench's answers, its file of questions).")
    answered = [key for key in prompts if all(key in system.answers for system in files.values())]
    if not answered:
        raise ValueError(f"the systems share no prompt: none of {len(prompts)} is answered in every file")
    if len(answered) < len(prompts):
        console.print(f"{len(answered)} of {len(prompts)} prompts are answered in every file; the others are left out")
    prompts = {key: prompts[key] for key in answered[: config.limit]}
    drawn = {name: sample_answers(config, name, sources[name], prompts) for name in models}
    return [files.get(name) or drawn[name] for name in sources], prompts


def sample_answers(config: EvaluateWinRate, name: str, source: str, prompts: Mapping[Key, Prompt]) -> System:
    """A model's answers to the prompts; not to MT-bench's second turns, which need its first answers."""
    from trimtab.evals.answers import System
    from trimtab.models import load_policy
    from trimtab.progress import console
    from trimtab.recipes import training
    from trimtab.records import Answer

    sampler = training.sampler_of(config.sampling)
    policy = load_policy(source, **training.scoring(config.judging))
    console.print(f"{name}: {source} on {policy.device}: {policy.arithmetic.why}")
    asked = {key: prompt for key, prompt in prompts.items() if sum(m.role == "user" for m in prompt.messages) < 2}
    settings = settings_of(config.sampling)
    samples = sampler(policy, list(asked.values()), 1, seed=config.seed, progress=True, **settings)
    rows = zip(asked, samples.texts, samples.finished.tolist(), strict=True)
    return System(name, {key: [Answer(text, finished)] for key, text, finished in rows}, asked)


def print_tables(found: Tournament, console: Console) -> None:
    """One line for every two systems, then ratings, position bias and what the judge could not say."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(found.judge), box=None, pad_edge=False)
    for title in ("first", "second", "win rate [95 %]", "at equal lengths", "w/t/l", "prompts"):
        is_name = title in ("first", "second")
        table.add_column(title, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for rate in found.rates:
        controlled = "" if rate.length_controlled is None else f"{rate.length_controlled.rate:.3f}"
        counts = f"{rate.wins}/{rate.ties}/{rate.losses}"
        names = (escape(rate.first), escape(rate.second))
        table.add_row(*names, f"{rate.rate:.3f}", controlled, counts, str(rate.rate.count))
    console.print(table)
    if found.ratings:
        ratings = Table(title="Bradley-Terry ratings, logits", box=None)
        ratings.add_column("system")
        ratings.add_column("rating [95 % interval]", justify="right")
        for name, rating in found.ratings.items():
            ratings.add_row(escape(name), f"{rating:+.3f}")
        console.print(ratings)
    for sentence in found.remarks():
        console.print(sentence, soft_wrap=True, markup=False)
