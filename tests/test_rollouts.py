"""Rollouts: what was drawn is credited to the right tokens, by the right models, at the right time."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad as pad_columns

from tests import bigram
from tests.bigram import Bigram
from trimtab.algorithms import ALGORITHMS, Algorithm
from trimtab.batches import PolicyBatch, Tokens
from trimtab.builtin import tiny_policy
from trimtab.critic import PolicyWithCritic, values_before
from trimtab.health import Health
from trimtab.kl import AdaptiveCoefficient, FixedCoefficient, KlBudget
from trimtab.learner import Learner, make_optimizer, make_schedule
from trimtab.models import Policy, ScalarModel, make_scalar
from trimtab.recipes.algorithm import objective_of
from trimtab.recipes.rl import critic_first
from trimtab.records import Answer, Prompt
from trimtab.rewards import RuleReward, mixture
from trimtab.rollouts import (
    PATIENCE,
    Account,
    History,
    Stages,
    derived_seed,
    minibatches,
    policy_batches,
    roll_out,
    score,
)
from trimtab.run import Run
from trimtab.sampling import Samples, sample
from trimtab.tokens import Row, pad
from trimtab.weights import classifier_from

PROMPTS = [Prompt.from_user(f"Say {word}.") for word in ("one", "two", "three", "four")]
END, PAD = 7, 0


def by_length(prompt: Prompt, answer: Answer) -> float:
    return float(len(answer.text))


LENGTH = RuleReward("length", by_length)


def answered(rows: Sequence[Sequence[int]], finished: Sequence[bool], n: int = 1, pad_id: int = PAD) -> Samples:
    """Samples with these answers after a prompt of two tokens; an answer's text spells its tokens."""
    tokens = pad([Row([8, 9, *row], [False, False, *(True for _ in row)]) for row in rows], pad_id)
    logprobs = torch.where(tokens.response_mask, -1.0, 0.0)
    texts = [" ".join(map(str, row)) for row in rows]
    prompts = tuple(PROMPTS[: len(rows) // n])
    return Samples(prompts, n, tokens, logprobs, logprobs.clone(), texts, torch.tensor(finished))


def zeros(tokens: Tokens) -> Tensor:
    return torch.zeros(tokens.ids.shape)


def stages_around(samples: Samples, reward: Any, **changes: Any) -> Stages:
    """Stages that draw these samples whatever is asked; policy and reference agree."""

    def draw(prompts: Sequence[Prompt], n: int, *, step: int) -> Samples:
        return samples

    def surely(tokens: Tokens) -> Tensor:
        return torch.where(tokens.response_mask, -1.0, 0.0)

    stages = Stages(draw, lambda prompts: samples, reward, reference=surely, policy=surely)
    return replace(stages, **changes)


def roll(samples: Samples, reward: Any, row: Algorithm, history: History | None = None, **changes: Any) -> Account:
    history = history or History(FixedCoefficient(row.kl_coefficient))
    stages = stages_around(samples, reward, **changes)
    return roll_out(samples.prompts, stages, row, history, group_size=samples.n)


REWARDS_THEMSELVES = replace(ALGORITHMS["ppo"], advantage_arguments=("lam=0",), whiten_advantages=False)
"""With a critic that expects nothing and lambda 0, a token's advantage is what it earned."""


# ---- Credit


@pytest.mark.parametrize("pad_id", [PAD, END])
def test_the_score_lands_on_the_last_drawn_token_in_every_case(pad_id: int) -> None:
    rows = [[1, END], [1, 2, 3, 4, END], [1, 2, 3, 4, 5], [END], [1, END, END, 2, END]]
    samples = answered(rows, [True, True, False, True, True], pad_id=pad_id)
    reward = RuleReward("first", lambda prompt, answer: 2.0 + len(answer.text))
    samples = replace(samples, prompts=tuple(PROMPTS[i % 4] for i in range(5)))
    row = replace(REWARDS_THEMSELVES, kl_coefficient=0.0)
    earned = roll(samples, reward, row, critic=zeros).batch.advantages
    for i, answer in enumerate(rows):
        assert earned[i].nonzero()[:, 0].tolist() == [1 + len(answer)]
        assert earned[i, 1 + len(answer)] == 2 + len(samples.texts[i])


def test_kl_is_paid_at_its_token_and_reaches_the_advantages_of_answers() -> None:
    samples = answered([[1, 2, END], [3, END]], [True, True], n=2)
    distances = torch.tensor([[0.0, 0, 0.5, -0.25, 1.0], [0, 0, 2.0, 0.0, 0]])

    def farther(tokens: Tokens) -> Tensor:
        return samples.sampled_logprobs - distances[:, : tokens.ids.shape[1]]

    reward = RuleReward("same", lambda prompt, answer: 1.0)
    row = replace(REWARDS_THEMSELVES, kl_coefficient=0.1)
    paid = roll(samples, reward, row, critic=zeros, reference=farther)
    expected = torch.tensor([[0.0, 0, -0.05, 0.025, 0.9], [0, 0, -0.2, 1.0, 0]])
    torch.testing.assert_close(paid.batch.advantages, expected)
    assert paid.rollouts.mean_kl == pytest.approx((1.25 + 2.0) / 2)
    leave_one_out = roll(samples, reward, replace(ALGORITHMS["rloo"], kl_coefficient=0.1), reference=farther).batch
    # Scores 1 - 0.125 and 1 - 0.2: the other answer is the baseline.
    assert leave_one_out.advantages[0, 2:].tolist() == pytest.approx([0.075] * 3)
    assert leave_one_out.advantages[1, 2:].tolist() == pytest.approx([-0.075, -0.075, 0])


def test_exact_kl_takes_the_place_of_the_estimate() -> None:
    samples = answered([[1, 2], [3, END]], [False, True], n=2)
    kl = torch.tensor([[0.0, 0, 3.0, 1.0], [0, 0, 2.0, 0.5]])
    row = replace(REWARDS_THEMSELVES, kl="exact", kl_coefficient=1.0)
    earned = roll(samples, LENGTH, row, critic=zeros, exact_kl=lambda tokens: kl).batch.advantages
    torch.testing.assert_close(earned[:, 2:], torch.tensor([[-3.0, 3.0 - 1.0], [-2.0, 3.0 - 0.5]]))


def test_an_answer_that_was_cut_gets_its_own_score_and_the_figures_keep_the_reward() -> None:
    samples = answered([[1, 2, 3], [1, END]], [False, True], n=2)
    row = replace(REWARDS_THEMSELVES, kl_coefficient=0.0, unfinished_score=-1.0)
    batch = roll(samples, LENGTH, row, critic=zeros).batch
    assert batch.advantages[:, 2:].tolist() == [[0, 0, -1.0], [0, 3.0, 0]]
    assert batch.scores.tolist() == [5.0, 3.0]


def test_remax_expects_what_the_greedy_answer_gets() -> None:
    samples = answered([[1, END], [1, 2, 3, END]], [True, True], n=2)
    greedy = answered([[1, 2, END]], [True])
    row = replace(ALGORITHMS["remax"], kl_coefficient=0.0)
    batch = roll(samples, LENGTH, row, greedy=lambda prompts: greedy).batch
    assert batch.advantages[:, 2].tolist() == [3 - 5, 7 - 5]
    cut = replace(greedy, finished=torch.tensor([False]))
    punished = roll(samples, LENGTH, replace(row, unfinished_score=-1.0), greedy=lambda prompts: cut).batch
    assert punished.advantages[:, 2].tolist() == [3 + 1, 7 + 1]


def test_ema_expects_what_earlier_rollouts_got() -> None:
    samples = answered([[1, END], [1, 2, 3, END]], [True, True])
    row = replace(ALGORITHMS["reinforce"], advantage="ema", kl_coefficient=0.0)
    history = History(FixedCoefficient(0.0))
    first, second = (roll(samples, LENGTH, row, history).batch.advantages[:, 2].tolist() for _ in range(2))
    assert (first, second) == ([3, 7], [-2, 2])


def test_scores_are_shaped_by_their_history_before_they_are_credited() -> None:
    samples = answered([[1, END], [1, 2, 3, END]], [True, True])
    row = replace(REWARDS_THEMSELVES, kl_coefficient=0.0, score_shape="normalized", score_arguments=("clip=0.5",))
    assert roll(samples, LENGTH, row, critic=zeros).batch.advantages.sum(-1).tolist() == [-0.5, 0.5]


def test_groups_compare_shaped_scores() -> None:
    samples = answered([[1, 2, 3], [1, END]], [False, True], n=2)
    row = replace(ALGORITHMS["rloo"], kl_coefficient=0.0, unfinished_score=-1.0, score_arguments=("clip=2",))
    batch = roll(samples, LENGTH, row).batch
    assert batch.advantages[:, 2].tolist() == [-1.0 - 2.0, 2.0 + 1.0] and batch.scores.tolist() == [5.0, 3.0]


def test_answers_that_are_used_again_have_the_log_probabilities_of_training() -> None:
    samples = answered([[1, 2, END], [3, END]], [True, True], n=2)

    def otherwise(tokens: Tokens) -> Tensor:
        return torch.where(tokens.response_mask, -1.5, 0.0)

    mask = samples.tokens.response_mask
    for name, expected in {"ppo": -1.5, "rloo": -1.0}.items():
        found = roll(samples, LENGTH, ALGORITHMS[name], policy=otherwise, critic=zeros if name == "ppo" else None)
        assert torch.equal(found.batch.old_logprobs, torch.where(mask, expected, 0))
        assert torch.equal(found.batch.sampled_logprobs, samples.sampled_logprobs)


@pytest.mark.parametrize("name", ["rloo", "ppo"])
def test_the_gap_is_between_training_and_sampling_of_the_policy_that_drew(name: str) -> None:
    objective, batch = objective_of(ALGORITHMS[name], max_new_tokens=5), bigram.drawn()
    policy = Bigram(1)
    with torch.no_grad():
        _, metrics = objective.loss(objective.outputs(policy, batch), batch)
        old = policy.logprobs(batch.tokens) if name == "rloo" else batch.old_logprobs
    expected = (old - batch.sampled_logprobs)[batch.mask].abs().mean().item()
    assert metrics["logprob_gap"].item() == pytest.approx(expected) and expected > 0.1


def only(*kept: int) -> RuleReward:
    """A reward that counts characters, of the answers at some places of its calls; None for the others."""
    asked: list[int] = []

    def rule(prompt: Prompt, answer: Answer) -> float | None:
        asked.append(0)
        return float(len(answer.text)) if len(asked) - 1 in kept else None

    return RuleReward("picky", rule)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_answer_without_reward_counts_for_nothing(name: str) -> None:
    rows = [[1, END], [1, 2, 3, END], [9, 9, 9, 9], [2, END], [3, 4, END], [1, 1, 1, 1]]
    samples = answered(rows, [True, True, False, True, True, False], n=3)
    row = replace(ALGORITHMS[name], kl_coefficient=0.0)
    critic = zeros if row.critic else None
    greedy = answered([[1, END], [2, END]], [True, True])
    found = roll(samples, only(0, 1, 3, 4, *range(6, 9)), row, critic=critic, greedy=lambda prompts: greedy)
    assert found.batch.weights.tolist() == [1, 1, 0, 1, 1, 0] and not found.batch.mask[2].any()
    assert not found.batch.advantages[2].any() and not found.batch.returns[2].any()
    kept = torch.tensor([0, 1, 3, 4])
    alone = answered([rows[i] for i in kept], [True] * 4, n=2)
    expected = roll(alone, LENGTH, row, critic=critic, greedy=lambda prompts: greedy).batch.advantages
    torch.testing.assert_close(found.batch.advantages[kept][:, : expected.shape[1]], expected)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_rollout_without_any_reward_is_passed_over_and_changes_nothing(name: str) -> None:
    row = ALGORITHMS[name]
    samples = answered([[1, END], [1, 2, 3, END], [9, 9], [2, END]], [True, True, False, True], n=2)
    critic, told = zeros if row.critic else None, []
    count = 4 + 2 * (row.advantage == "remax")  # remax asks about a greedy answer to each prompt as well
    greedy = answered([[1, END], [2, END]], [True, True])
    stages = stages_around(samples, only(*range(count, 2 * count)), critic=critic, greedy=lambda prompts: greedy)
    history = History(AdaptiveCoefficient(0.1), KlBudget(9.0))
    start = asdict(history)

    def watch(account: Account) -> None:
        told.append((account, asdict(history)))

    asked = iter([samples.prompts] * 3)
    batches = list(policy_batches(asked, stages, row, history, group_size=2, seed=0, watch=watch))
    first, kept = told[0]
    assert ["none of 4 answers has a score" in text for text in first.warnings].count(True) == 1
    assert not first.batch.mask.any() and kept["health"]["seen"]["unscored"] == 1
    assert {**kept, "health": 0, "rollouts": 0} == {**start, "health": 0, "rollouts": 0} and kept["rollouts"] == 1
    assert kept["health"]["usual_kl"] is None
    assert len(batches) == row.epochs * min(row.minibatches, 2) and all(batch.mask.any() for batch in batches)
    assert (history.rollouts, history.scored, history.health.seen["unscored"]) == (3, 1, 2)


def test_a_run_without_any_score_ends_with_the_reward_named() -> None:
    samples, watched = answered([[1, END], [2, END]], [True, True]), []
    for asked, rollouts in ((3, 3), (99, PATIENCE)):
        history = History(FixedCoefficient(0.0))
        stages = stages_around(samples, only())
        batches = policy_batches(
            iter([samples.prompts] * asked),
            stages,
            ALGORITHMS["reinforce"],
            history,
            group_size=1,
            seed=0,
            watch=watched.append,
        )
        with pytest.raises(ValueError, match=f"picky gave None for every answer of {rollouts} rollouts"):
            list(batches)
        assert history.rollouts == rollouts
    assert len(watched) == 3 + PATIENCE, "each was seen"


def test_the_parts_of_a_mixture_are_asked_once_and_kept() -> None:
    asked: list[str] = []

    def rule(prompt: Prompt, answer: Answer) -> float:
        asked.append(answer.text)
        return 1.0

    samples = answered([[1, END], [2, 3, END]], [True, True])
    scored = score(mixture([LENGTH, RuleReward("one", rule)], [2.0, 10.0]), samples)
    assert scored.rewards == [2 * 3 + 10, 2 * 5 + 10]
    assert scored.parts == {"length": [3.0, 5.0], "one": [1.0, 1.0]} and len(asked) == 2


# ---- Values


def scalar(seed: int = 0) -> ScalarModel:
    policy = tiny_policy(seed)
    return make_scalar(classifier_from(policy.model, seed=seed), policy.tokenizer, dtype="float32", device="cpu")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_value_is_read_before_its_token(side: Literal["left", "right"]) -> None:
    critic = scalar()
    rows = [Row([1, 2, 3, 4, 5], [False, False, True, True, True]), Row([6, 7, 8], [False, True, True])]
    tokens = pad(rows, critic.pad_id, side=side)
    with torch.no_grad():
        after, before = critic.values(tokens), values_before(critic, tokens)
    assert torch.equal(before != 0, tokens.response_mask)
    shifted = torch.where(tokens.response_mask, after.roll(1, dims=1), 0)
    assert torch.equal(before, shifted)


# ---- A step


def learner_of(model: Any, row: Algorithm, lr: float = 1e-3, critic_lr: float = 1e-2, **options: Any) -> Learner:
    others = [(model.critic.trainable_parameters(), critic_lr)] if isinstance(model, PolicyWithCritic) else []
    optimizer = make_optimizer(model.trainable_parameters(), lr=lr, weight_decay=0.0, others=others)
    schedule = make_schedule(optimizer, kind="constant", warmup_steps=0, steps=1)
    return Learner(model, objective_of(row, max_new_tokens=8), optimizer, schedule, micro_batch_rows=8, **options)


def real_stages(policy: Policy, critic: ScalarModel | None, reward: Any, tokens: int = 8, seed: int = 0) -> Stages:
    temperature = policy.module.temperature
    draw = partial(sample, policy, max_new_tokens=tokens, temperature=temperature)
    reference = policy.reference()
    return Stages(
        draw=lambda prompts, n, *, step: draw(prompts, n, seed=derived_seed(seed, step)),
        greedy=lambda prompts: sample(policy, prompts, max_new_tokens=tokens, temperature=0.0),
        reward=reward,
        reference=reference.logprobs,
        policy=policy.logprobs,
        critic=partial(values_before, critic) if critic else None,
        exact_kl=partial(policy.kl, reference=reference),
    )


def batches_of(stages: Stages, row: Algorithm, history: History | None = None, rollouts: int = 3, **options: Any):
    history = history or History(FixedCoefficient(row.kl_coefficient))
    asked = iter([PROMPTS] * rollouts)
    return policy_batches(asked, stages, row, history, group_size=2, seed=0, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", ["rloo", "grpo", "ppo", "gspo"])
def test_the_first_step_finds_kl_0_and_ratio_1(name: str, lora_rank: int, temperature: float) -> None:
    policy, row = tiny_policy(lora_rank=lora_rank), ALGORITHMS[name]
    policy.module.temperature = temperature
    critic = scalar() if row.critic else None
    learner = learner_of(PolicyWithCritic(policy, critic) if critic else policy, row)
    told: list[Account] = []
    batches = batches_of(real_stages(policy, critic, LENGTH), row, watch=told.append)
    first = learner.step(next(batches))
    assert abs(first["kl"]) < 1e-4 and abs(first["kl_per_token"]) < 1e-5
    assert abs(first["ratio"] - 1) < 1e-5 and first["ratio_spread"] < 1e-9 and abs(first["old_kl"]) < 1e-6
    assert first["logprob_gap"] < 1e-4 and abs(told[0].rollouts.mean_kl) < 1e-4
    assert first.get("clip_fraction", 0) == 0 and first["grad_norm"] > 0
    later = learner.step(next(batches))
    assert abs(later["kl"]) > 1e-3, "the policy has moved, and the reference has not"
    assert later["logprob_gap"] < 1e-4, "sampling and training still agree on the policy that drew the answers"
    if row.updates > 1:
        assert abs(later["ratio"] - 1) > 1e-6


def test_entropy_and_logprobs_are_those_of_the_temperature_that_sampled() -> None:
    policy = tiny_policy()
    cold, hot = (entropy_of(policy, temperature) for temperature in (0.3, 3.0))
    assert cold < 4 < hot


def entropy_of(policy: Policy, temperature: float) -> float:
    policy.module.temperature = temperature
    row = ALGORITHMS["rloo"]
    return learner_of(policy, row, lr=0.0).step(next(batches_of(real_stages(policy, None, LENGTH), row)))["entropy"]


def widened(batch: PolicyBatch) -> PolicyBatch:
    """The batch with padding on both sides, full of numbers that are none."""
    changes: dict[str, Any] = {}
    for entry in fields(batch):
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor) and value.dim() == 2:
            outside = torch.where(batch.mask, value, float("nan"))
            changes[entry.name] = pad_columns(outside, (3, 2), value=float("nan"))
    masks = {name: pad_columns(getattr(batch.tokens, name), (3, 2)) for name in ("attention_mask", "response_mask")}
    return replace(batch, tokens=Tokens(pad_columns(batch.tokens.ids, (3, 2)), **masks), **changes)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_padding_changes_no_figure_and_no_gradient(name: str) -> None:
    objective, batch = objective_of(ALGORITHMS[name], max_new_tokens=5), bigram.drawn()
    results = []
    for given in (batch, widened(batch)):
        model = Bigram(1)
        loss, metrics = objective.loss(objective.outputs(model, given), given)
        loss.total.backward()
        results.append((loss.item(), {key: mean.item() for key, mean in metrics.items()}, model.logits.grad))
    (loss, figures, gradient), (wide_loss, wide_figures, wide_gradient) = results
    assert wide_loss == pytest.approx(loss, rel=1e-6) and math.isfinite(loss)
    assert wide_figures == pytest.approx(figures, rel=1e-6)
    torch.testing.assert_close(wide_gradient, gradient)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_order_of_minibatches_changes_no_gradient_at_ratio_1(name: str) -> None:
    row = replace(ALGORITHMS[name], epochs=1, minibatches=1)
    objective, batch = objective_of(row, max_new_tokens=5), bigram.drawn(distance=0.0)
    batch = replace(batch, advantages=bigram.drawn().advantages)

    def gradient(parts: Sequence[PolicyBatch]) -> Tensor:
        model = Bigram(1)
        for part in parts:
            loss, _ = objective.loss(objective.outputs(model, part), part)
            loss.total.backward()
        assert model.logits.grad is not None
        return model.logits.grad

    whole = gradient([batch])
    for seed in (1, 2):
        parts = list(minibatches(batch, 3, seed=seed))
        assert len(parts) == 3 and sum(part.size for part in parts) == batch.size
        torch.testing.assert_close(gradient(parts), whole, atol=1e-6, rtol=1e-5)
    assert not torch.equal(parts[0].scores, next(iter(minibatches(batch, 3, seed=1))).scores)


def test_a_minibatch_without_any_score_is_left_out() -> None:
    batch = bigram.drawn()
    weights = torch.zeros(16)
    weights[6:8] = 1
    parts = list(minibatches(replace(batch, weights=weights), 4, seed=0))
    assert len(parts) == 1 and parts[0].mask.any()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_only_the_critic_learns_at_first(lora_rank: int) -> None:
    row = replace(ALGORITHMS["ppo"], epochs=1)
    policy, critic = tiny_policy(lora_rank=lora_rank), scalar()
    learner = learner_of(PolicyWithCritic(policy, critic), row)
    for group in learner.optimizer.param_groups:
        group["weight_decay"] = 0.1
    weights = policy.trainable_parameters()
    batches = critic_first(batches_of(real_stages(policy, critic, LENGTH), row), weights, 2)
    before, seen = [weight.detach().clone() for weight in weights], []
    for batch in batches:
        worth = [weight.detach().clone() for weight in critic.trainable_parameters()]
        learner.step(batch)
        seen.append(all(map(torch.equal, weights, before)))
        assert not all(map(torch.equal, critic.trainable_parameters(), worth))
    assert seen == [True, True, False]


# ---- Time


@pytest.mark.parametrize(("epochs", "parts"), [(1, 1), (2, 2)])
def test_every_draw_sees_the_policy_as_the_last_step_left_it(epochs: int, parts: int, tmp_path: Path) -> None:
    row = replace(ALGORITHMS["grpo"], epochs=epochs, minibatches=parts)
    policy, updates, versions = tiny_policy(), [0], []
    stages = real_stages(policy, None, LENGTH, tokens=3)
    learner = learner_of(policy, row)
    step = learner.step

    def counted(batch: Any) -> dict[str, float]:
        updates[0] += 1
        return step(batch)

    def draw(prompts: Sequence[Prompt], n: int, *, step: int) -> Samples:
        versions.append(updates[0])
        return stages.draw(prompts, n, step=step)

    learner.step = counted  # pyright: ignore[reportAttributeAccessIssue]
    batches = batches_of(replace(stages, draw=draw), row, rollouts=10)
    run = Run.create(tmp_path / "run", config={}, seed=0)
    run.train(learner, batches, steps=3 * epochs * parts)
    assert versions == [rollout * epochs * parts for rollout in range(3)]
    assert run.step == 3 * epochs * parts


def test_a_run_goes_on_from_its_history_as_if_it_had_not_stopped() -> None:
    row = ALGORITHMS["ppo_max"]
    policy, critic = tiny_policy(), scalar()
    stages = real_stages(policy, critic, LENGTH, tokens=4)
    whole = History(AdaptiveCoefficient(0.1, target=1.0, horizon=50), KlBudget(100.0))
    told: list[Account] = []
    list(batches_of(stages, row, whole, rollouts=3, watch=told.append))
    half = History(AdaptiveCoefficient(0.1, target=1.0, horizon=50), KlBudget(100.0))
    list(batches_of(stages, row, half, rollouts=2))
    stored = json.loads(json.dumps(asdict(half)))
    kinds = {entry.name: type(getattr(half, entry.name)) for entry in fields(half)}
    made = {name: kinds[name](**value) if isinstance(value, dict) else value for name, value in stored.items()}
    again = History(**made)
    resumed: list[Account] = []
    list(batches_of(stages, row, again, rollouts=1, watch=resumed.append))
    assert asdict(again) == asdict(whole) and again.rollouts == 3 and isinstance(again.health, Health)
    assert resumed[0].scored.samples.texts == told[2].scored.samples.texts != told[1].scored.samples.texts
    assert torch.equal(resumed[0].batch.advantages, told[2].batch.advantages)


def test_a_spent_budget_ends_the_batches_before_another_update() -> None:
    row = ALGORITHMS["rloo"]
    samples = answered([[1, 2, END], [3, END]], [True, True], n=2)
    distance = [0.0]

    def behind(tokens: Tokens) -> Tensor:
        return samples.sampled_logprobs - torch.where(tokens.response_mask, distance[0], 0.0)

    history = History(FixedCoefficient(0.0), KlBudget(4.0))
    told: list[tuple[float, bool, bool]] = []

    def watch(account: Account) -> None:
        assert history.budget is not None
        told.append((account.rollouts.mean_kl, history.budget.should_warn, history.may_go_on))

    stages = stages_around(samples, LENGTH, reference=behind)
    updates = []
    for batch in policy_batches(iter([PROMPTS] * 9), stages, row, history, group_size=2, seed=0, watch=watch):
        updates.append(batch)
        distance[0] += 0.45
    # 2.5 tokens an answer: 0, 1.125, 2.25, 3.375, 4.5 nats.
    assert len(updates) == 4 and [kl for kl, *_ in told] == pytest.approx([0, 1.125, 2.25, 3.375, 4.5])
    assert [near for _, near, _ in told] == [False, False, False, True, False]
    assert [going for *_, going in told] == [True, True, True, True, False]
