"""How cost grows: tokens a second against the prompt's length and the number of its answers, beside theory.

Theory counts the floating-point operations of an arrangement (linear layers, head, and the pairs of tokens that see
each other) and takes the rate from one measured point, rows with the shortest prompt. It knows nothing of copies,
norms and softmaxes, nor of a mask that computes what it then hides.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks import report
from benchmarks.alternate import model_folder
from benchmarks.floor import Counts, flops
from trimtab.batches import Tokens
from trimtab.models import Policy, load_policy
from trimtab.progress import console
from trimtab.run import processor_name, source_commit


@dataclass(frozen=True)
class Growth:
    """Tokens a second of forward and backward, with prompts shared and row by row, against prompt and answers."""

    model: str = "smollm2-135m-instruct"
    """A model of trimtab's, or a folder."""
    prompts: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    """Tokens of a prompt."""
    answers: tuple[int, ...] = (1, 2, 4, 8)
    """Answers to a prompt."""
    answer_tokens: int = 64
    """Tokens of an answer."""
    rows: int = 8
    """Rows at every point; answers to one prompt are neighbours."""
    most_tokens: int = 4096
    """Most tokens of one forward pass; more rows run one pass after the other."""
    repeats: int = 2
    """Measured repetitions of a point, after one to warm up."""
    dtype: str = "auto"
    """auto, bfloat16 or float32."""
    out: str = str(report.RESULTS)
    """Folder of the JSON file."""


@dataclass(frozen=True)
class Point:
    """Seconds of forward and backward over all rows, measured and predicted; `answers` 0 means row by row."""

    prompt: int
    answers: int
    tokens: int
    seconds: float
    predicted_seconds: float


def growth(config: Growth) -> list[Point]:
    """Measure every point, write and print them."""
    if uneven := [n for n in config.answers if n < 1 or config.rows % n]:
        raise ValueError(f"--answers {uneven[0]}: --rows {config.rows} must be a multiple of every number of answers.")
    folder = model_folder(config.model)
    policy = load_policy(folder, dtype=config.dtype, device="cpu")
    points: list[Point] = []
    for prompt in config.prompts:
        for answers in (0, *(n for n in config.answers if n > 1)):
            points.append(point(policy, str(folder), prompt, answers, config, points[:1]))
            console.print(f"prompt {prompt}, {arrangement(answers)}: {points[-1].seconds:.2f} s")
    print_table(points)
    facts = {"date": time.strftime("%Y-%m-%d"), "processor": processor_name(), "commit": source_commit()}
    told = {**facts, **asdict(config), "why": policy.arithmetic.why, "points": [asdict(one) for one in points]}
    path = Path(config.out) / "growth.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    console.print(str(path))
    return points


def point(policy: Policy, folder: str, prompt: int, answers: int, config: Growth, first: Sequence[Point]) -> Point:
    """One measured point; the rate behind its prediction is that of the first."""
    share = answers > 0
    policy.body.use_layout(share=share)
    length = config.rows * (prompt + config.answer_tokens)
    batches = list(passes(policy, prompt, max(1, answers), config, share=share))
    taken = [seconds(policy, batches) for _ in range(1 + config.repeats)]
    measured = statistics.median(taken[1:])
    work = flops(folder, counts(prompt, max(1, answers), config.answer_tokens, config.rows))
    start = first[0] if first else None
    rate = flops(folder, counts(start.prompt, 1, config.answer_tokens, config.rows)) / start.seconds if start else None
    return Point(prompt, answers, length, measured, work / rate if rate else measured)


def counts(prompt: int, answers: int, answer: int, rows: int) -> Counts:
    """What an arrangement runs and what its tokens see: `rows / answers` groups of one prompt and its answers."""
    groups = rows // answers
    seen = prompt * (prompt + 1) // 2 + answers * (answer * prompt + answer * (answer + 1) // 2)
    return Counts(tokens=groups * (prompt + answers * answer), predicted=rows * answer, seen=groups * seen)


def passes(policy: Policy, prompt: int, answers: int, config: Growth, *, share: bool) -> Iterator[Tokens]:
    """All rows in forward passes of at most `most_tokens` tokens; rows of a group stay together."""
    group = prompt + answers * config.answer_tokens if share else answers * (prompt + config.answer_tokens)
    groups = max(1, config.most_tokens // group)
    left = config.rows // answers
    while left:
        yield random_rows(policy, min(groups, left), prompt, answers, config.answer_tokens)
        left -= min(groups, left)


def random_rows(policy: Policy, groups: int, prompt: int, answers: int, answer: int) -> Tokens:
    """Groups of rows with one random prompt each and random answers."""
    words = policy.model.config.get_text_config().vocab_size
    prompts = torch.randint(words, (groups, 1, prompt)).expand(groups, answers, prompt)
    ids = torch.cat([prompts, torch.randint(words, (groups, answers, answer))], -1).flatten(0, 1)
    everything = torch.ones_like(ids, dtype=torch.bool)
    return Tokens(ids, everything, everything & (torch.arange(prompt + answer) >= prompt))


def seconds(policy: Policy, batches: Sequence[Tokens]) -> float:
    """The time of forward and backward over some passes."""
    policy.model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    for tokens in batches:
        policy.logprobs(tokens).sum().backward()
    return time.perf_counter() - began


def arrangement(answers: int) -> str:
    """How rows were run, in words."""
    return f"{answers} answers share it" if answers else "row by row"


def print_table(points: Sequence[Point]) -> None:
    """Tokens a second (prompts counted once per row) and the speed-up over rows, measured and predicted."""
    made = Table(title="tokens a second, prompts counted once per row")
    for column in ("prompt", "arrangement", "measured", "predicted", "speed-up", "predicted speed-up"):
        made.add_column(column, justify="left" if column == "arrangement" else "right")
    for one in points:
        rows = next(other for other in points if other.prompt == one.prompt and not other.answers)
        made.add_row(*cells(one, rows))
    from rich.console import Console

    Console(highlight=False, width=110).print(made)


def cells(one: Point, rows: Point) -> list[Any]:
    """A point's row of the table."""
    return [
        str(one.prompt),
        arrangement(one.answers),
        f"{one.tokens / one.seconds:.0f}",
        f"{one.tokens / one.predicted_seconds:.0f}",
        f"{rows.seconds / one.seconds:.2f}x" if one.answers else "",
        f"{rows.predicted_seconds / one.predicted_seconds:.2f}x" if one.answers else "",
    ]
