"""A step's gradient is that of the whole batch, however the batch is cut; and what a step must refuse."""

from typing import Any

import pytest
import torch

from tests import bigram
from tests.bigram import Bigram
from trimtab.algorithms import ALGORITHMS
from trimtab.batches import Mean
from trimtab.learner import Learner, make_optimizer, make_schedule
from trimtab.losses.arguments import combine
from trimtab.losses.preference import ALL_LOSSES
from trimtab.losses.reward import RANKING_LOSSES, REWARD_LOSSES
from trimtab.losses.unpaired import UNPAIRED_LOSSES
from trimtab.objectives import (
    DemonstrationObjective,
    FeedbackObjective,
    MixedObjective,
    PreferenceObjective,
    RankingObjective,
    RewardObjective,
    mixed,
)
from trimtab.recipes.algorithm import objective_of

PPO = objective_of(ALGORITHMS["ppo"], max_new_tokens=5)

CASES: dict[str, tuple[Any, Any]] = {
    "sft": (DemonstrationObjective(), bigram.demonstrations()),
    "soft labels": (PreferenceObjective(combine(ALL_LOSSES, "dpo")), bigram.pairs(confidence=0.8)),
    "soft labels across": (PreferenceObjective(combine(ALL_LOSSES, "aot")), bigram.pairs(confidence=0.8)),
    "a sum": (PreferenceObjective(combine(ALL_LOSSES, "dpo+0.5*aot+0.2*preferred_ft")), bigram.pairs()),
    **{name: (PreferenceObjective(combine(ALL_LOSSES, name)), bigram.pairs()) for name in ALL_LOSSES},
    **{name: (FeedbackObjective(combine(UNPAIRED_LOSSES, name)), bigram.feedback()) for name in UNPAIRED_LOSSES},
    **{
        f"reward {name}": (RewardObjective(combine(REWARD_LOSSES, name)), bigram.pairs().batch)
        for name in REWARD_LOSSES
    },
    **{name: (RankingObjective(combine(RANKING_LOSSES, name)), bigram.rankings()) for name in RANKING_LOSSES},
    **{f"rl {name}": (objective_of(row, max_new_tokens=5), bigram.drawn()) for name, row in ALGORITHMS.items()},
    "rl with demonstrations": (MixedObjective(PPO), mixed(bigram.drawn(), bigram.demonstrations(), PPO, 0.7)),
}


def make_learner(objective: Any, micro_batch_rows: int, *, lr: float = 0.0, model: Any = None) -> Learner:
    model = model or Bigram(seed=1)
    optimizer = make_optimizer(model.trainable_parameters(), lr=lr, weight_decay=0.0)
    schedule = make_schedule(optimizer, kind="constant", warmup_steps=0, steps=10)
    return Learner(model, objective, optimizer, schedule, micro_batch_rows, max_grad_norm=0)


def step(name: str, micro_batch_rows: int) -> tuple[dict[str, float], torch.Tensor]:
    """The figures and the gradient of one step, the weights unchanged."""
    objective, batch = CASES[name]
    learner = make_learner(objective, micro_batch_rows)
    figures = learner.step(batch)
    return figures, torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])


@pytest.mark.parametrize("name", CASES)
def test_gradient_does_not_depend_on_micro_batches(name: str) -> None:
    whole_figures, whole = step(name, 1000)
    assert whole.abs().sum() > 0
    for rows in (8, 4, 1):
        figures, gradient = step(name, rows)
        scale = max(1.0, whole.abs().max().item())
        assert (gradient - whole).abs().max().item() <= 1e-6 * scale
        assert figures == pytest.approx(whole_figures, rel=1e-5, abs=1e-6)


def test_gradient_of_a_step_is_the_gradient_of_the_mean() -> None:
    objective, batch = CASES["dpo"]
    model = Bigram(seed=1)
    loss, _ = objective.loss(objective.outputs(model, batch), batch)
    (loss.total / loss.count).backward()
    assert model.logits.grad is not None
    assert torch.allclose(model.logits.grad.flatten(), step("dpo", 4)[1], atol=1e-7)


@pytest.mark.parametrize("name", ["sft", "aot", "kto", "reward bradley_terry"])
def test_evaluation_equals_the_figures_of_a_step(name: str) -> None:
    objective, batch = CASES[name]
    loss, metrics = make_learner(objective, 4).evaluate([batch])
    figures, _ = step(name, 1000)
    assert loss.item() == pytest.approx(figures["loss"], rel=1e-5)
    assert {key: mean.item() for key, mean in metrics.items()} == pytest.approx(
        {key: figures[key] for key in metrics}, rel=1e-5
    )


def test_evaluation_weighs_batches_by_what_they_hold() -> None:
    objective, batch = CASES["sft"]
    parts = [batch.select(torch.arange(3)), batch.select(torch.arange(3, 8))]
    together, apart = (make_learner(objective, 4).evaluate(batches)[0].item() for batches in ([batch], parts))
    assert apart == pytest.approx(together, rel=1e-5)


def test_nothing_moves_when_the_loss_is_not_finite() -> None:
    objective, batch = CASES["sft"]
    model = Bigram(seed=1)
    with torch.no_grad():
        model.logits[0, 0] = float("nan")
    before = model.logits.detach().clone()
    with pytest.raises(FloatingPointError, match="loss is nan"):
        make_learner(objective, 8, lr=0.1, model=model).step(batch)
    assert torch.equal(model.logits, before.nan_to_num(7)) or torch.equal(
        model.logits.nan_to_num(7), before.nan_to_num(7)
    )


def test_clipping_bounds_the_step_and_reports_the_norm_before_it() -> None:
    objective, batch = CASES["dpo"]
    learner = make_learner(objective, 16)
    learner.max_grad_norm = 1e-3
    figures = learner.step(batch)
    norm = torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3) and figures["grad_norm"] > 1e-2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.853553, 0.5]),
    ],
)
def test_schedules(kind: str, expected: list[float]) -> None:
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], lr=1.0, weight_decay=0.0)
    schedule = make_schedule(optimizer, kind=kind, warmup_steps=2, steps=6)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=1e-6)


def test_mean_of_masked_values_ignores_infinities_outside_the_mask() -> None:
    values = torch.tensor([1.0, float("-inf"), 3.0])
    assert Mean.of(values, torch.tensor([True, False, True])).item() == 2.0


def test_a_planted_preference_is_learned_and_a_step_moves_against_the_loss() -> None:
    objective, batch = CASES["dpo"]
    learner = make_learner(objective, 4, lr=0.05)
    first = learner.step(batch)["loss"]
    for _ in range(60):
        last = learner.step(batch)
    assert last["loss"] < first / 2


def gradients(objective: Any, batch: Any) -> torch.Tensor:
    learner = make_learner(objective, 1000)
    learner.step(batch)
    return torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_demonstrations_add_their_gradient_times_the_coefficient(name: str) -> None:
    objective = objective_of(ALGORITHMS[name], max_new_tokens=5)
    answers, shown = bigram.drawn(), bigram.demonstrations(seed=3)
    found = gradients(MixedObjective(objective), mixed(answers, shown, objective, 0.7))
    alone, imitation = gradients(objective, answers), gradients(DemonstrationObjective(), shown)
    logits = len(Bigram().logits.flatten())
    expected = alone.clone()
    expected[:logits] += 0.7 * imitation[:logits]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_critic_does_not_decide_how_far_the_policy_may_go() -> None:
    """Each network's gradient is clipped by its own norm."""
    policy, critic = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    optimizer = make_optimizer([policy], lr=1.0, weight_decay=0.0, others=[([critic], 0.5)])
    schedule = make_schedule(optimizer, kind="constant", warmup_steps=0, steps=1)
    learner = Learner(None, DemonstrationObjective(), optimizer, schedule, 1, max_grad_norm=1.0)
    policy.grad, critic.grad = torch.full((2, 2), 0.25), torch.full((2, 2), 1000.0)
    assert learner._clip().item() == pytest.approx((0.5**2 + 2000**2) ** 0.5)
    assert policy.grad.norm().item() == pytest.approx(0.5) and critic.grad.norm().item() == pytest.approx(1, rel=1e-4)
