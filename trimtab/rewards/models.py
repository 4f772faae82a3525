"""A reward model as a reward, and how answers become the rows that a model scores.

A row is made from an answer's text, not from the ids that a policy drew: a reward model has its own tokenizer and was
trained on rows that were made from texts, closed by the template's closing token whatever token ended the sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.batches import Tokens, move
from trimtab.parallel import in_chunks
from trimtab.progress import progress_bar
from trimtab.records import Answer, Demonstration, Prompt
from trimtab.rewards.scores import checked
from trimtab.tokens import Overlong, Row, fit, pad, tokenize

if TYPE_CHECKING:
    from trimtab.models import ScalarModel


@dataclass(frozen=True)
class ModelReward:
    """A reward model's score of an answer, read at its last token: the closing one, unless the answer was cut."""

    name: str
    model: ScalarModel
    max_length: int | None = None
    overlong: Overlong = "error"
    batch_rows: int = 16

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float | None]:
        rows, model = answer_rows(self.model.tokenizer, prompts, answers, self.max_length, self.overlong), self.model
        if model.is_split:
            values = on_all_ranks(rows, model, self.batch_rows)
        else:
            values = in_batches(rows, model.scores, model.pad_id, model.device, self.batch_rows, self.name)
        return checked(self.name, prompts, answers, values)


def answer_rows(
    tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[Answer], max_length: int | None, overlong: Overlong
) -> list[Row]:
    """Prompt and answer as one row each; an answer that was cut has no closing token, as in training.

    ValueError if one is too long and not to be cut; none can be left out.
    """
    if overlong == "drop":
        raise ValueError("a reward scores every answer, so --overlong drop cannot be used: give error or truncate-...")
    pairs = zip(prompts, answers, strict=True)
    records = [Demonstration(prompt, answer.text, finished=answer.finished) for prompt, answer in pairs]
    items = tokenize(tokenizer, records)
    if max_length is not None:
        items, counts = fit(items, max_length, overlong)
        if counts.dropped:
            raise ValueError(f"some answers cannot be cut to length and still be scored: {counts}")
    return [item.rows[0] for item in items]


def on_all_ranks(rows: Sequence[Row], model: ScalarModel, batch_rows: int) -> list[float]:
    """One score a row of a model whose weights are split; all ranks ask for the same rows, and each does its share."""
    from trimtab.models import last_columns

    tokens = pad(rows, model.pad_id)
    shortest_first = tokens.attention_mask.sum(-1).argsort(stable=True)
    values = in_chunks(model.values, tokens, batch_rows, order=shortest_first)
    return values.gather(1, last_columns(tokens)[:, None])[:, 0].tolist()


@torch.no_grad()
def in_batches(
    rows: Sequence[Row],
    scores: Callable[[Tokens], Tensor],
    pad_id: int,
    device: torch.device | str,
    batch_rows: int,
    title: str,
) -> list[float]:
    """One score a row, computed for rows of similar length together and returned in the order given."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found = torch.zeros(len(rows))
    with progress_bar(f"score ({title})", len(rows)) as advance:
        for start in range(0, len(rows), batch_rows):
            chosen = by_length[start : start + batch_rows]
            tokens = move(pad([rows[i] for i in chosen], pad_id), device)
            found[chosen] = scores(tokens).float().cpu()
            advance(len(chosen))
    return found.tolist()
