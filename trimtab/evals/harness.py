"""lm-evaluation-harness (extra `eval`) on a model folder: its tasks, its figures, nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from trimtab.evals.intervals import Estimate

Figures = dict[str, dict[str, Estimate]]
"""Each task's figures by their names, such as `acc` and `acc_norm`."""


def check_harness() -> None:
    """ValueError, saying what to install, where the harness is absent."""
    if find_spec("lm_eval") is None:
        raise ValueError("this needs lm-evaluation-harness, which is not installed: pip install '.[eval]'")


def harness(folder: str, tasks: Sequence[str], own_tasks: str | None = None, **options: Any) -> Figures:
    """The figures of tasks for the model in a folder; `options` are those of `lm_eval.simple_evaluate`.

    `own_tasks` is a folder with further tasks in the harness's form. Those may name Python functions, which run.
    """
    check_harness()
    evaluate: Any = import_module("lm_eval").simple_evaluate
    if own_tasks is not None:
        options["task_manager"] = import_module("lm_eval.tasks").TaskManager(include_path=own_tasks)
    arguments = f"pretrained={folder}"
    return figures_of(evaluate(model="hf", model_args=arguments, tasks=list(tasks), **options))


def figures_of(results: Mapping[str, Any]) -> Figures:
    """The harness's results as estimates with normal 95 % intervals from its standard errors.

    Its keys are `metric,filter` and `metric_stderr,filter`; filters other than `none` stay in the name.
    """
    return {
        task: {
            short(key): estimate(row, key, samples_of(results, task))
            for key, value in row.items()
            if isinstance(value, int | float) and "," in key and "_stderr," not in key
        }
        for task, row in results["results"].items()
    }


def short(key: str) -> str:
    return key.removesuffix(",none")


def estimate(row: Mapping[str, Any], key: str, count: int) -> Estimate:
    """A figure with its interval; without one where the harness gives no standard error."""
    value, error = float(row[key]), row.get(key.replace(",", "_stderr,", 1))
    half = 1.959964 * error if isinstance(error, int | float) else float("nan")
    return Estimate(value, value - half, value + half, count)


def samples_of(results: Mapping[str, Any], task: str) -> int:
    """How many questions a task asked; 0 where the harness does not tell (groups of tasks)."""
    return int(results.get("n-samples", {}).get(task, {}).get("effective", 0))
