"""People's saved labels as a judge: preference rows, looked up by prompt and answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.data import load
from trimtab.records import Comparison, Message, Preference, Prompt

Labelled = tuple[tuple[Message, ...], str, str]
"""A prompt's messages, and the two answers in alphabetical order."""


@dataclass(frozen=True)
class LabelJudge:
    """Saved labels: P(first is better) is the mean over those who labelled the two answers, by their weights.

    A label counts with its confidence (a tie is 0.5). None where nobody labelled these two answers to this prompt.
    """

    name: str
    labels: Mapping[Labelled, float]

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        return [self.label(asked) for asked in comparisons]

    def label(self, asked: Comparison) -> float | None:
        """What was said of these two answers, whichever stood first."""
        first, second = asked.first.text, asked.second.text
        found = self.labels.get(labelled(asked.prompt, first, second))
        return found if found is None or first <= second else 1 - found


def labelled(prompt: Prompt, first: str, second: str) -> Labelled:
    """What labels are found by."""
    return (prompt.messages, min(first, second), max(first, second))


def load_labels(name: str, source: str) -> LabelJudge:
    """The judge that the rows of a source make: files of preferences with or without annotators."""
    totals: dict[Labelled, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for pair in load(source, Preference).records:
        is_ordered = pair.chosen <= pair.rejected
        total = totals[labelled(pair.prompt, pair.chosen, pair.rejected)]
        total[0] += pair.weight * (pair.confidence if is_ordered else 1 - pair.confidence)
        total[1] += pair.weight
    return LabelJudge(name, {key: value / weight for key, (value, weight) in totals.items() if weight})
