"""Reward against KL: every checkpoint of every run as a point, best-of-n as a curve beside them.

Compare methods at equal KL: a single point of each proves nothing, so all checkpoints are points, not the last alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

import torch

from trimtab.evals.intervals import Estimate, bootstrap_mean
from trimtab.overoptimization.best_of_n import expected_best_of_n, kl_bound


@dataclass(frozen=True)
class Point:
    """What a policy's answers are worth and how far it has moved; nats per answer. `step` is None for the final model.

    A bound that was not measured is NaN.
    """

    run: str
    name: str
    step: int | None
    kl: Estimate
    reward: Estimate


@dataclass(frozen=True)
class Bought:
    """Best-of-n: its reward, and its KL at most (`kl_bound`), nats per answer."""

    n: int
    kl: float
    reward: Estimate


@dataclass(frozen=True)
class Frontier:
    """Points and best-of-n; `best` names the points that no other has beaten in reward at as little KL.

    `measure` says what the reward axis is: the run's own `reward` or `win_rate`, or the reward that measured all.
    """

    measure: str
    points: tuple[Point, ...]
    best_of_n: tuple[Bought, ...]
    best: tuple[str, ...]


def frontier(measure: str, points: Sequence[Point], best_of_n: Sequence[Bought] = ()) -> Frontier:
    """The points by rising KL, and which of them are on the frontier."""
    ordered = sorted(points, key=lambda point: (point.kl.value, -point.reward.value))
    return Frontier(measure, tuple(ordered), tuple(best_of_n), tuple(point.name for point in undominated(ordered)))


def undominated(points: Sequence[Point]) -> list[Point]:
    """The points that have more reward than every point with less KL, by rising KL; of equal ones the first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.kl.value, -point.reward.value)):
        if not found or point.reward.value > found[-1].reward.value:
            found.append(point)
    return found


def bought(scores: Sequence[Sequence[float]], *, seed: int = 0) -> list[Bought]:
    """Best-of-n for n = 1, 2, 4, ... from N scored answers to each prompt, by the unbiased estimator; over prompts."""
    table = torch.tensor(scores, dtype=torch.float64)
    total, n, found = table.shape[-1], 1, []
    while n <= total:
        values = expected_best_of_n(table, table, n).tolist()
        found.append(Bought(n, kl_bound(n), bootstrap_mean(values, seed)))
        n *= 2
    return found


# ---- What runs wrote down


def logged_points(run: str, evals: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The points of a run's evaluations with a KL, by what they measured: `reward` or `win_rate`."""
    found: dict[str, list[Point]] = {}
    for row in evals:
        measure = next((name for name in ("reward", "win_rate") if is_number(row.get(name))), None)
        if measure and is_number(row.get("kl")):
            step = int(row["step"])
            point = Point(run, f"{run}@{step}", step, logged(row, "kl"), logged(row, measure))
            found.setdefault(measure, []).append(point)
    return found


def logged(row: Mapping[str, Any], name: str) -> Estimate:
    """A figure of an evaluation with its bounds where they were written; how many prompts it rests on was not."""
    low, high = (row.get(f"{name}_{side}") for side in ("low", "high"))
    nan = float("nan")
    bounds = [float(bound) if is_number(bound) and bound is not None else nan for bound in (low, high)]
    return Estimate(float(row[name]), bounds[0], bounds[1], 0)


def read_frontier(told: Mapping[str, Any]) -> Frontier:
    """The frontier that `trimtab evaluate frontier --json` printed. ValueError for anything else."""
    try:
        points = tuple(map(as_point, told["points"]))
        best_of_n = [Bought(int(one["n"]), finite(one["kl"]), as_estimate(one["reward"])) for one in told["best_of_n"]]
        return Frontier(str(told["measure"]), points, tuple(best_of_n), tuple(map(str, told["best"])))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"not what `trimtab evaluate frontier --json` prints ({error})") from None


def as_point(told: Mapping[str, Any]) -> Point:
    """A point from its JSON."""
    step = None if told["step"] is None else int(told["step"])
    return Point(str(told["run"]), str(told["name"]), step, as_estimate(told["kl"]), as_estimate(told["reward"]))


def as_estimate(told: Mapping[str, Any]) -> Estimate:
    """An estimate from its JSON, in which null is a bound that is not known."""
    low, high = (math.nan if told[side] is None else finite(told[side]) for side in ("low", "high"))
    return Estimate(finite(told["value"]), low, high, int(told["count"]))


def finite(value: Any) -> float:
    """A number as a float. ValueError for one that is not finite, which JSON has no name for."""
    if not math.isfinite(value):
        raise ValueError(f"found {value}, expected a number")
    return float(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two models' folders hold the same weights, to the last bit."""
    names, others = ({path.name for path in folder.glob("*.safetensors")} for folder in (one, other))
    return bool(names) and names == others and all(cmp(one / name, other / name, shallow=False) for name in names)


def models_of(run: Path) -> list[tuple[int | None, Path]]:
    """The checkpoints of a run by their steps, then its final model unless the last checkpoint is the same.

    FileNotFoundError for a folder without a model.
    """
    steps = sorted((run / "checkpoints").glob("step-*"))
    found: list[tuple[int | None, Path]] = [
        (int(path.name.removeprefix("step-")), path) for path in steps if path.is_dir()
    ]
    final = run / "model"
    if final.is_dir() and not (found and same_weights(found[-1][1], final)):
        found.append((None, final))
    if not found:
        raise FileNotFoundError(f"{run} holds neither checkpoints nor a model: give the --out directory of a run.")
    return found
