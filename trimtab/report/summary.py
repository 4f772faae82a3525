"""Reading a summary: methods, their intervals, their names and colours. Absent or unmeasured figures are None."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

START = "start"
"""The method that every other one is compared with: the model as it was."""

BEST_OF = "best-of-"
"""How the keys of the best-of-n family begin."""

NAMES = {
    START: "Start model",
    "simpo": "SimPO",
    "remax": "ReMax",
    "reinforce_pp": "REINFORCE++",
    "ppo_max": "PPO-max",
    "ppo_max_script": "PPO-max (script)",
    "dr_grpo": "Dr. GRPO",
} | {
    key: key.upper()
    for key in ("sft", "dpo", "ipo", "kto", "orpo", "cpo", "ppo", "rloo", "grpo", "reinforce", "dapo", "gspo")
}

COLORS = {START: "c0", "dpo": "c2", "sft": "c3", "kto": "c4", "ppo": "c5", "rloo": "c6", "grpo": "c3"}


class Interval(NamedTuple):
    """A measured value and its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def inner(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key; empty where there is none."""
    found = entry.get(key)
    return found if isinstance(found, Mapping) else {}


def interval(entry: Mapping[str, Any], key: str) -> Interval | None:
    """The figure `key` of a summary's entry: an object with value, low and high, or a bare number without spread."""
    found = entry.get(key)
    if not isinstance(found, Mapping):
        found = {"value": found}
    value = number(found.get("value"))
    if value is None:
        return None
    low, high = number(found.get("low")), number(found.get("high"))
    return Interval(value, value if low is None else low, value if high is None else high)


def of_a_method(entry: Any) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("method"), str)


def of_a_prompt(entry: Any) -> bool:
    answers = entry.get("answers") if isinstance(entry, Mapping) else None
    return isinstance(answers, Mapping) and all(isinstance(one, Mapping) and "text" in one for one in answers.values())


def is_text(entry: Any) -> bool:
    return isinstance(entry, str)


LISTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "methods": (of_a_method, "objects, each with the name of its method"),
    "frontier": (of_a_method, "objects, each with the name of its method"),
    "texts": (of_a_prompt, "objects, each with the text of every method's answer"),
    "commands": (is_text, "texts"),
    "notes": (is_text, "texts"),
}
"""The lists of a summary: what each of their entries must be, and that in words."""


def checked(place: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary that was read from a file, without what is null. ValueError naming a part that is of another kind."""
    kept = {part: value for part, value in summary.items() if value is not None}
    for part, (can_be_read, expected) in LISTS.items():
        found = kept.get(part, [])
        if not isinstance(found, list) or not all(map(can_be_read, found)):
            raise ValueError(f"{place}: {part}: expected a list of {expected}.")
    if not isinstance(kept.get("reward_model", {}), Mapping):
        raise ValueError(f"{place}: reward_model: expected an object.")
    return kept


def is_best_of(method: str) -> bool:
    """Whether this is best-of-n for some n (or for all of them: "best-of-n")."""
    return method.startswith(BEST_OF)


def method_name(method: str) -> str:
    """How a method's key reads in a sentence: "best-of-4" is "Best-of-4", "dpo" is "DPO"."""
    return NAMES.get(method, method[:1].upper() + method[1:])


def method_color(method: str) -> str:
    """The colour that a method keeps in the whole report, as a name that the page's style defines."""
    if is_best_of(method):
        return "c1"
    return COLORS.get(method, f"c{sum(map(ord, method)) % 5 + 2}")
