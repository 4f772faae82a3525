"""`trimtab data check` and `trimtab data show`: look at data before training on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from trimtab.recipes.options import Overlong


@dataclass(frozen=True)
class Check:
    """Rows, duplicates, rows shared with another file, contradictions, cycles, ties, length bias, token lengths."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """File (.jsonl .json .csv .parquet, also .gz), hub id, package.module:function, or a built-in name."""
    against: str | None = None
    """Another file: which rows and prompts are in both."""
    model: str | None = None
    """Count tokens with this model's tokenizer, and say what --overlong would do."""
    max_length: int = 1024
    """Most tokens of prompt and answer together, for --model."""
    json: bool = False
    """Print one JSON object instead of tables."""


@dataclass(frozen=True)
class Show:
    """One batch as the model sees it: tokens that carry loss in green, the closing token marked, the rest dim."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """File (.jsonl .json .csv .parquet, also .gz), hub id, package.module:function, or a built-in name."""
    model: str
    """The model whose tokenizer and chat template are used."""
    rows: int = 3
    """How many records."""
    max_length: int = 1024
    """Most tokens of prompt and answer together."""
    overlong: Overlong = "error"
    """What to do with longer rows."""
    turns: Literal["last", "all"] = "last"
    """Which assistant turns of a conversation carry loss."""
    skip_invalid: bool = False
    """Skip bad rows instead of stopping at the first."""


def check(config: Check) -> None:
    """Read everything, count, print."""
    import json

    from rich.console import Console

    from trimtab import data
    from trimtab.data.checks import facts, render

    kind = data.kind_of(config.data)
    loaded = data.load(config.data, kind, skip_invalid=True)
    against = data.load(config.against, kind, skip_invalid=True).records if config.against else None
    known = facts(
        loaded.records,
        source=config.data,
        rows=loaded.rows,
        skipped=loaded.skipped,
        notes=loaded.notes,
        against=against,
        against_source=config.against or "",
    )
    tokens = token_facts(config, loaded.records) if config.model else None
    if config.json:
        print(json.dumps({**known.to_json(), "tokens": tokens}, indent=2, ensure_ascii=False))
    else:
        render(known, Console(highlight=False), tokens=tokens)


def token_facts(config: Check, records: list) -> dict[str, object]:
    """Lengths in tokens, and how many records each --overlong policy would cut or drop."""
    import statistics

    from trimtab.models import load_tokenizer
    from trimtab.records import Prompt
    from trimtab.tokens import OVERLONG, encode_prompts, fit, tokenize

    assert config.model is not None
    tokenizer = load_tokenizer(config.model)
    if isinstance(records[0], Prompt):
        lengths = sorted(len(ids) for ids in encode_prompts(tokenizer, records))
        return {"median tokens of a prompt": statistics.median(lengths), "longest prompt": lengths[-1]}
    items = tokenize(tokenizer, records)
    lengths = sorted(len(row.ids) for item in items for row in item.rows)
    told: dict[str, object] = {
        "median tokens": statistics.median(lengths),
        "95th percentile": lengths[int(0.95 * (len(lengths) - 1))],
        "longest": lengths[-1],
    }
    for policy in OVERLONG:
        if policy != "error":
            told[f"--overlong {policy} at {config.max_length}"] = str(fit(items, config.max_length, policy)[1])
    return told


def show(config: Show) -> None:
    """Read a few records, tokenize, print them in colour."""
    from rich.console import Console

    from trimtab import data
    from trimtab import tokens as bridge
    from trimtab.models import load_tokenizer

    loaded = data.load(config.data, data.kind_of(config.data), skip_invalid=config.skip_invalid)
    tokenizer = load_tokenizer(config.model)
    items, counts = bridge.encode(
        tokenizer,
        loaded.records[: config.rows],
        max_length=config.max_length,
        overlong=config.overlong,
        turns=config.turns,
    )
    console = Console(highlight=False)
    rows = [row for item in items for row in item.rows]
    console.print(bridge.show(tokenizer, bridge.pad(rows, bridge.pad_id(tokenizer))))
    console.print(f"[dim]{counts}[/dim]")
