"""The mean of numbers from 0 to 1, several of which may belong to one prompt, with its interval over prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from trimtab.evals.intervals import Estimate, bootstrap_mean, wilson


def share_over_prompts(values: Sequence[float], prompts: Sequence[Hashable], seed: int = 0) -> Estimate:
    """The mean of shares, with the bootstrap interval over prompts: what belongs to one prompt is drawn together.

    `count` is the number of prompts. Where all prompts have one share, all resamples are alike and say nothing of what
    was not seen: there the interval is Wilson's, with the prompts as trials. NaN for no values at all.
    """
    by_prompt: dict[Hashable, list[float]] = defaultdict(list)
    for value, prompt in zip(values, prompts, strict=True):
        by_prompt[prompt].append(value)
    means = [sum(found) / len(found) for found in by_prompt.values()]
    if len(set(means)) < 2:
        return wilson(len(means) * means[0] if means else 0, len(means))
    found = bootstrap_mean(means, seed, weights=[len(found) for found in by_prompt.values()])
    # Widened deviations may leave the range of a share; a bound that is NaN stays so.
    return replace(found, low=0.0 if found.low < 0 else found.low, high=1.0 if found.high > 1 else found.high)
