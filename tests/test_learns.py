"""Every method learns something small in seconds, on the built-in tiny model."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from trimtab.algorithms import ALGORITHMS, Algorithm
from trimtab.batches import Referenced, move
from trimtab.builtin import tiny_policy
from trimtab.critic import PolicyWithCritic, values_before
from trimtab.judges import JudgedReward, RuleJudge
from trimtab.kl import AdaptiveCoefficient, FixedCoefficient
from trimtab.learner import Learner, make_optimizer, make_schedule
from trimtab.losses.arguments import combine
from trimtab.losses.preference import ALL_LOSSES, REFERENCE_FREE
from trimtab.losses.reward import RANKING_LOSSES, REWARD_LOSSES
from trimtab.losses.unpaired import UNPAIRED_LOSSES
from trimtab.models import Policy, load_scalar, make_scalar
from trimtab.objectives import (
    DemonstrationObjective,
    FeedbackObjective,
    FreshObjective,
    PreferenceObjective,
    RankingObjective,
    RewardObjective,
)
from trimtab.recipes.algorithm import objective_of
from trimtab.records import Demonstration, Feedback, Preference, Prompt, Ranking
from trimtab.rewards import RuleReward
from trimtab.rollouts import Account, History, Stages, policy_batches
from trimtab.sampling import sample
from trimtab.selection import above, best, best_and_worst, chosen_demonstrations, chosen_pairs, fresh_batches
from trimtab.tokens import (
    demonstration_batch,
    encode,
    encode_feedback,
    feedback_batch,
    pad,
    pair_batch,
    ranking_batch,
)
from trimtab.weights import classifier_from

ARMS = "abcd"
PULL = Prompt.from_user("Pull one: a, b, c or d?")


def make_learner(model: Any, objective: Any, *, lr: float) -> Learner:
    optimizer = make_optimizer(model.trainable_parameters(), lr=lr, weight_decay=0.0)
    schedule = make_schedule(optimizer, kind="constant", warmup_steps=0, steps=1)
    return Learner(model, objective, optimizer, schedule, micro_batch_rows=64)


def arm_probabilities(policy: Policy) -> dict[str, float]:
    """The policy's probabilities of answering with one arm and nothing else."""
    items, _ = encode(policy.tokenizer, [Demonstration(PULL, arm) for arm in ARMS], max_length=200)
    with torch.no_grad():
        logprobs = policy.logprobs(pad([item.rows[0] for item in items], policy.pad_id)).sum(-1)
    return dict(zip(ARMS, logprobs.exp().tolist(), strict=True))


def knows_the_arms(policy: Policy) -> Policy:
    """The tiny model after it learned to answer with any of the arms: the reference of the bandit."""
    items, _ = encode(policy.tokenizer, [Demonstration(PULL, arm) for arm in ARMS], max_length=200)
    learner = make_learner(policy, DemonstrationObjective(), lr=3e-3)
    for _ in range(60):
        learner.step(demonstration_batch(items, policy.pad_id))
    assert sum(arm_probabilities(policy).values()) > 0.9
    return policy


@pytest.fixture(scope="module")
def bandit_weights() -> dict[str, torch.Tensor]:
    return knows_the_arms(tiny_policy(seed=0)).model.state_dict()


@pytest.fixture
def bandit(bandit_weights: dict[str, torch.Tensor]) -> Policy:
    policy = tiny_policy(seed=0)
    policy.model.load_state_dict(bandit_weights)
    return policy


def referenced(policy: Policy, batch: Any) -> Referenced:
    with torch.no_grad():
        return Referenced(batch, policy.logprobs(move(batch.tokens, policy.device)))


# Arm a is worth 3, b 2, c 1, d 0: the better arm is always the preferred one.
ARM_PAIRS = [Preference(PULL, better, worse) for better, worse in itertools.combinations(ARMS, 2)]


# DiscoPOP with its published tau is uphill where policy and reference agree (docs/methods/preference_losses.md).
ARGUMENTS = {"discopop": ["tau=1"]}


@pytest.mark.parametrize("loss", sorted(ALL_LOSSES))
def test_preference_losses_solve_a_bandit(loss: str, bandit: Policy) -> None:
    items, _ = encode(bandit.tokenizer, ARM_PAIRS, max_length=200)
    batch = referenced(bandit, pair_batch(items, bandit.pad_id))
    before = arm_probabilities(bandit)
    learner = make_learner(bandit, PreferenceObjective(combine(ALL_LOSSES, loss, ARGUMENTS.get(loss, []))), lr=1e-3)
    for _ in range(40):
        figures = learner.step(batch)
    after = arm_probabilities(bandit)
    assert figures["accuracy"] == 1.0
    assert after["a"] / after["d"] > 3 * before["a"] / before["d"]
    if loss not in REFERENCE_FREE:
        assert math.isfinite(figures["margin"]) and figures["margin"] > 0


@pytest.mark.parametrize("loss", sorted(UNPAIRED_LOSSES))
def test_unpaired_losses_solve_a_bandit(loss: str, bandit: Policy) -> None:
    records = [Feedback(PULL, arm, arm in "ab") for arm in ARMS for _ in range(2)]
    items, _ = encode_feedback(bandit.tokenizer, records, seed=0, max_length=200)
    batch = referenced(bandit, feedback_batch(items, bandit.pad_id))
    learner = make_learner(bandit, FeedbackObjective(combine(UNPAIRED_LOSSES, loss, ["beta=0.1"])), lr=1e-3)
    for _ in range(40):
        learner.step(batch)
    after = arm_probabilities(bandit)
    assert after["a"] + after["b"] > 0.9


def letters(count: int, seed: int) -> list[tuple[str, int]]:
    """Random words of x and o with their number of x: a planted reward."""
    draws = random.Random(seed)
    words = ["".join(draws.choice("xo") for _ in range(6)) for _ in range(count)]
    return [(word, word.count("x")) for word in words]


def planted_pairs(count: int, seed: int) -> list[Preference]:
    words = letters(4 * count, seed)
    found = [(max(two, key=lambda w: w[1]), min(two, key=lambda w: w[1])) for two in itertools.pairwise(words)]
    return [Preference(PULL, good[0], bad[0]) for good, bad in found if good[1] > bad[1]][:count]


def planted_rankings(count: int, seed: int) -> list[Ranking]:
    rankings = []
    for i in range(count):
        words = {worth: word for word, worth in letters(5, seed + i)}
        ordered = tuple(words[worth] for worth in sorted(words, reverse=True))
        if len(ordered) > 1:
            rankings.append(Ranking(PULL, ordered))
    return rankings


def accuracy_on(model: Any, pairs: Sequence[Preference]) -> float:
    items, _ = encode(model.tokenizer, pairs, max_length=200)
    with torch.no_grad():
        scores = model.scores(pair_batch(items, model.pad_id).tokens)
    chosen, rejected = scores.view(-1, 2).unbind(-1)
    return (chosen > rejected).float().mean().item()


def train_reward(objective: Any, records: Sequence[Any], collate: Callable[..., Any]) -> Any:
    model = load_scalar("tiny", new_head=True, seed=0, dtype="float32", device="cpu")
    items, _ = encode(model.tokenizer, records, max_length=200)
    learner = make_learner(model, objective, lr=2e-3)
    for start in range(0, 25 * 16, 16):
        chosen = [items[i % len(items)] for i in range(start, start + 16)]
        learner.step(collate(chosen, model.pad_id))
    return model


@pytest.mark.parametrize("loss", sorted(REWARD_LOSSES))
def test_a_reward_model_learns_a_planted_preference(loss: str) -> None:
    model = train_reward(RewardObjective(combine(REWARD_LOSSES, loss)), planted_pairs(200, seed=1), pair_batch)
    assert accuracy_on(model, planted_pairs(100, seed=2)) > 0.85


@pytest.mark.parametrize("loss", sorted(RANKING_LOSSES))
def test_a_reward_model_learns_from_rankings(loss: str) -> None:
    model = train_reward(RankingObjective(combine(RANKING_LOSSES, loss)), planted_rankings(100, seed=1), ranking_batch)
    assert accuracy_on(model, planted_pairs(100, seed=2)) > 0.8


def test_sft_repeats_three_sentences_and_stops() -> None:
    policy = tiny_policy(seed=0)
    wanted = {"one?": "The sea is calm.", "two?": "A gull cries.", "three?": "We turn for home."}
    records = [Demonstration(Prompt.from_user(question), answer) for question, answer in wanted.items()]
    items, _ = encode(policy.tokenizer, records, max_length=200)
    learner = make_learner(policy, DemonstrationObjective(), lr=5e-3)
    for _ in range(150):
        learner.step(demonstration_batch(items, policy.pad_id))
    samples = sample(policy, [record.prompt for record in records], 1, max_new_tokens=40, temperature=0.0)
    assert samples.texts == list(wanted.values())
    assert bool(samples.finished.all())


# ---- Online RL

WORTH = {"a": 3.0, "b": 2.0, "c": 1.0}
ARM_REWARD = RuleReward("arms", lambda prompt, answer: WORTH.get(answer.text, 0.0))


def expected_worth(policy: Policy) -> float:
    """The expected reward of an answer to `PULL`, exactly: whatever is no arm is worth nothing."""
    return sum(WORTH.get(arm, 0.0) * chance for arm, chance in arm_probabilities(policy).items())


@dataclass
class Online:
    """Online RL on a policy: a learner, its lazy batches, and the accounts of all rollouts."""

    learner: Learner
    batches: Iterator[Any]
    told: list[Account]


def online(
    policy: Policy,
    row: Algorithm,
    reward: RuleReward,
    prompts: Sequence[Prompt],
    history: History | None = None,
    *,
    lr: float = 1e-3,
    group_size: int = 4,
    critic_lr: float = 1e-2,
) -> Online:
    """What a recipe wires, by hand, on the tiny model."""
    critic = None
    if row.critic:
        network = classifier_from(tiny_policy(0).model, seed=0)
        critic = make_scalar(network, policy.tokenizer, dtype="float32", device="cpu")
        critic.scale_by(0.0)
    reference = policy.reference()
    stages = Stages(
        draw=lambda prompts, n, *, step: sample(policy, prompts, n, max_new_tokens=3, seed=step),
        greedy=lambda some: sample(policy, some, max_new_tokens=3, temperature=0.0),
        reward=reward,
        reference=reference.logprobs,
        policy=policy.logprobs,
        critic=partial(values_before, critic) if critic else None,
        max_rows=64,
    )
    told: list[Account] = []
    history = history or History(FixedCoefficient(row.kl_coefficient))
    asked = itertools.repeat(prompts)
    batches = policy_batches(asked, stages, row, history, group_size=group_size, seed=0, watch=told.append)
    others = [(critic.trainable_parameters(), critic_lr)] if critic else []
    optimizer = make_optimizer(policy.trainable_parameters(), lr=lr, weight_decay=0.0, others=others)
    schedule = make_schedule(optimizer, kind="constant", warmup_steps=0, steps=1)
    model = PolicyWithCritic(policy, critic) if critic else policy
    learner = Learner(model, objective_of(row, max_new_tokens=3), optimizer, schedule, micro_batch_rows=64)
    return Online(learner, batches, told)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_online_algorithms_solve_a_bandit(name: str, bandit: Policy) -> None:
    row = ALGORITHMS[name]
    run = online(bandit, row, ARM_REWARD, [PULL] * 16)
    before = expected_worth(bandit)
    for batch in itertools.islice(run.batches, 24):
        run.learner.step(batch)
    assert expected_worth(bandit) > before + 0.7
    assert run.told[-1].rollouts.scores.mean() > run.told[0].rollouts.scores.mean()


def test_a_critic_learns_to_foresee_the_reward(bandit: Policy) -> None:
    """What an answer is worth depends on the prompt more than on the arm; the critic can read both."""
    questions = {Prompt.from_user(f"Pull {n}"): 4.0 * n for n in range(4)}
    reward = RuleReward("prompts", lambda prompt, answer: questions[prompt] + WORTH.get(answer.text, 0.0))
    run = online(bandit, ALGORITHMS["ppo"], reward, list(questions), lr=1e-4)
    for batch in itertools.islice(run.batches, 100):
        figures = run.learner.step(batch)
    foreseen = [account.explained_variance for account in run.told]
    assert foreseen[0] == pytest.approx(0, abs=1e-6), "a head of zeros foresees nothing"
    assert min(foreseen[-5:]) > 0.5
    assert figures["value_loss"] < 2


def test_an_adaptive_price_holds_kl_at_its_target(bandit: Policy) -> None:
    """Ziegler's controller, in a run so short that its horizon has to be short as well."""
    row = replace(ALGORITHMS["rloo"], kl_coefficient=0.5)
    target = 0.5
    history = History(AdaptiveCoefficient(0.5, target=target, horizon=200))
    run = online(bandit, row, ARM_REWARD, [PULL] * 8, history, lr=3e-4)
    for batch in itertools.islice(run.batches, 160):
        run.learner.step(batch)
    kl = [account.rollouts.mean_kl for account in run.told]
    last = kl[-40:]
    assert sum(last) / len(last) == pytest.approx(target, rel=0.15)
    assert history.coefficient.value != 0.5


# ---- Some of the answers drawn


def learn_from_some(
    policy: Policy, reward: Any, pick: Any, collect: Any, objective: Any, *, lr: float = 1e-3, group_size: int = 2
) -> list[dict[str, float]]:
    """Forty steps on answers to `PULL`, eight groups each; the figures of every step."""
    reference = policy.reference()
    stages = Stages(
        draw=lambda prompts, n, *, step: sample(policy, prompts, n, max_new_tokens=3, seed=step),
        greedy=lambda prompts: sample(policy, prompts, max_new_tokens=3, temperature=0.0),
        reward=reward,
        reference=reference.logprobs,
        policy=policy.logprobs,
        max_rows=64,
    )
    learner = make_learner(policy, FreshObjective(objective), lr=lr)
    batches = fresh_batches(itertools.repeat([PULL] * 8, 60), stages, pick, collect, group_size=group_size)
    return [learner.step(batch) for batch in itertools.islice(batches, 40)]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "aot", "ld_dpo", "wpo", "dpo+0.2*preferred_ft"])
@pytest.mark.parametrize("group_size", [2, 4])
def test_online_dpo_solves_a_bandit(loss: str, group_size: int, bandit: Policy) -> None:
    before, objective = expected_worth(bandit), PreferenceObjective(combine(ALL_LOSSES, loss))
    figures = learn_from_some(bandit, ARM_REWARD, best_and_worst, chosen_pairs, objective, group_size=group_size)
    assert expected_worth(bandit) > before + 0.7
    assert figures[-1]["reward"] > figures[0]["reward"] and figures[-1]["kl"] > 0.05


def test_online_dpo_learns_what_a_judge_prefers(bandit: Policy) -> None:
    judge = JudgedReward(RuleJudge("rule:arms", ARM_REWARD))
    before, objective = expected_worth(bandit), PreferenceObjective(combine(ALL_LOSSES, "dpo"))
    learn_from_some(bandit, judge, best_and_worst, chosen_pairs, objective)
    assert expected_worth(bandit) > before + 0.7


@pytest.mark.parametrize("pick", [best, partial(above, threshold=1.5)])
def test_raft_solves_a_bandit(pick: Any, bandit: Policy) -> None:
    before = expected_worth(bandit)
    learn_from_some(bandit, ARM_REWARD, pick, chosen_demonstrations, DemonstrationObjective(), group_size=4)
    assert expected_worth(bandit) > before + 0.7
    assert arm_probabilities(bandit)["d"] < 0.1
