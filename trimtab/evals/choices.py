"""Choosing among given answers: the one that a reward scores highest, or that a policy finds most likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trimtab.records import Answer, Prompt
from trimtab.rewards import ImplicitReward, Reward, every_score

if TYPE_CHECKING:
    from trimtab.models import Policy

Picks = list[tuple[int, ...]]
"""For each question the places of the choices that share its highest score: one, but for ties."""


@dataclass(frozen=True)
class Question:
    """A prompt with answers to choose from; `right` is the place of the right one. `group` names what it is about."""

    prompt: Prompt
    choices: tuple[str, ...]
    right: int
    group: str = ""


@dataclass(frozen=True)
class Likelihood:
    """A policy as a reward: the log-probability of the answer's own tokens, nats, and not of ending there.

    So "(A)" and "(B)" are compared, and not how likely the policy is to say nothing after them.
    """

    name: str
    policy: Policy
    batch_rows: int = 16

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float | None]:
        score = ImplicitReward(self.name, self.policy, None, 1.0, batch_rows=self.batch_rows)
        return score(prompts, [replace(answer, finished=False) for answer in answers])


def pick(reward: Reward, asked: Sequence[tuple[Prompt, Sequence[str]]], *, per_character: bool = False) -> Picks:
    """What is chosen of the answers to each prompt; all in one call, so that batches are full.

    `per_character` divides scores by the length of the choice, for choices of unequal length.
    """
    prompts = [prompt for prompt, choices in asked for _ in choices]
    answers = [Answer(choice) for _, choices in asked for choice in choices]
    scores = every_score(reward, prompts, answers)
    if per_character:
        scores = [score / max(len(answer.text), 1) for score, answer in zip(scores, answers, strict=True)]
    flat = iter(scores)
    return [best([next(flat) for _ in choices]) for _, choices in asked]


def best(scores: Sequence[float]) -> tuple[int, ...]:
    """The places of the highest score."""
    highest = max(scores)
    return tuple(place for place, score in enumerate(scores) if score == highest)


def share_of(place: int, picked: Sequence[int]) -> float:
    """How much of a pick falls on one place: 1, 1 / k where k choices tie, or 0."""
    return 1 / len(picked) if place in picked else 0.0
