"""`trimtab evaluate reward`: how often a reward prefers the answer that people preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trimtab.recipes.options import RewardOptions

if TYPE_CHECKING:
    from rich.console import Console

    from trimtab.evals.reward_accuracy import RewardAccuracy


@dataclass(frozen=True)
class EvaluateReward:
    """Accuracy on pairs with its 95 % Wilson interval, overall and by the column `subset`. Equal scores are wrong."""

    reward: RewardOptions
    data: str
    """Held-out pairs: prompt + chosen + rejected, or any format that can be read as pairs."""
    json: bool = False
    """Print one JSON object instead of a table."""
    skip_invalid: bool = False
    """Skip and count bad rows instead of stopping at the first."""


def evaluate_reward(config: EvaluateReward) -> None:
    """Read pairs, score both answers, print the shares."""
    import json

    from rich.console import Console

    from trimtab.evals.reward_accuracy import reward_accuracy
    from trimtab.recipes import training
    from trimtab.records import Preference
    from trimtab.rewards import parse_rewards

    loaded = training.read(config.data, Preference, skip_invalid=config.skip_invalid)
    reward = parse_rewards(
        config.reward.choice.reward,
        config.reward.choice.reward_weights,
        **training.scoring(config.reward),
        max_length=config.reward.max_length,
        overlong=config.reward.overlong,
    )
    accuracy = reward_accuracy(reward, loaded.records)
    if config.json:
        print(json.dumps({"data": config.data, **accuracy.to_dict()}, indent=2))
    else:
        print_table(accuracy, Console(highlight=False))


def print_table(accuracy: RewardAccuracy, console: Console) -> None:
    """Accuracy overall and by subset, with what a length rule would reach."""
    from rich.table import Table

    table = Table(title=accuracy.reward)
    table.add_column("pairs of")
    table.add_column("accuracy [95 % interval]", justify="right")
    table.add_column("pairs", justify="right")
    named = {"everything": accuracy.accuracy, **accuracy.subsets, "(the longer answer)": accuracy.longer}
    for name, estimate in named.items():
        table.add_row(name, f"{estimate:.3f}", str(estimate.count))
    console.print(table)
    console.print(f"mean margin {accuracy.margin:.3f}; {accuracy.ties} equal scores (counted as wrong)")
    if accuracy.excluded:
        console.print(f"{accuracy.excluded} pairs without a better answer were left out")
