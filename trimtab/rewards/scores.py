"""What a reward is, and what may come out of one: a finite number for an answer, or None to leave it out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from trimtab.records import Answer, Prompt


class Reward(Protocol):
    """Scores answers, higher is better: one finite number for each prompt and its answer, or None to leave it out."""

    @property
    def name(self) -> str: ...

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Sequence[float | None]: ...


def checked(
    name: str, prompts: Sequence[Prompt], answers: Sequence[Answer], values: Iterable[Any]
) -> list[float | None]:
    """The values as floats. ValueError, naming prompt and answer, unless each is one finite number or None."""
    values = list(values)
    if len(values) != len(answers):
        raise ValueError(f"reward {name} returned {len(values)} values for {len(answers)} answers")
    for prompt, answer, value in zip(prompts, answers, values, strict=True):
        if value is not None and not is_finite_number(value):
            raise ValueError(
                f"reward {name} returned {value!r}, which is not a finite number, for {described(prompt, answer)}"
            )
    return [None if value is None else float(value) for value in values]


def is_finite_number(value: Any) -> bool:
    """Whether this is a number (NumPy's and torch's scalars too) other than NaN and infinity."""
    if isinstance(value, str | bytes) or getattr(value, "ndim", 0):
        return False
    return hasattr(value, "__float__") and math.isfinite(float(value))


def described(prompt: Prompt, answer: Answer) -> str:
    """An answer and its prompt in an error message."""
    place = f" ({prompt.source})" if prompt.source else ""
    return f"the answer {answer.text[:80]!r} to the prompt {prompt.text[-80:]!r}{place}"


def every_score(reward: Reward, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float]:
    """The score of every answer, for callers that cannot leave one out.

    ValueError, naming prompt and answer, if the reward is None for one.
    """
    scores = reward(prompts, answers)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        if score is None:
            raise ValueError(
                f"reward {reward.name} gave None for {described(prompt, answer)}: "
                "here every answer needs a number, and none can be left out"
            )
    return [score for score in scores if score is not None]
