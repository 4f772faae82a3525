"""Rules: rewards that look at one answer at a time and need no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from trimtab.records import Answer, Prompt
from trimtab.rewards.scores import checked, described

Rule = Callable[[Prompt, Answer], float | None]


@dataclass(frozen=True)
class RuleReward:
    """A rule as a reward."""

    name: str
    rule: Rule

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float | None]:
        values = [self.rule(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return checked(self.name, prompts, answers, values)


def length(prompt: Prompt, answer: Answer) -> float:
    """The number of characters of the answer."""
    return float(len(answer.text))


def sentiment(prompt: Prompt, answer: Answer) -> float:
    """The answer's VADER compound score in [-1, 1] (Hutto and Gilbert 2014): how positive its words are."""
    return float(vader().polarity_scores(answer.text)["compound"])


@cache
def vader() -> Any:
    """The VADER analyzer; reading its lexicon takes a moment."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def exact_match(prompt: Prompt, answer: Answer) -> float:
    """1 if the answer is the prompt's known one, else 0; case and white space around it do not count.

    ValueError for a prompt whose row has no `answer`.
    """
    if prompt.answer is None:
        raise ValueError(
            f"reward exact-match has nothing to compare {described(prompt, answer)} with: "
            "give its row a column `answer` (or `final_answer`)"
        )
    return float(answer.text.strip().casefold() == prompt.answer.strip().casefold())


RULES: dict[str, Rule] = {"length": length, "sentiment": sentiment, "exact-match": exact_match}
