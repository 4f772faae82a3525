"""What was measured, as a JSON file a work and as a table. Ratios are of medians."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.process import Result

GIGA = 1e9
RESULTS = Path(__file__).parent / "results"
STAGES = ("sample", "score", "refer", "train")
"""The stages of a step of online RL."""


def side(results: Sequence[Result]) -> dict[str, Any]:
    """One side's processes in one: the median step of each, their median, least and most; the same of peak memory."""
    steps = [statistics.median(result.seconds[1:]) for result in results]
    peaks = [result.peak for result in results]
    first = results[0]
    return {
        "seconds": spread(steps),
        "tokens_per_second": first.tokens["tokens"] / statistics.median(steps),
        "peak_bytes": spread(peaks),
        "loaded_bytes": statistics.median(result.loaded for result in results),
        "warmup_seconds": statistics.median(result.seconds[0] for result in results),
        "losses": first.losses,
        "figures": first.figures,
        "tokens": first.tokens,
        "threads": first.threads,
        "versions": first.versions,
        "note": first.note,
        "processes": len(results),
        "steps": len(first.seconds) - 1,
        "parts": {name: statistics.median(medians(results, name)) for name in first.parts},
    }


def medians(results: Sequence[Result], part: str) -> list[float]:
    """The median time of one stage of a step, process by process, without the warm-up step."""
    return [statistics.median(result.parts[part][1:]) for result in results]


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median of some values, and their least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(work: str, sides: Mapping[str, Sequence[Result]], floors: Sequence[float], **facts: Any) -> dict[str, Any]:
    """Everything about one work; the first side is the one that the others are compared with."""
    told = {name: side(results) for name, results in sides.items()}
    ours, *others = told
    result: dict[str, Any] = {"work": work, "date": time.strftime("%Y-%m-%d"), **facts, "sides": told, "ratios": {}}
    for name in others:
        result["ratios"][name] = {
            "speed": told[name]["seconds"]["median"] / told[ours]["seconds"]["median"],
            "memory": told[ours]["peak_bytes"]["median"] / told[name]["peak_bytes"]["median"],
        }
    if floors:
        result["floor_seconds"] = spread(floors)
        result["floor_fraction"] = {
            name: result["floor_seconds"]["median"] / one["seconds"]["median"] for name, one in told.items()
        }
    return result


def write(result: Mapping[str, Any], folder: Path) -> Path:
    """A work's JSON file, named after the work (and its precision, where that is not bf16)."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if result.get("dtype") in (None, "bfloat16") else f"-{result['dtype']}"
    path = folder / f"{result['work']}{suffix}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One row a side; speed is how many times faster trimtab is than this side, memory its share of this side's."""
    made = Table(title="seconds a step: median of processes [least, most]")
    for column in ("work", "side", "seconds", "tokens/s", "peak GB", "loaded GB", "speed", "memory", "floor share"):
        made.add_column(column, justify="left" if column in ("work", "side") else "right")
    for result in results:
        for name, one in result["sides"].items():
            made.add_row(*cells(result, name, one))
        made.add_section()
    return made


def parts_table(results: Sequence[Mapping[str, Any]]) -> Table | None:
    """Where the time of a step goes, for works whose steps have stages; None if there is no such work."""
    made = Table(title="seconds of a step's stages: medians")
    for column in ("work", "side", *STAGES):
        made.add_column(column, justify="left" if column in ("work", "side") else "right")
    for result in results:
        for name, one in result["sides"].items():
            if one.get("parts"):
                made.add_row(result["work"], name, *(f"{one['parts'][stage]:.2f}" for stage in STAGES))
    return made if made.row_count else None


def cells(result: Mapping[str, Any], name: str, one: Mapping[str, Any]) -> list[str]:
    """A side's row of the table."""
    ratio = result["ratios"].get(name)
    floor = result.get("floor_fraction", {}).get(name)
    return [
        result["work"],
        name,
        "{median:.2f} [{min:.2f}, {max:.2f}]".format(**one["seconds"]),
        f"{one['tokens_per_second']:.0f}",
        f"{one['peak_bytes']['median'] / GIGA:.2f}",
        f"{one['loaded_bytes'] / GIGA:.2f}",
        f"{ratio['speed']:.2f}x" if ratio else "",
        f"{ratio['memory']:.2f}x" if ratio else "",
        f"{floor:.2f}" if floor else "",
    ]


def read_all(folder: Path) -> list[dict[str, Any]]:
    """The comparisons that were written to a folder. FileNotFoundError if there is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    comparisons = [result for result in found if "sides" in result]
    if not comparisons:
        raise FileNotFoundError(f"{folder} holds no results yet; type: make bench")
    return comparisons
