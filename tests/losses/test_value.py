"""Value losses: literal values and gradients, what is clipped, masks, explained variance."""

import math
import statistics

import pytest
import torch

from tests.losses import literal
from trimtab.losses.value import (
    VALUE_LOSSES,
    ValueTerms,
    clipped,
    explained_variance,
    squared_error,
    value_clip_fraction,
)

MASK = torch.tensor([[False, True, True, True], [True, False, True, False]])
BAD = [float("nan"), float("inf"), float("-inf")]
CASES = [("squared_error", {}), ("clipped", {}), ("clipped", {"epsilon": 0.5})]


def make(seed: int = 0) -> ValueTerms:
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = (torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return ValueTerms(values.requires_grad_(), old, returns, MASK)


def single(value: float, old: float, came: float) -> ValueTerms:
    columns = (torch.tensor([[x]], dtype=torch.float64) for x in (value, old, came))
    values, olds, returns = columns
    return ValueTerms(values.requires_grad_(), olds, returns, torch.ones(1, 1, dtype=torch.bool))


def gradient(losses: torch.Tensor, v: ValueTerms) -> torch.Tensor:
    return torch.autograd.grad(losses.sum(), v.values)[0]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_value_and_gradient_are_the_literal_ones(name, arguments):
    v, twin = make(), getattr(literal, f"value_{name}")
    found = VALUE_LOSSES[name](v, **arguments)
    slopes = gradient(found, v)
    for place in map(tuple, MASK.nonzero().tolist()):
        row = tuple(column[place].item() for column in (v.values, v.old_values, v.returns))
        assert found[place].item() == pytest.approx(twin(*row, **arguments), rel=1e-12)
        expected = literal.derivative(lambda moved: twin(*moved, **arguments), row, 0)
        assert slopes[place].item() == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert not found[~MASK].any() and not slopes[~MASK].any()


@pytest.mark.parametrize(
    ("value", "old", "came", "loss", "slope"),
    [
        (0.1, 0.0, 1.0, 0.405, -0.9),  # moved a little
        (0.5, 0.0, 1.0, 0.32, 0.0),  # moved enough towards the return: held at 0.2
        (-0.5, 0.0, 1.0, 1.125, -1.5),  # moved away: pulled back
        (1.5, 0.0, 1.0, 0.32, 0.0),  # went past it by more than is allowed
    ],
)
def test_clipped_by_hand(value, old, came, loss, slope):
    v = single(value, old, came)
    assert clipped(v).item() == pytest.approx(loss)
    assert gradient(clipped(v), v).item() == pytest.approx(slope)


def test_before_the_first_update_clipping_does_nothing():
    v = make()
    fresh = ValueTerms(v.values, v.values.detach(), v.returns, MASK)
    torch.testing.assert_close(clipped(fresh), squared_error(fresh), rtol=0, atol=0)
    torch.testing.assert_close(gradient(clipped(fresh), fresh), gradient(squared_error(fresh), fresh))
    assert value_clip_fraction(fresh).item() == 0


def test_clip_fraction_is_the_share_of_tokens_without_gradient():
    v = make()
    stopped = (gradient(clipped(v), v)[MASK] == 0).double().mean().item()
    assert value_clip_fraction(v).item() == pytest.approx(stopped)
    assert 0 < stopped < 1


@pytest.mark.parametrize("name", VALUE_LOSSES)
@pytest.mark.parametrize("bad", BAD)
def test_nothing_outside_the_mask_reaches_a_loss_or_its_gradient(name, bad):
    v = make()
    values, old, returns = (torch.where(MASK, c.detach(), bad) for c in (v.values, v.old_values, v.returns))
    dirty = ValueTerms(values.requires_grad_(), old, returns, MASK)
    found, clean = VALUE_LOSSES[name](dirty), VALUE_LOSSES[name](v)
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    torch.testing.assert_close(gradient(found, dirty), gradient(clean, v), rtol=0, atol=0)
    assert value_clip_fraction(dirty).item() == value_clip_fraction(v).item()
    assert explained_variance(values.detach(), returns, MASK) == explained_variance(v.values.detach(), v.returns, MASK)


def test_explained_variance_is_the_literal_one():
    v = make()
    came, predicted = v.returns[MASK].tolist(), v.values[MASK].tolist()
    left = statistics.pvariance([r - p for r, p in zip(came, predicted, strict=True)])
    expected = 1 - left / statistics.pvariance(came)
    assert explained_variance(v.values.detach(), v.returns, MASK) == pytest.approx(expected)


def test_explained_variance_of_perfect_constant_and_pointless_critics():
    returns = torch.randn(2, 4, dtype=torch.float64)
    assert explained_variance(returns, returns, MASK) == 1
    assert explained_variance(returns + 5, returns, MASK) == pytest.approx(1)
    assert explained_variance(torch.zeros_like(returns), returns, MASK) == pytest.approx(0)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, torch.ones_like(returns), MASK))
    assert math.isnan(explained_variance(returns, returns, torch.zeros_like(MASK)))
