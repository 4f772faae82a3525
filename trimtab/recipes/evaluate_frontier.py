"""`trimtab evaluate frontier`: reward against KL for any number of runs and all their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from trimtab.recipes.options import Dtype, check_limit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimtab.evals.frontier import Bought, Frontier, Point
    from trimtab.models import Policy
    from trimtab.records import Prompt
    from trimtab.rewards import Reward
    from trimtab.sampling import Samples


@dataclass(frozen=True)
class EvaluateFrontier:
    """What the runs' own evaluations say; with --reward and --data, what all their checkpoints do on the same prompts.

    Measured, the start model's best-of-n stands beside them. Runs of online RL write evaluations with reward and KL.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories."""
    reward: tuple[str, ...] = ()
    """Measure with this reward, as for `trimtab score`; the sum of several."""
    reward_weights: tuple[float, ...] = ()
    """One factor for each reward; 1 unless given."""
    data: str | None = None
    """Measure on these prompts."""
    num_answers: int = 4
    """Answers of each checkpoint to every prompt."""
    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 16
    """Answers of the start model to every prompt, for best-of-1 to best-of-n."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    batch_rows: int = 32
    """Answers sampled and measured at the same time; changes speed, not the figures (in float32)."""
    limit: int | None = None
    """Only the first so many prompts."""
    dtype: Dtype = "auto"
    """Arithmetic of the models' bodies: auto is bf16 autocast over float32 weights where the processor has bf16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Off: such models are refused."""
    seed: int = 0
    """Seed of the draws."""
    plot: str | None = None
    """Also write the points as a plot, one HTML page."""
    json: bool = False
    """Print one JSON object instead of tables."""


def evaluate_frontier(config: EvaluateFrontier) -> None:
    """Read what was measured or measure it, and print the points."""
    from trimtab.recipes.figures import check_plot, print_json
    from trimtab.report.plots import frontier_plot, write_plot

    check_limit(config.limit)
    check_plot(config.plot)
    if not config.runs:
        raise ValueError("give at least one run directory.")
    if (config.data is None) != (not config.reward) or (config.reward_weights and not config.reward):
        raise ValueError("to measure, give --reward and --data both; without them, the runs' own evaluations are read.")
    found = read_points(config) if config.data is None else measure_points(config)
    if config.plot is not None:
        write_plot(frontier_plot(found), Path(config.plot))
    if config.json:
        print_json({"runs": list(config.runs)}, found)
    else:
        print_frontier(found)


def read_points(config: EvaluateFrontier) -> Frontier:
    """The frontier that the runs' evals.jsonl tell. ValueError where they measured different things, or nothing."""
    from trimtab.evals.frontier import frontier, logged_points
    from trimtab.report.read import read_runs

    found: dict[str, list[Point]] = {}
    for run in read_runs(config.runs):
        points = logged_points(run.name, run.evals)
        if not points:
            raise ValueError(
                f"{run.name} has no evaluation with reward and KL (runs of online RL with --eval-data have); "
                "measure it: --reward R --data PROMPTS."
            )
        for measure, some in points.items():
            found.setdefault(measure, []).extend(some)
    if len(found) > 1:
        raise ValueError(f"the runs measured {' and '.join(found)}, which share no axis: give --reward and --data.")
    ((measure, points),) = found.items()
    return frontier(measure, points)


def measure_points(config: EvaluateFrontier) -> Frontier:
    """All checkpoints on the same prompts, and best-of-n of the start model.

    ValueError where the runs started from different models.
    """
    from trimtab.evals.frontier import frontier, models_of
    from trimtab.recipes import training
    from trimtab.recipes.evaluated import start_model
    from trimtab.records import Prompt
    from trimtab.report.read import labelled
    from trimtab.rewards import parse_rewards

    assert config.data is not None, "measuring needs prompts"
    models = {name: models_of(path) for name, path in labelled(config.runs).items()}
    starts = sorted({start_model(run, None) for run in config.runs})
    if len(starts) > 1:
        raise ValueError(f"the runs started from {' and '.join(starts)}: their KL has no common zero.")
    prompts = training.read(config.data, Prompt, skip_invalid=False).records[: config.limit]
    reward = parse_rewards(config.reward, config.reward_weights, **training.scoring(config))
    start = load(config, starts[0])
    best_of_n = buy(config, start, prompts, reward)
    points = [
        measure(config, (name, step, str(path)), start, prompts, reward)
        for name, some in models.items()
        for step, path in some
    ]
    return frontier(reward.name, points, best_of_n)


def buy(config: EvaluateFrontier, start: Policy, prompts: Sequence[Prompt], reward: Reward) -> list[Bought]:
    """Best-of-n of the start model; n = 1 is the start model itself."""
    from trimtab.evals.frontier import bought

    return bought(scored(drawn(config, start, prompts, config.n), reward), seed=config.seed)


def measure(
    config: EvaluateFrontier,
    checkpoint: tuple[str, int | None, str],
    start: Policy,
    prompts: Sequence[Prompt],
    reward: Reward,
) -> Point:
    """One checkpoint (its run, step and folder): exact KL and mean reward of its answers, intervals over prompts."""
    from statistics import fmean

    from trimtab.evals.drift import drift
    from trimtab.evals.frontier import Point
    from trimtab.evals.intervals import bootstrap_mean
    from trimtab.recipes.evaluated import check_same_vocabulary

    run, step, folder = checkpoint
    policy = load(config, folder)
    check_same_vocabulary(policy, start, (folder, "the start model"))
    samples = drawn(config, policy, prompts, config.num_answers)
    moved = drift(policy, start, samples, batch_rows=config.batch_rows, seed=config.seed)
    means = [fmean(row) for row in scored(samples, reward)]
    name = f"{run}@{'end' if step is None else step}"
    return Point(run, name, step, moved.kl, bootstrap_mean(means, config.seed))


def load(config: EvaluateFrontier, model: str) -> Policy:
    from trimtab.models import load_policy
    from trimtab.recipes import training

    return load_policy(model, **training.scoring(config))


def drawn(config: EvaluateFrontier, policy: Policy, prompts: Sequence[Prompt], n: int) -> Samples:
    """Answers drawn plainly, as KL needs them."""
    from trimtab.sampling import sample

    return sample(
        policy,
        prompts,
        n,
        max_new_tokens=config.max_new_tokens,
        batch_rows=config.batch_rows,
        seed=config.seed,
        progress=True,
    )


def scored(samples: Samples, reward: Reward) -> list[list[float]]:
    """The scores of each prompt's answers."""
    from trimtab.rewards import every_score

    scores = every_score(reward, samples.row_prompts, samples.answers)
    return [scores[i : i + samples.n] for i in range(0, len(scores), samples.n)]


def print_frontier(found: Frontier) -> None:
    """The points by rising KL; those on the frontier are marked."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.measure} against KL", title_justify="left")
    for name in ("", "KL, nats per answer", f"{found.measure}, [95 % interval]", "on the frontier"):
        table.add_column(name, justify="left" if not name else "right")
    for point in found.points:
        table.add_row(point.name, f"{point.kl:.3f}", f"{point.reward:.3f}", "*" * (point.name in found.best))
    for one in found.best_of_n:
        table.add_row(f"best of {one.n}", f"at most {one.kl:.3f}", f"{one.reward:.3f}", "")
    Console(highlight=False).print(table)
