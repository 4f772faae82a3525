"""`trimtab evaluate harness`: tasks of lm-evaluation-harness on a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trimtab.recipes.options import check_limit


@dataclass(frozen=True)
class EvaluateHarness:
    """What `lm_eval` says about a policy; needs the extra `eval` (pip install '.[eval]'). It fetches its data."""

    model: str
    """Hub id, folder, run directory (its final model), or built-in name."""
    tasks: tuple[str, ...]
    """Names of tasks, such as hellaswag arc_easy."""
    own_tasks: str | None = None
    """A folder with tasks of one's own (.yaml as lm_eval reads them), beside its own; code that they name runs."""
    shots: int | None = None
    """Examples before each question; the task's own number unless given."""
    limit: int | None = None
    """Only the first so many questions of each task."""
    batch_size: int = 8
    """Rows at a time."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    json: bool = False
    """Print one JSON object instead of tables."""


def evaluate_harness(config: EvaluateHarness) -> None:
    """Find the folder, call the harness, print its figures."""
    from trimtab.evals.harness import check_harness, harness
    from trimtab.recipes.figures import print_estimates, print_json

    check_limit(config.limit)
    if not config.tasks:
        raise ValueError("--tasks is empty: give names of tasks, such as --tasks hellaswag arc_easy.")
    if config.own_tasks is not None and not Path(config.own_tasks).is_dir():
        raise FileNotFoundError(f"--own-tasks {config.own_tasks}: there is no such folder.")
    check_harness()
    from trimtab.weights import resolve

    options = {"num_fewshot": config.shots, "limit": config.limit, "batch_size": config.batch_size}
    found = harness(str(resolve(config.model)), config.tasks, config.own_tasks, device=config.device, **options)
    if config.json:
        print_json({"model": config.model}, {"tasks": found})
        return
    for task, figures in found.items():
        print_estimates(task, dict(figures), counted="questions")
