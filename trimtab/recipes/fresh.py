"""What `trimtab online-dpo` and `trimtab raft` share once they run: a choice among fresh answers, one step on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from trimtab import health
from trimtab.batches import DemonstrationBatch, PairBatch, Referenced, Rollouts
from trimtab.checkpoint import State, as_state
from trimtab.judges import Judge, JudgedReward, asked_of, compared
from trimtab.objectives import FreshObjective, Objective
from trimtab.parallel import over_ranks
from trimtab.progress import console
from trimtab.recipes import online, training
from trimtab.records import Answer, Comparison
from trimtab.rewards import Reward
from trimtab.run import Run
from trimtab.sampling import Samples
from trimtab.selection import Drawn, Pick, Tally, fresh_batches

ADVICE = {
    **health.ADVICE,
    "cut": "Raise --max-new-tokens.",
    "no_spread": "Nothing is learned from such prompts: raise --temperature, or take other prompts.",
    "identical": "The policy has collapsed: lower --lr, or go back to an earlier checkpoint.",
    "one_token": "The reward is being gamed: lower --lr, or mend the reward.",
}
"""What to do about signs of trouble: some of it is something else than for online RL."""


def learn_from_fresh(
    command: str,
    config: Any,
    load: Callable[[Any], Reward],
    objective: Objective,
    pick: Pick,
    collect: Callable[[Rollouts, Sequence[int]], Referenced[PairBatch] | DemonstrationBatch],
) -> None:
    """Sample, score, choose, step: from checked flags to a finished run."""
    sampler = training.sampler_of(config.sampling)
    policy, reward, prompts = online.load_parts(config, load)
    run = online.open_run(command, config, policy, prompts)
    reference, tally = policy.reference(), Tally()
    training.split_weights(run, config, policy, reference, *online.reward_models(reward))
    learner = training.make_learner(policy, FreshObjective(objective), config.steps, config.steps.steps)
    measure = measure_of(reward)
    safety = online.resume(run, learner, config, {"tally": tally}, prompts["train"], measure)
    batches = fresh_batches(
        online.draws(prompts["train"], config, start=tally.rollouts),
        online.stages_of(policy, reference, reward, config, sampler),
        pick,
        collect,
        group_size=config.algorithm.group_size,
        unfinished_score=config.algorithm.unfinished_score,
        tally=tally,
        watch=watcher(run, tally),
    )
    online.save_memory(run, [policy], prompts["train"], config, item_rows=2)
    evaluate = online.evaluation(run, measure, policy, reference, prompts.get("eval"), config, sampler)
    shown = prompts.get("eval", prompts["train"])
    training.train_online(run, learner, batches, evaluate, policy, shown, config, safety=safety)
    tell(tally)
    asked = asked_of(reward.judge) if isinstance(reward, JudgedReward) else None
    if asked is not None:
        console.print(f"judge: {asked}")


def measure_of(reward: Reward) -> online.Measure:
    """The reward of held-out answers or, with a judge, their win rate against the start model's."""
    if isinstance(reward, JudgedReward):
        return online.Measure("win_rate", AgainstStart(reward.judge), least=0.0, most=1.0)
    return online.reward_measure(reward)


@dataclass
class AgainstStart:
    """P(an answer is better than the start model's to the same prompt).

    The first answers that it is asked about are the start's. They are drawn by the same uniform numbers every time, so
    that before the first step all comparisons are ties.
    """

    judge: Judge
    start: list[Answer] = field(default_factory=list)

    def state_dict(self) -> State:
        return {"start": [as_state(answer) for answer in self.start]}

    def load_state_dict(self, state: State) -> None:
        self.start = [Answer(**{**answer, "ids": tuple(answer["ids"])}) for answer in state["start"]]

    def __call__(self, samples: Samples) -> list[float | None]:
        self.start = self.start or samples.answers
        twos = zip(samples.row_prompts, samples.answers, self.start, strict=True)
        return over_ranks(partial(compared, self.judge), [Comparison(*two) for two in twos])


# ---- What is told


def watcher(run: Run, tally: Tally) -> Callable[[Drawn], None]:
    """Looks at every rollout: writes down its counts and one prompt's answers, and says once what looks unhealthy."""

    def watch(drawn: Drawn) -> None:
        found = health.signs(drawn.rollouts, drawn.scored.samples.texts)
        for warning in tally.health.count(found, ADVICE):
            console.print(f"[yellow]rollout {drawn.number}: {warning}[/yellow]")
        run.append("rollouts.jsonl", {**told_of(drawn), "health": dict(tally.health.seen)})

    return watch


def told_of(drawn: Drawn) -> dict[str, Any]:
    """The counts of a rollout and the answers to its first prompt, for rollouts.jsonl."""
    told, selection = online.told(drawn), drawn.selection
    answers = [{**answer, "learned_from": row in selection.rows} for row, answer in enumerate(told["answers"])]
    return {**told, "answers": answers, "kept": selection.kept, "missed": dict(selection.missed)}


WHY = {
    "tied": "had answers that nothing told apart",
    "unscored": "had too few answers with a score",
    "below": "had no answer above --threshold",
}


def tell(tally: Tally) -> None:
    """How many prompts gave something to learn from, and why the others did not."""
    others = "".join(f"; {tally.missed[reason]} {why}" for reason, why in WHY.items() if reason in tally.missed)
    drawn = tally.kept + sum(tally.missed.values())
    console.print(f"learned from {tally.kept} of {drawn} prompts drawn{others}")
