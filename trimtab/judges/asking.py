"""What a judge is, and how it is asked: ties without asking, both orders, one answer beside another as a reward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.records import Answer, Comparison, Prompt
from trimtab.rewards.scores import is_finite_number

TIE = 0.5


class Judge(Protocol):
    """Compares answers: P(first is better) for each comparison, 0 to 1 (0.5 is a tie), or None where it cannot say."""

    @property
    def name(self) -> str: ...

    def __call__(self, comparisons: Sequence[Comparison]) -> Sequence[float | None]: ...


def compared(judge: Judge, comparisons: Sequence[Comparison]) -> list[float | None]:
    """P(first is better). Two answers of the same tokens (of the same text, where nobody knows those) are a tie.

    The judge is not asked about such: it would have its place or chance decide.
    """
    asked = [comparison for comparison in comparisons if not is_same(comparison)]
    said = iter(checked(judge.name, asked, judge(asked)) if asked else [])
    return [TIE if is_same(comparison) else next(said) for comparison in comparisons]


def is_same(comparison: Comparison) -> bool:
    """Whether both answers are one."""
    first, second = comparison.first, comparison.second
    return (first.ids, first.text) == (second.ids, second.text)


def checked(name: str, comparisons: Sequence[Comparison], values: Iterable[Any]) -> list[float | None]:
    """The values as floats. ValueError, naming the prompt and both answers, unless each is in [0, 1] or None."""
    values = list(values)
    if len(values) != len(comparisons):
        raise ValueError(f"judge {name} returned {len(values)} values for {len(comparisons)} comparisons")
    for comparison, value in zip(comparisons, values, strict=True):
        if value is not None and not (is_finite_number(value) and 0 <= float(value) <= 1):
            raise ValueError(f"judge {name} returned {value!r}, which is no number from 0 to 1, for {told(comparison)}")
    return [None if value is None else float(value) for value in values]


def told(comparison: Comparison) -> str:
    """A comparison in an error message."""
    prompt, texts = comparison.prompt, [answer.text[:80] for answer in (comparison.first, comparison.second)]
    place = f" ({prompt.source})" if prompt.source else ""
    return f"the answers {texts[0]!r} and {texts[1]!r} to the prompt {prompt.text[-80:]!r}{place}"


# ---- Both orders


@dataclass(frozen=True)
class Verdict:
    """P(first is better), once shown as the comparison has it and once with the answers exchanged.

    Both numbers are about the same answer; a judge without position bias says the same twice. None: it did not say.
    """

    in_order: float | None
    exchanged: float | None

    @property
    def value(self) -> float | None:
        """The mean of both orders; None unless both were said, for one alone carries the bias of its position."""
        if self.in_order is None or self.exchanged is None:
            return None
        return (self.in_order + self.exchanged) / 2


@dataclass(frozen=True)
class BothOrders:
    """A judge that is asked about every two answers in both orders, and the mean taken."""

    judge: Judge

    @property
    def name(self) -> str:
        return self.judge.name

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        return [verdict.value for verdict in self.verdicts(comparisons)]

    def verdicts(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """What was said in each order. One call, so that a slow judge can be asked about many at a time."""
        exchanged = [Comparison(asked.prompt, asked.second, asked.first) for asked in comparisons]
        said = compared(self.judge, [*comparisons, *exchanged])
        halves = zip(said[: len(comparisons)], said[len(comparisons) :], strict=True)
        return [Verdict(one, None if other is None else 1 - other) for one, other in halves]


# ---- A judge as a reward


@dataclass(frozen=True)
class JudgedReward:
    """A judge as a reward, where the two answers to a prompt are neighbours: P(the answer is better than the other).

    The two scores of a prompt add to 1. Each means something beside the other only.
    """

    judge: Judge

    @property
    def name(self) -> str:
        return self.judge.name

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float | None]:
        assert list(prompts[::2]) == list(prompts[1::2]), "the two answers to a prompt are neighbours"
        twos = zip(prompts[::2], answers[::2], answers[1::2], strict=True)
        said = compared(self.judge, [Comparison(prompt, first, second) for prompt, first, second in twos])
        return [value for p in said for value in ((None, None) if p is None else (p, 1 - p))]
