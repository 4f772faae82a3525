"""`trimtab evaluate reward`: how often a reward prefers the answer that people preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimtab.recipes.options import RewardOptions

if TYPE_CHECKING:
    from trimtab.evals.reward_accuracy import RewardAccuracy
    from trimtab.evals.rewardbench import RewardBench
    from trimtab.rewards import Reward


@dataclass(frozen=True)
class EvaluateReward:
    """Accuracy on pairs with its 95 % Wilson interval: overall, by the column `subset`, by length and by margin.

    Equal scores are wrong. RewardBench's files are scored as published: by section, or the best of four and Ties.
    """

    reward: RewardOptions
    data: str
    """Held-out pairs: prompt + chosen + rejected, or any format that can be read as pairs."""
    benchmark: Literal["none", "rewardbench", "rewardbench2"] = "none"
    """Read --data in the columns of RewardBench 1 or 2, prompts as user turns, and score it as published."""
    plot: str | None = None
    """Also write the reliability plot, accuracy against confidence, as an HTML page; not for benchmarks."""
    json: bool = False
    """Print one JSON object instead of a table."""
    skip_invalid: bool = False
    """Skip and count bad rows instead of stopping at the first; not for benchmarks."""


def evaluate_reward(config: EvaluateReward) -> None:
    """Read pairs, score both answers, print the shares."""
    from pathlib import Path

    from trimtab.recipes.figures import check_plot, print_json

    if config.benchmark != "none":
        return evaluate_benchmark(config)
    check_plot(config.plot)

    from trimtab.evals.reward_accuracy import reward_accuracy
    from trimtab.recipes import training
    from trimtab.records import Preference

    loaded = training.read(config.data, Preference, skip_invalid=config.skip_invalid)
    accuracy = reward_accuracy(load_reward(config.reward), loaded.records)
    if config.plot is not None:
        from trimtab.report.plots import reliability_plot, write_plot

        write_plot(reliability_plot(accuracy.reward, accuracy.calibration), Path(config.plot))
    if config.json:
        print_json({"data": config.data}, accuracy)
    else:
        print_accuracy(accuracy)


def load_reward(options: RewardOptions) -> Reward:
    """The reward of a command's options."""
    from trimtab.recipes import training
    from trimtab.rewards import parse_rewards

    return parse_rewards(
        options.choice.reward,
        options.choice.reward_weights,
        **training.scoring(options),
        max_length=options.max_length,
        overlong=options.overlong,
    )


def evaluate_benchmark(config: EvaluateReward) -> None:
    """The same for a file of RewardBench."""
    from trimtab.evals import rewardbench
    from trimtab.recipes.figures import print_json

    if config.skip_invalid or config.plot is not None:
        raise ValueError("--skip-invalid and --plot have no effect with --benchmark.")
    if config.benchmark == "rewardbench":
        pairs = rewardbench.read_version_1(config.data)
        found = rewardbench.rewardbench_1(load_reward(config.reward), pairs)
    else:
        items = rewardbench.read_version_2(config.data)
        found = rewardbench.rewardbench_2(load_reward(config.reward), items)
    if config.json:
        print_json({"data": config.data}, found)
    else:
        print_benchmark(found)


def print_accuracy(accuracy: RewardAccuracy) -> None:
    """Accuracy overall and by group, with what a length rule would reach, and the calibration."""
    from trimtab.recipes.figures import print_estimates, say

    overall = {"everything": accuracy.accuracy, **accuracy.subsets, "(the longer answer)": accuracy.longer}
    print_estimates(accuracy.reward, overall, unit="accuracy")
    print_estimates("by length: the better answer is ...", accuracy.by_length, unit="accuracy")
    print_estimates("by the size of the margin", accuracy.by_margin, unit="accuracy")
    bins = {f"{bin.confidence:.3f}": bin.accuracy for bin in accuracy.calibration.bins}
    print_estimates("by confidence, sigmoid(|margin|)", bins, unit="accuracy")
    say(f"expected calibration error {accuracy.calibration.error:.3f} (equal scores are half right)")
    say(f"mean margin {accuracy.margin:.3f}; {accuracy.ties} equal scores (counted as wrong)")
    if accuracy.excluded:
        say(f"{accuracy.excluded} pairs without a better answer were left out")


def print_benchmark(found: RewardBench) -> None:
    """The score, sections and subsets of RewardBench."""
    from trimtab.recipes.figures import print_estimates, say

    print_estimates(f"{found.reward} on RewardBench {found.version}", {"score": found.score, **found.sections})
    print_estimates("by subset", found.subsets, unit="accuracy")
    say(f"{found.ties} equal scores of a right and a wrong answer")
    if found.missing:
        say(f"there is no score, for the file lacks {', '.join(found.missing)}")
