"""Where the time of a step goes: torch's profiler over one step of a work, its operators in a few groups.

Counted is the time inside an operator itself, not that of the operators it calls, as a share of all of them. What
Python does between operators is left out.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks import alternate, ours
from benchmarks.process import Clock
from benchmarks.work import WORKS
from trimtab.progress import console

PARTS = {
    "attention under a mask, backward": r"attention.*backward",
    "attention under a mask, forward": r"attention",
    "matrix products of the layers and the head": r"::(mm|addmm_?|bmm|baddbmm_?|.*linear.*)$",
    "copies, most of them between float32 and bf16": r"::copy_$",
    "zeroing of new gradients": r"::(zero_|fill_)$",
    "AdamW, fused": r"::_fused_adamw_$",
}
"""Part of a step -> what its operators' names match; the first that matches counts."""

REST = "norms, activations, sums, the rest"


@dataclass(frozen=True)
class Profile:
    """Where the time of one training step goes, on the CPU."""

    work: str = "dpo"
    """Which: dpo, dpo_long, dpo_hh, reward, reward_hh, sft, kto."""
    model: str = "smollm2-135m-instruct"
    """A model of trimtab's, or a folder."""
    dtype: str = "auto"
    """auto, bfloat16 or float32."""
    hh_data: str | None = None
    """Pairs in the form of HH, for dpo_hh and reward_hh."""
    scale: float = 1.0
    """Factor on the words of prompts and answers, to try things out."""


def profile_step(config: Profile) -> dict[str, float]:
    """Shares of a step's parts, largest first; printed with the seconds of the step under the profiler."""
    given = {"model": config.model, "dtype": config.dtype, "hh_data": config.hh_data, "scale": config.scale}
    settings = alternate.Cpu(works=(config.work,), peer_settings=(), **given)
    alternate.check(settings)
    if WORKS[config.work].from_conversations and config.hh_data is None:
        raise ValueError(f"--work {config.work} needs conversations: give --hh-data FILE.")
    with tempfile.TemporaryDirectory() as scratch:
        ready = ours.make_ready(alternate.prepare(config.work, settings, Path(scratch)))
        ready.learner.step(ready.batch)
        clock = Clock()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            clock.start()
            ready.learner.step(ready.batch)
            clock.stop()
    found = shares({event.key: event.self_cpu_time_total for event in profiler.key_averages()})
    print_table(found, config, clock.seconds[0])
    return found


def shares(times: Mapping[str, float]) -> dict[str, float]:
    """Each part's share of the time in operators, largest first and the rest last."""
    found = dict.fromkeys([*PARTS, REST], 0.0)
    for name, time in times.items():
        found[part_of(name)] += time
    total = sum(found.values())
    return {part: time / total for part, time in sorted(found.items(), key=lambda item: (item[0] == REST, -item[1]))}


def part_of(operator: str) -> str:
    """The part that an operator belongs to."""
    return next((part for part, names in PARTS.items() if re.search(names, operator)), REST)


def print_table(found: Mapping[str, float], config: Profile, seconds: float) -> None:
    """The parts and their shares."""
    made = Table(title=f"{config.work}, {config.model}: one step, {seconds:.2f} s under the profiler")
    made.add_column("part")
    made.add_column("share", justify="right")
    for part, share in found.items():
        made.add_row(part, f"{share:.2f}")
    console.print(made)
