"""Judges that compute: a reward under the Bradley-Terry model, a rule, somebody's Python function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.judges.asking import checked
from trimtab.records import Answer, Comparison, Prompt
from trimtab.rewards import Reward
from trimtab.rewards.functions import RAISED, as_trl, asked_for, columns_of, result


@dataclass(frozen=True)
class RewardJudge:
    """A reward under the Bradley-Terry model (1952): `P = s(scale * (r(first) - r(second)))`.

    `s` is the logistic function, and `scale` has the unit of 1/reward. None where either answer has no score.
    """

    name: str
    reward: Reward
    scale: float = 1.0

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        margins = score_margins(self.reward, comparisons)
        # s(x) = (1 + tanh(x / 2)) / 2 cannot overflow.
        return [None if margin is None else (1 + math.tanh(self.scale * margin / 2)) / 2 for margin in margins]


@dataclass(frozen=True)
class RuleJudge:
    """A rule that is never in doubt: 1 where the first answer scores higher, 0 where the second does, 0.5 for a tie."""

    name: str
    reward: Reward

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        margins = score_margins(self.reward, comparisons)
        return [None if margin is None else ((margin > 0) - (margin < 0) + 1) / 2 for margin in margins]


@dataclass(frozen=True)
class FunctionJudge:
    """A Python function that is asked for one number from 0 to 1, or None, for each comparison; it may be `async`.

    It is called with lists, as far as its parameters ask for them (with `**kwargs` it gets all): `prompts`, `first` and
    `second` (strings for plain text, lists of role/content messages for conversations), `first_finished`,
    `second_finished`, `first_ids`, `second_ids` (the tokens drawn), and every further column of the prompts.
    """

    name: str
    function: Callable[..., Any]

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        asked = asked_for(f"judge {self.name}", self.function, arguments_of(comparisons))
        try:
            values = result(self.function, asked)
        except RAISED as error:
            raise ValueError(f"judge {self.name} raised {type(error).__name__}: {error}") from error
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"judge {self.name} returned {values!r}; it must return a list of one number a comparison")
        return checked(self.name, comparisons, values)


def score_margins(reward: Reward, comparisons: Sequence[Comparison]) -> list[float | None]:
    """The first answer's score minus the second's; None where either has none."""
    prompts = [comparison.prompt for comparison in comparisons for _ in range(2)]
    scores = reward(prompts, [answer for comparison in comparisons for answer in (comparison.first, comparison.second)])
    twos = zip(scores[::2], scores[1::2], strict=True)
    return [None if first is None or second is None else first - second for first, second in twos]


def arguments_of(comparisons: Sequence[Comparison]) -> dict[str, list[Any]]:
    """Everything that a function can ask for, one list entry a comparison."""
    prompts = [comparison.prompt for comparison in comparisons]
    sides = {
        "first": [comparison.first for comparison in comparisons],
        "second": [comparison.second for comparison in comparisons],
    }
    arguments: dict[str, list[Any]] = {**columns_of(prompts), "prompts": [as_trl(prompt) for prompt in prompts]}
    for side, answers in sides.items():
        arguments[side] = [as_given(*two) for two in zip(prompts, answers, strict=True)]
        arguments[f"{side}_finished"] = [answer.finished for answer in answers]
        arguments[f"{side}_ids"] = [list(answer.ids) for answer in answers]
    return arguments


def as_given(prompt: Prompt, answer: Answer) -> str | list[dict[str, str]]:
    """An answer in the form of its prompt."""
    return answer.text if prompt.is_text else [{"role": "assistant", "content": answer.text}]
