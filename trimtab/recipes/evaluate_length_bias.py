"""`trimtab evaluate length-bias`: whether a reward favours long answers beyond what people do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.recipes.options import RewardOptions

if TYPE_CHECKING:
    from trimtab.evals.length_bias import LengthBias


@dataclass(frozen=True)
class EvaluateLengthBias:
    """Accuracy where people chose the longer answer minus accuracy where they chose the shorter one, and the rest."""

    reward: RewardOptions
    data: str
    """Held-out pairs: prompt + chosen + rejected, or any format that can be read as pairs."""
    skip_invalid: bool = False
    """Skip and count bad rows instead of stopping at the first."""
    json: bool = False
    """Print one JSON object instead of a table."""


def evaluate_length_bias(config: EvaluateLengthBias) -> None:
    """Read pairs, score both answers, compare."""
    from trimtab.evals.length_bias import length_bias
    from trimtab.recipes import training
    from trimtab.recipes.evaluate_reward import load_reward
    from trimtab.recipes.figures import print_json
    from trimtab.records import Preference

    loaded = training.read(config.data, Preference, skip_invalid=config.skip_invalid)
    found = length_bias(load_reward(config.reward), loaded.records)
    if config.json:
        print_json({"data": config.data}, found)
    else:
        print_bias(found)


def print_bias(found: LengthBias) -> None:
    """The figures and what they mean in a sentence."""
    from trimtab.recipes.figures import print_estimates, say

    rows = {
        "length bias (difference of the next two)": found.bias,
        "accuracy where people chose the longer answer": found.right_where_longer,
        "accuracy where people chose the shorter answer": found.right_where_shorter,
        "the reward prefers the longer answer": found.prefers_longer,
        "people prefer the longer answer": found.people_prefer_longer,
        "margin per doubling of length, reward units": found.slope,
    }
    print_estimates(found.reward, rows)
    said = {
        "longer": "it favours the longer answer",
        "shorter": "it favours the shorter answer",
        "neither": "no clear length bias: the interval holds zero",
    }
    say(said[found.favours])
