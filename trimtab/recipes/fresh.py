"""What `trimtab online-dpo` and `trimtab raft` share: sampling, a choice among the answers, one step on them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trimtab.recipes.algorithm import check_sampling
from trimtab.recipes.options import check_options, check_outside
from trimtab.recipes.rl import (
    EVALUATION_ANSWERS,
    check_prompts,
    draws,
    evaluation,
    fitting,
    prompt_lengths,
    prompt_means,
    stages_of,
)

if TYPE_CHECKING:
    from trimtab.batches import DemonstrationBatch, PairBatch, Referenced, Rollouts
    from trimtab.judges import Judge
    from trimtab.models import FrozenPolicy, Policy
    from trimtab.objectives import Objective
    from trimtab.records import Prompt
    from trimtab.rewards import Reward
    from trimtab.run import Run
    from trimtab.sampling import Samples
    from trimtab.selection import Drawn, Pick

ADVICE = {
    "cut": "Raise --max-new-tokens.",
    "no_spread": "Nothing is learned from such prompts: raise --temperature, or take other prompts.",
    "identical": "The policy has collapsed: lower --lr, or go back to an earlier checkpoint.",
    "one_token": "The reward is being gamed: lower --lr, or mend the reward.",
}
"""What to do about signs of trouble, where it is something else than for online RL."""


# ---- What comes in


def check_fresh(config: Any) -> None:
    """Refuse flags that mean nothing, by name, before anything is read."""
    check_options(config)
    for name in config.reward.reward:
        check_outside(config.run.out, "--reward", name)
    check_sampling(config.sampling)
    options = config.algorithm
    for flag, value in {"--group-size": options.group_size, "--prompts-per-step": options.prompts_per_step}.items():
        if value < 1:
            raise ValueError(f"{flag} {value}: at least 1 is needed.")
    if options.unfinished_score is not None and not math.isfinite(options.unfinished_score):
        raise ValueError(f"--unfinished-score {options.unfinished_score}: a finite number is needed.")
    if config.data.overlong not in ("error", "drop"):
        raise ValueError(f"--overlong {config.data.overlong}: prompts are never cut here; give error or drop.")


# ---- What happens to it


def learn_from_fresh(
    command: str,
    config: Any,
    load_reward: Callable[[], Reward],
    objective: Objective,
    pick: Pick,
    collect: Callable[[Rollouts, Sequence[int]], Referenced[PairBatch] | DemonstrationBatch],
) -> None:
    """Sample, score, choose, step: from checked flags to a finished run."""
    from trimtab.judges import JudgedReward
    from trimtab.models import load_policy
    from trimtab.objectives import FreshObjective
    from trimtab.recipes import training
    from trimtab.records import Prompt
    from trimtab.selection import ONE_UPDATE, fresh_batches

    loaded = training.read_parts(config.data, Prompt)
    reward = load_reward()
    policy = training.load(load_policy, config)
    policy.module.temperature = config.sampling.temperature
    prompts = {part: fitting(policy, some.records, config) for part, some in loaded.items()}
    check_prompts(prompts["train"], config)
    run = training.open_run(command, config, policy, {part: {"prompts": len(some)} for part, some in prompts.items()})
    reference = policy.reference()
    training.split_weights(run, config, policy, reference)
    stages = stages_of(policy, reference, reward, None, ONE_UPDATE, config)
    counts: Counter[str] = Counter()
    batches = fresh_batches(
        draws(prompts["train"], config),
        stages,
        pick,
        collect,
        group_size=config.algorithm.group_size,
        unfinished_score=config.algorithm.unfinished_score,
        watch=watcher(run, counts),
    )
    learner = training.make_learner(policy, FreshObjective(objective), config.steps, config.steps.steps)
    save_memory(run, policy, prompts["train"], config)
    evaluate = None
    if "eval" in prompts and isinstance(reward, JudgedReward):
        evaluate = against_start(run, reward.judge, policy, reference, prompts["eval"], config)
    elif "eval" in prompts:
        evaluate = evaluation(run, stages, policy, reference, prompts["eval"], config)
    training.train_online(run, learner, batches, evaluate, policy, prompts.get("eval", prompts["train"]), config)
    tell_counts(counts)


def save_memory(run: Run, policy: Policy, prompts: Sequence[Prompt], config: Any) -> None:
    """Gradient checkpointing for what the longest answers to the longest prompts need."""
    from trimtab.recipes import training

    rows = max(config.steps.micro_batch_rows, 2)
    length = max(prompt_lengths(policy, prompts)) + config.sampling.max_new_tokens
    training.save_memory(run, [policy], config.steps.gradient_checkpointing, rows, length)


def against_start(
    run: Run, judge: Judge, policy: Policy, reference: FrozenPolicy, prompts: Sequence[Prompt], config: Any
) -> Callable[[int], Mapping[str, float]]:
    """Win rate against the start model's answers, exact KL and length on held-out prompts.

    Answers are drawn by the same uniform numbers every time, so that before the first step they are the start's and all
    comparisons are ties. With --eval-every, the policy with the best win rate so far is kept as checkpoints/best.
    """
    from trimtab.evals.drift import drift
    from trimtab.evals.intervals import bootstrap_mean
    from trimtab.judges import compared
    from trimtab.progress import console
    from trimtab.records import Comparison
    from trimtab.sampling import sample

    start: list[Samples] = []
    best = -math.inf

    def evaluate(step: int) -> Mapping[str, float]:
        nonlocal best
        samples = sample(policy, prompts, EVALUATION_ANSWERS, seed=config.run.seed, **asdict(config.sampling))
        if not start:
            start.append(samples)
        twos = zip(samples.row_prompts, samples.answers, start[0].answers, strict=True)
        said = prompt_means(compared(judge, [Comparison(*two) for two in twos]), samples.n)
        if not said:
            raise ValueError(f"judge {judge.name} gave None for all {len(samples.texts)} held-out comparisons")
        wins = bootstrap_mean(said, config.run.seed)
        moved = drift(policy, reference, samples, batch_rows=config.steps.micro_batch_rows)
        # The widened bootstrap of `bootstrap_mean` knows nothing of the ends of a share.
        low, high = max(wins.low, 0.0), min(wins.high, 1.0)
        figures = {"win_rate": wins.value, "win_rate_low": low, "win_rate_high": high}
        figures |= {"kl": moved.kl.value, "length": moved.length.value, "unfinished": moved.unfinished.value}
        console.print(f"held out, step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if step and config.run.eval_every and wins.value > best:
            best = wins.value
            run.checkpoint(policy.save, "best")
        return figures

    return evaluate


# ---- What is told


def watcher(run: Run, counts: Counter[str]) -> Callable[[Drawn], None]:
    """Looks at every rollout: counts, writes down one prompt's answers, and says once what looks unhealthy."""
    from trimtab import health
    from trimtab.progress import console

    seen: Counter[str] = Counter()

    def watch(drawn: Drawn) -> None:
        selection = drawn.selection
        counts.update({"prompts": selection.kept + sum(selection.missed.values()), "kept": selection.kept})
        counts.update(selection.missed)
        found = health.signs(drawn.rollouts, drawn.scored.samples.texts)
        for name, text in found.items():
            if name not in seen:
                advice = {**health.ADVICE, **ADVICE}[name]
                console.print(f"[yellow]rollout {drawn.number}: {text}. {advice}[/yellow]")
        seen.update(found.keys())
        run.append("rollouts.jsonl", {**told_of(drawn), "health": dict(seen)})

    return watch


def told_of(drawn: Drawn) -> dict[str, Any]:
    """The counts of a rollout and the answers to its first prompt, for rollouts.jsonl."""
    scored, selection, rollouts = drawn.scored, drawn.selection, drawn.rollouts
    answers = []
    for i in range(scored.samples.n):
        parts = {name: values[i] for name, values in scored.parts.items()}
        answer = {"text": scored.samples.texts[i], "reward": scored.rewards[i], "learned_from": i in selection.rows}
        answers.append({**answer, **({"parts": parts} if parts else {})})
    return {
        "rollout": drawn.number,
        "reward": rollouts.scores[rollouts.valid].mean().item(),
        "kl": rollouts.mean_kl,
        "kept": selection.kept,
        "missed": dict(selection.missed),
        "seconds": dict(drawn.seconds),
        "prompt": scored.samples.prompts[0].text,
        "answers": answers,
    }


WHY = {
    "tied": "had answers that nothing told apart",
    "unscored": "had too few answers with a score",
    "below": "had no answer above --threshold",
}


def tell_counts(counts: Counter[str]) -> None:
    """How many prompts gave something to learn from, and why the others did not."""
    from trimtab.progress import console

    others = "".join(f"; {counts[reason]} {why}" for reason, why in WHY.items() if counts[reason])
    console.print(f"learned from {counts['kept']} of {counts['prompts']} prompts drawn{others}")
