"""Judges: two answers to one prompt -> the probability that the first is the better one.

A `Judge` is anything that can be called like that and has a name: a reward under the Bradley-Terry model, a rule, or
somebody's Python function. `parse_judge` makes one from what `--judge` says.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.records import Answer, Comparison, Prompt
from trimtab.rewards import RULES, Reward, RuleReward, parse_reward
from trimtab.rewards.functions import RAISED, as_trl, asked_for, columns_of, named_function, result
from trimtab.rewards.scores import is_finite_number

TIE = 0.5


class Judge(Protocol):
    """Compares answers: P(first is better) for each comparison, 0 to 1 (0.5 is a tie), or None where it cannot say."""

    @property
    def name(self) -> str: ...

    def __call__(self, comparisons: Sequence[Comparison]) -> Sequence[float | None]: ...


# ---- Judges


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


# ---- Asking


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


# ---- What `--judge` says


def parse_judge(text: str, **options: Any) -> Judge:
    """The judge that a text names; `options` are those of `parse_rewards`.

    reward:R                       the Bradley-Terry model on anything that --reward takes, such as a run directory
    rule:NAME                      the strict comparison of a built-in rule (`RULES`)
    py:package.module:function     a Python function (`FunctionJudge`)

    ValueError or FileNotFoundError, before a model is loaded, for a name that means nothing.
    """
    kind, colon, name = text.partition(":")
    if not colon or kind not in ("reward", "rule", "py"):
        raise ValueError(f"unknown judge {text!r}. A judge is {allowed()}")
    if kind == "py":
        return FunctionJudge(text, named_function(text, kind="judge"))
    if kind == "reward":
        return RewardJudge(text, parse_reward(name, **options))
    if name not in RULES:
        close = difflib.get_close_matches(name, RULES, n=1)
        hint = f" Did you mean rule:{close[0]}?" if close else ""
        raise ValueError(f"unknown judge {text!r}.{hint} The rules are {', '.join(RULES)}")
    return RuleJudge(text, RuleReward(name, RULES[name]))


def allowed() -> str:
    """Everything that may stand after --judge."""
    return f"reward:R (any --reward), rule:{'|'.join(RULES)}, or py:package.module:function"
