"""Learning from some of the answers that the policy drew: the best against the worst, or the best alone; lazily.

The stages are those of `rollouts`, sample -> score -> refer, with a choice in the place of credit. What is chosen keeps
the tokens that were drawn; no text is tokenized again. As there, an answer serves one update, and nothing may be
prefetched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from trimtab.advantages import with_unfinished_score
from trimtab.algorithms import ALGORITHMS
from trimtab.batches import DemonstrationBatch, FreshBatch, Mean, PairBatch, Referenced, Rollouts
from trimtab.health import Health
from trimtab.judges import JudgedReward
from trimtab.kl import log_ratio
from trimtab.records import Prompt
from trimtab.rollouts import Scored, Stages, check_scored, refer, score, timed

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


@dataclass
class Tally:
    """What is remembered from one rollout to the next: plain numbers, all of which belong into a checkpoint.

    Of `rollouts`, some answer had a score in `scored`; of the prompts, `kept` gave answers to learn from, and `missed`
    says why others gave none.
    """

    rollouts: int = 0
    scored: int = 0
    kept: int = 0
    missed: dict[str, int] = field(default_factory=dict)
    health: Health = field(default_factory=Health)

    def update(self, drawn: Drawn) -> None:
        """Take a rollout in."""
        self.rollouts += 1
        self.scored += bool(drawn.scored.valid.any())
        self.kept += drawn.selection.kept
        self.missed = dict(Counter(self.missed) + Counter(drawn.selection.missed))


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
    tally: Tally | None = None,
    watch: Callable[[Drawn], None] = lambda drawn: None,
) -> Iterator[FreshBatch]:
    """Sample, score, choose, and hand out one batch for one update.

    Rollouts with nothing to learn from are passed over and counted; `watch` sees every one. ValueError at the end if
    that was all of them, and where `check_scored` says so.
    """
    tally = Tally() if tally is None else tally
    for asked in prompts:
        number = tally.rollouts + 1
        drawn = rollout(number, asked, stages, pick, group_size=group_size, unfinished_score=unfinished_score)
        tally.update(drawn)
        watch(drawn)
        check_scored(stages.reward, tally.rollouts, tally.scored)
        if drawn.selection.rows:
            yield FreshBatch(collect(drawn.rollouts, drawn.selection.rows), figures(drawn, stages))
    check_scored(stages.reward, tally.rollouts, tally.scored, patience=1)
    if not tally.kept:
        counts = ", ".join(f"{count} {reason}" for reason, count in tally.missed.items())
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
    seconds: dict[str, float] = {}
    with timed("sample", seconds):
        samples = stages.draw(prompts, group_size, step=number - 1)
    with timed("score", seconds):
        scored = score(stages.reward, samples)
    with timed("refer", seconds):
        rollouts = refer(scored, torch.zeros(len(samples.tokens)), stages, ONE_UPDATE)
    selection = select(compared_scores(scored, unfinished_score), samples.n, pick)
    return Drawn(number=number, scored=scored, rollouts=rollouts, selection=selection, seconds=seconds)


def compared_scores(scored: Scored, unfinished_score: float | None) -> Scores:
    """The rewards as answers are compared by them: with another for every answer that was cut, if there is one."""
    # In float64, which holds a reward as it is: rounding must not make ties.
    numbers = torch.tensor([reward or 0.0 for reward in scored.rewards], dtype=torch.float64)
    scores = with_unfinished_score(numbers, scored.samples.finished, unfinished_score).tolist()
    return [None if reward is None else score for reward, score in zip(scored.rewards, scores, strict=True)]


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
