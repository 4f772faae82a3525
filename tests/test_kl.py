"""KL: estimators and their gradients, exact values, KL in the reward, the controller and the budget."""

import math

import pytest
import torch

from trimtab.kl import (
    KL_ESTIMATORS,
    KL_LOSSES,
    AdaptiveCoefficient,
    FixedCoefficient,
    KlBudget,
    KlTerms,
    bounded_exp,
    exact_kl,
    k1,
    k3,
    last_tokens,
    log_ratio,
    shaped_rewards,
)

LITERAL = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}
# The derivative that each loss has with respect to a token's log-probability, at log-ratio d and importance weight w.
SLOPES = {
    "k1": lambda d, w: d,
    "k2": lambda d, w: d,
    "k3": lambda d, w: 1 - math.exp(-d),
    "k3_weighted": lambda d, w: w * d,
}
RATIOS = [-3.0, -0.4, 0.0, 0.7, 2.5]
MASK = torch.tensor([[True, False, True, True], [False, True, True, False]])
BAD = [float("nan"), float("inf"), float("-inf")]


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def terms(seed: int = 0) -> KlTerms:
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, ref = (-torch.rand(2, 4, generator=generator, dtype=torch.float64) * 3 for _ in range(3))
    return KlTerms(logprobs.requires_grad_(), old, ref, MASK)


def poisoned(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """The same inside the mask, `value` outside."""
    return torch.where(MASK, tensor.detach(), value)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_estimators_are_the_literal_ones(name):
    found = KL_ESTIMATORS[name](doubles([RATIOS]))
    torch.testing.assert_close(found, doubles([[LITERAL[name](d) for d in RATIOS]]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_estimators_are_zero_where_the_models_agree(name):
    assert not KL_ESTIMATORS[name](torch.zeros(2, 3)).any()


def test_k3_is_never_negative_and_small_ratios_keep_their_digits():
    small = torch.tensor([[1e-4, -1e-4, 3e-5, -1e-5]])
    found = k3(small)
    assert (found > 0).all()
    torch.testing.assert_close(found, small**2 / 2, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_no_estimator_overflows_in_float32(name):
    ratios = torch.tensor([[-1e4, -89.0, 89.0, 1e4]], requires_grad=True)
    values = KL_ESTIMATORS[name](ratios)
    (slopes,) = torch.autograd.grad(values.sum(), ratios)
    assert values.isfinite().all() and slopes.isfinite().all()
    if name == "k3":
        assert (slopes[0, :2] < 0).all(), "a policy far below the reference must be pulled up"


def test_bounded_exp_is_exp_below_its_bound_and_smooth_there():
    x = torch.linspace(-30, 20, 50, dtype=torch.float64)
    torch.testing.assert_close(bounded_exp(x), x.exp())
    edge = doubles([20 - 1e-6, 20 + 1e-6]).requires_grad_()
    (slopes,) = torch.autograd.grad(bounded_exp(edge).sum(), edge)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", KL_LOSSES)
def test_losses_have_the_gradient_that_they_promise(name):
    k = terms()
    (slopes,) = torch.autograd.grad(KL_LOSSES[name](k).sum(), k.logprobs)
    for place in MASK.nonzero().tolist():
        p, q, f = (tensor[tuple(place)].item() for tensor in (k.logprobs, k.old_logprobs, k.ref_logprobs))
        assert slopes[tuple(place)].item() == pytest.approx(SLOPES[name](p - f, math.exp(p - q)), rel=1e-9)
    assert not slopes[~MASK].any()


@pytest.mark.parametrize(("name", "value"), [("k1", k1), ("k3", k3)])
def test_losses_have_the_value_of_their_estimator(name, value):
    k = terms()
    torch.testing.assert_close(KL_LOSSES[name](k), value(k.log_ratio))


@pytest.mark.parametrize("name", KL_LOSSES)
@pytest.mark.parametrize("bad", BAD)
def test_nothing_outside_the_mask_reaches_a_loss_or_its_gradient(name, bad):
    k = terms()
    p, q, f = (poisoned(tensor, bad) for tensor in (k.logprobs, k.old_logprobs, k.ref_logprobs))
    dirty = KlTerms(p.requires_grad_(), q, f, MASK)
    torch.testing.assert_close(KL_LOSSES[name](dirty), KL_LOSSES[name](k), rtol=0, atol=0)
    (clean_slopes,) = torch.autograd.grad(KL_LOSSES[name](k).sum(), k.logprobs)
    (slopes,) = torch.autograd.grad(KL_LOSSES[name](dirty).sum(), dirty.logprobs)
    torch.testing.assert_close(slopes, clean_slopes, rtol=0, atol=0)


def test_exact_kl_by_hand_and_its_gradient():
    own = doubles([[0.5, 0.5], [0.9, 0.1]]).log()
    other = doubles([[0.25, 0.75], [0.9, 0.1]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    torch.testing.assert_close(exact_kl(own, other), doubles([expected, 0.0]))
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: exact_kl(x.log_softmax(-1), ref), logits)


def test_exact_kl_of_tokens_that_are_ruled_out():
    own = doubles([[0.5, 0.5, 0.0]]).log().requires_grad_()
    both, one = doubles([[0.25, 0.75, 0.0]]).log(), doubles([[1.0, 0.0, 0.0]]).log()
    found = exact_kl(own, both)
    torch.testing.assert_close(found, doubles([0.5 * math.log(2) + 0.5 * math.log(2 / 3)]))
    (slopes,) = torch.autograd.grad(found.sum(), own)
    assert slopes.isfinite().all()
    assert exact_kl(own, one).item() == math.inf


def test_exact_kl_of_a_token_whose_probability_is_too_small_for_a_number():
    """exp(-200) is 0 in float32, and 0 times infinity is no number: such a token adds nothing, to its gradient too."""
    own = torch.tensor([[0.0, -200.0]], requires_grad=True)
    found = exact_kl(own, torch.tensor([[math.log(0.5), -math.inf]]))
    assert found.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(found.sum(), own)
    assert gradient.tolist() == [[pytest.approx(1 + math.log(2)), 0]]


def test_exact_kl_is_what_k1_and_k3_average_to():
    generator = torch.Generator().manual_seed(1)
    own, other = (torch.randn(4, 6, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    for estimator in (k1, k3):
        torch.testing.assert_close((own.exp() * estimator(own - other)).sum(-1), exact_kl(own, other))


@pytest.mark.parametrize(
    ("name", "mask", "last"),
    [
        ("ends in the middle of the row", [0, 1, 1, 1, 0, 0], 3),
        ("has no end and fills the row", [0, 0, 1, 1, 1, 1], 5),
        ("ends at the end of the row", [0, 1, 1, 1, 1, 1], 5),
        ("is padded on the left", [0, 0, 0, 0, 1, 1], 5),
        ("is one token", [0, 1, 0, 0, 0, 0], 1),
        ("has a hole", [0, 1, 0, 1, 0, 0], 3),
    ],
)
def test_score_lands_on_the_last_token_of_the_mask(name, mask, last):
    mask = torch.tensor([mask], dtype=torch.bool)
    kl = doubles([[9.0, 0.5, -0.25, 1.0, 2.0, -1.0]])
    found = shaped_rewards(doubles([3.0]), kl, mask, coefficient=0.1)
    expected = [[-0.1 * kl[0, t].item() * mask[0, t].item() + (3.0 if t == last else 0) for t in range(6)]]
    torch.testing.assert_close(found, doubles(expected))


def test_a_row_without_tokens_gets_no_reward():
    mask = torch.tensor([[False, False], [True, True]])
    found = shaped_rewards(doubles([float("nan"), 1.0]), doubles([[math.inf] * 2, [0.0] * 2]), mask, coefficient=1.0)
    torch.testing.assert_close(found, doubles([[0.0, 0.0], [0.0, 1.0]]))
    assert last_tokens(mask).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("bad", BAD)
def test_rewards_read_nothing_outside_the_mask(bad):
    k = terms()
    dirty = log_ratio(poisoned(k.logprobs, bad), poisoned(k.ref_logprobs, bad), MASK)
    torch.testing.assert_close(dirty, k.log_ratio)
    scores = doubles([1.0, -1.0])
    found = shaped_rewards(scores, poisoned(k.log_ratio, bad), MASK, coefficient=0.3)
    torch.testing.assert_close(found, shaped_rewards(scores, k.log_ratio, MASK, coefficient=0.3))
    assert not found[~MASK].any()


def test_a_shaped_answer_is_worth_its_score_minus_the_price_of_its_kl():
    k = terms()
    found = shaped_rewards(doubles([1.0, 2.0]), k.log_ratio, MASK, coefficient=0.5).sum(-1)
    torch.testing.assert_close(found, doubles([1.0, 2.0]) - 0.5 * k.log_ratio.sum(-1))


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 0.0512),
        (5.4, 1 - 0.1 * 0.0512),
        (100.0, 1 + 0.2 * 0.0512),
        (0.0, 1 - 0.2 * 0.0512),
        (-3.0, 1 - 0.2 * 0.0512),
    ],
)
def test_controller_moves_by_the_published_constants(kl, factor):
    assert AdaptiveCoefficient().update(kl, answers=512).value == pytest.approx(0.15 * factor, rel=1e-12)


def test_controller_holds_a_policy_whose_kl_falls_with_the_price():
    coefficient = AdaptiveCoefficient(value=1.0, target=5.0, horizon=200)
    for _ in range(300):
        kl = 0.6 / coefficient.value
        coefficient = coefficient.update(kl, answers=32)
    assert 0.6 / coefficient.value == pytest.approx(5.0, rel=0.01)


def test_controller_refuses_what_would_turn_it_negative():
    with pytest.raises(ValueError, match="horizon above 20"):
        AdaptiveCoefficient(horizon=20).update(6.0, answers=100)
    with pytest.raises(ValueError, match="target of the adaptive KL coefficient is 0"):
        AdaptiveCoefficient(target=0.0)
    with pytest.raises(ValueError, match="diverged"):
        AdaptiveCoefficient().update(float("nan"), answers=1)


def test_fixed_coefficient_does_not_move():
    assert FixedCoefficient(0.05).update(100.0, 512) == FixedCoefficient(0.05)


def test_budget_warns_once_and_stops_at_its_limit():
    budget, told = KlBudget(10.0), []
    for kl in (1.0, 7.9, 8.0, 7.0, 9.0, 10.0):
        budget = budget.update(kl)
        told.append((budget.should_warn, budget.is_spent))
    assert told == [(False, False), (False, False), (True, False), (False, False), (False, False), (False, True)]


def test_budget_that_is_jumped_over_warns_and_stops_at_once():
    budget = KlBudget(10.0).update(50.0)
    assert budget.should_warn and budget.is_spent


def test_budget_must_be_positive():
    with pytest.raises(ValueError, match="above 0"):
        KlBudget(0.0)
