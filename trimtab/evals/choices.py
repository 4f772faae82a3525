"""Choosing among given answers: the one that a reward scores highest, or that a policy finds most likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.records import Answer, Prompt
from trimtab.rewards import Reward, every_score

Picks = list[tuple[int, ...]]
"""For each question the places of the choices that share its highest score: one, but for ties."""


@dataclass(frozen=True)
class Question:
    """A prompt with answers to choose from; `right` is the place of the right one. `group` names what it is about."""

    prompt: Prompt
    choices: tuple[str, ...]
    right: int
    group: str = ""


def pick(reward: Reward, asked: Sequence[tuple[Prompt, Sequence[str]]], *, per_character: bool = False) -> Picks:
    """What is chosen of the answers to each prompt; all in one call, so that batches are full.

    The answers are taken as unfinished, so that a policy's likelihood is that of the choice itself and not of ending
    there. `per_character` divides scores by the length of the choice, for choices of unequal length.
    """
    prompts = [prompt for prompt, choices in asked for _ in choices]
    answers = [Answer(choice, finished=False) for _, choices in asked for choice in choices]
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
