"""Learning from some of the answers that the policy drew: the best against the worst, or the best alone; lazily.

The stages are those of `rollouts`, sample -> score -> refer, with a choice in the place of credit. What is chosen keeps
the tokens that were drawn; no text is tokenized again. As there, an answer serves one update, and nothing may be
prefetched.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trimtab.algorithms import ALGORITHMS
from trimtab.batches import DemonstrationBatch, FreshBatch, Mean, PairBatch, Referenced, Rollouts
from trimtab.judges import JudgedReward
from trimtab.kl import log_ratio
from trimtab.records import Prompt
from trimtab.rollouts import Scored, Stages, refer, score

ONE_UPDATE = ALGORITHMS["reinforce"]
"""An algorithm whose answers serve one update, with KL by k1: what `refer` asks of one."""

Scores = Sequence[float | None]


class Choice(NamedTuple):
    """Places in a group of the answers to learn from, or why there are none: unscored, tied, below."""

    places: tuple[int, ...]
    reason: str = ""


Pick = Callable[[Scores], Choice]


@dataclass(frozen=True)
class Selection:
    """Rows of the answers to learn from, prompt by prompt; how many prompts gave some; and why others gave none."""

    rows: Sequence[int]
    kept: int
    missed: Mapping[str, int]


@dataclass(frozen=True)
class Drawn:
    """One rollout from its texts to the answers that are learned from, for those who watch."""

    number: int
    scored: Scored
    rollouts: Rollouts
    selection: Selection
    seconds: Mapping[str, float]


# ---- Choosing


def best_and_worst(scores: Scores) -> Choice:
    """The answer with the highest score and the one with the lowest, the first of several. A tie is no preference."""
    known = known_scores(scores)
    if len(known) < 2:
        return Choice((), "unscored")
    if len(set(known.values())) == 1:
        return Choice((), "tied")
    return Choice((max(known, key=lambda place: known[place]), min(known, key=lambda place: known[place])))


def best(scores: Scores) -> Choice:
    """The answer with the highest score, the first of several; none where all are equally good."""
    choice = best_and_worst(scores)
    return Choice(choice.places[:1], choice.reason)


def above(scores: Scores, *, threshold: float) -> Choice:
    """Every answer with a score above the threshold."""
    known = known_scores(scores)
    good = tuple(place for place, value in known.items() if value > threshold)
    return Choice(good, "" if good else "below" if known else "unscored")


def known_scores(scores: Scores) -> dict[int, float]:
    """The scores that there are, by place."""
    return {place: value for place, value in enumerate(scores) if value is not None}


def select(scores: Scores, group_size: int, pick: Pick) -> Selection:
    """What is learned from, where the `group_size` answers to a prompt are neighbours."""
    starts = range(0, len(scores), group_size)
    choices = [pick(scores[start : start + group_size]) for start in starts]
    rows = [start + place for start, choice in zip(starts, choices, strict=True) for place in choice.places]
    missed = Counter(choice.reason for choice in choices if not choice.places)
    return Selection(rows, len(choices) - missed.total(), missed)


# ---- Batches


def chosen_pairs(rollouts: Rollouts, rows: Sequence[int], *, with_reference: bool = True) -> Referenced[PairBatch]:
    """Rows chosen, rejected, chosen, rejected, ... of the answers drawn; `margin` is the difference of their scores.

    Without a reference its log-probabilities are zeros, as for all losses that do not read them.
    """
    index = torch.tensor(rows)
    scores = rollouts.scores[index].view(-1, 2)
    certain = torch.ones(len(scores))
    logprobs = rollouts.ref_logprobs[index][:, rollouts.tokens.used_columns(index)]
    batch = PairBatch(rollouts.tokens.select(index), certain, certain, scores[:, 0] - scores[:, 1])
    return Referenced(batch, logprobs if with_reference else torch.zeros_like(logprobs))


def chosen_demonstrations(rollouts: Rollouts, rows: Sequence[int]) -> DemonstrationBatch:
    """Answers drawn, to imitate."""
    return DemonstrationBatch(rollouts.tokens.select(torch.tensor(rows)), torch.ones(len(rows)))


def fresh_batches(
    prompts: Iterator[Sequence[Prompt]],
    stages: Stages,
    pick: Pick,
    collect: Callable[[Rollouts, Sequence[int]], Referenced[PairBatch] | DemonstrationBatch],
    *,
    group_size: int,
    unfinished_score: float | None = None,
    watch: Callable[[Drawn], None] = lambda drawn: None,
) -> Iterator[FreshBatch]:
    """Sample, score, choose, and hand out one batch for one update.

    Rollouts with nothing to learn from are passed over; `watch` sees every one. ValueError at the end if that was all
    of them.
    """
    missed: Counter[str] = Counter()
    learned = 0
    for number, asked in enumerate(prompts, start=1):
        drawn = rollout(number, asked, stages, pick, group_size=group_size, unfinished_score=unfinished_score)
        watch(drawn)
        missed.update(drawn.selection.missed)
        if drawn.selection.rows:
            learned += 1
            yield FreshBatch(collect(drawn.rollouts, drawn.selection.rows), figures(drawn, stages))
    if not learned:
        counts = ", ".join(f"{count} {reason}" for reason, count in missed.items())
        raise ValueError(f"{stages.reward.name} left nothing to learn from in any rollout: of all prompts, {counts}")


def rollout(
    number: int,
    prompts: Sequence[Prompt],
    stages: Stages,
    pick: Pick,
    *,
    group_size: int,
    unfinished_score: float | None = None,
) -> Drawn:
    """Answers to some prompts, and the choice among them."""
    times = [time.perf_counter()]
    samples = stages.draw(prompts, group_size, step=number - 1)
    times.append(time.perf_counter())
    scored = score(stages.reward, samples)
    times.append(time.perf_counter())
    rollouts = refer(scored, torch.zeros(len(samples.tokens)), stages, ONE_UPDATE)
    times.append(time.perf_counter())
    seconds = (end - begin for begin, end in itertools.pairwise(times))
    return Drawn(
        number=number,
        scored=scored,
        rollouts=rollouts,
        selection=select(with_unfinished_score(scored, unfinished_score), samples.n, pick),
        seconds=dict(zip(("sample", "score", "refer"), seconds, strict=True)),
    )


def with_unfinished_score(scored: Scored, unfinished_score: float | None) -> Scores:
    """The rewards, with another score for every answer that was cut, if there is one."""
    if unfinished_score is None:
        return scored.rewards
    answers = zip(scored.rewards, scored.samples.finished.tolist(), strict=True)
    return [reward if reward is None or finished else unfinished_score for reward, finished in answers]


def figures(drawn: Drawn, stages: Stages) -> dict[str, Mean]:
    """What is told about all answers of a rollout, learned from or not; their reward, unless a judge stands for it."""
    rollouts, selection = drawn.rollouts, drawn.selection
    mask, prompts = rollouts.tokens.response_mask, len(rollouts.tokens) // rollouts.group_size
    told = {
        "kl": Mean.of(log_ratio(rollouts.logprobs, rollouts.ref_logprobs, mask).sum(-1)),
        "entropy": Mean.of(-rollouts.sampled_logprobs, mask),
        "length": Mean.of(rollouts.tokens.response_lengths),
        "unfinished": Mean.of((~rollouts.finished).float()),
        "kept": Mean(torch.tensor(float(selection.kept)), torch.tensor(float(prompts))),
    }
    if isinstance(stages.reward, JudgedReward):
        return told
    return {"reward": Mean.of(rollouts.scores, rollouts.valid.float()), **told}
