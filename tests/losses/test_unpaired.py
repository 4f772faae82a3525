"""KTO and BCO: literal values and gradients, values by hand, what passes no gradient, imbalance, extreme inputs."""

import math
from dataclasses import replace

import pytest
import torch

from tests.losses import literal
from trimtab.losses.unpaired import ACROSS, UNPAIRED_LOSSES, Unpaired, bco, kto

# logprob, ref_logprob, mismatched, ref_mismatched, desirable
ROWS = [
    (-12.0, -13.1, -30.2, -30.9, True),
    (-25.4, -24.0, -41.0, -42.3, False),
    (-7.7, -9.2, -22.8, -21.9, True),
    (-18.3, -18.9, -35.5, -36.6, False),
    (-3.0, -2.2, -19.1, -19.6, True),
]
CASES = [
    ("kto", {}),
    ("kto", {"beta": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.4}),
    ("bco", {}),
    ("bco", {"beta": 0.7}),
]
EVERY_CASE = pytest.mark.parametrize(("name", "arguments"), CASES)


def make(rows=ROWS, dtype=torch.float64) -> Unpaired:
    *numbers, wanted = zip(*rows, strict=True)
    return Unpaired(
        *(torch.tensor(column, dtype=dtype, requires_grad=True) for column in numbers), torch.tensor(wanted)
    )


def literal_sum(name, arguments, rows, **frozen):
    return math.fsum(getattr(literal, name)(*zip(*rows, strict=True), **arguments, **frozen))


def frozen_baseline(name, arguments):
    """The number through which no gradient passes, at the test's rows."""
    if name == "kto":
        return {"z0": max(0, sum(q - g for _, _, q, g, _ in ROWS) / len(ROWS))}
    return {"delta": arguments.get("beta", 0.01) * sum(p - f for p, f, *_ in ROWS) / len(ROWS)}


@EVERY_CASE
def test_value_is_the_literal_one(name, arguments):
    expected = torch.tensor(getattr(literal, name)(*zip(*ROWS, strict=True), **arguments), dtype=torch.float64)
    torch.testing.assert_close(UNPAIRED_LOSSES[name](make(), **arguments), expected, rtol=1e-12, atol=0)
    single = UNPAIRED_LOSSES[name](make(dtype=torch.float32), **arguments)
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=0)


@EVERY_CASE
def test_gradient_is_the_literal_one_with_the_baseline_frozen(name, arguments):
    u = make()
    inputs = [u.logprob, u.ref_logprob, u.mismatched, u.ref_mismatched]
    total = UNPAIRED_LOSSES[name](u, **arguments).sum()
    for column, gradient in enumerate(torch.autograd.grad(total, inputs, materialize_grads=True)):
        for i, row in enumerate(ROWS):

            def moved_total(moved, i=i):
                rows = [*ROWS[:i], tuple(moved), *ROWS[i + 1 :]]
                return literal_sum(name, arguments, rows, **frozen_baseline(name, arguments))

            assert gradient[i].item() == pytest.approx(
                literal.derivative(moved_total, row, column), rel=1e-7, abs=1e-10
            )


def test_kto_by_hand():
    rows = [(-5 + math.log(3), -5.0, -9.0, -9.0, True), (-5 + math.log(3), -5.0, -9.0, -9.0, False)]
    torch.testing.assert_close(kto(make(rows), beta=1.0), torch.tensor([0.25, 0.75], dtype=torch.float64))


def test_kto_at_the_reference_is_one_half():
    rows = [(p, p, q, q, wanted) for p, _, q, _, wanted in ROWS]
    torch.testing.assert_close(kto(make(rows)), torch.full((len(ROWS),), 0.5, dtype=torch.float64))


def test_kto_reference_point_is_never_negative():
    lower = [(p, f, -50.0, -20.0, wanted) for p, f, _, _, wanted in ROWS]
    none = [(p, f, -20.0, -20.0, wanted) for p, f, _, _, wanted in ROWS]
    torch.testing.assert_close(kto(make(lower)), kto(make(none)), rtol=0, atol=0)


def test_kto_passes_no_gradient_to_mismatched_answers():
    u = make()
    gradients = torch.autograd.grad(kto(u).sum(), [u.mismatched, u.ref_mismatched], allow_unused=True)
    assert gradients == (None, None)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_wanted_answers_become_likelier_and_unwanted_ones_less_likely(name):
    u = make()
    (gradient,) = torch.autograd.grad(UNPAIRED_LOSSES[name](u).sum(), u.logprob)
    assert ((gradient < 0) == u.desirable).all()


def test_kto_weights_balance_one_wanted_among_ten():
    rows = [(-10.0, -10.0, -10.0, -10.0, i == 0) for i in range(11)]
    u = make(rows)
    (gradient,) = torch.autograd.grad(kto(u, desirable_weight=10.0).sum(), u.logprob)
    assert gradient[0].item() == pytest.approx(-gradient[1:].sum().item())


def test_bco_by_hand():
    rows = [(-5 + 2 * math.log(3), -5.0, 0.0, 0.0, True), (-5.0, -5.0, 0.0, 0.0, False)]
    # rewards 2 ln 3 and 0, delta ln 3: both answers are ln 3 on the right side.
    torch.testing.assert_close(bco(make(rows), beta=1.0), torch.full((2,), math.log(4 / 3), dtype=torch.float64))


def test_bco_does_not_see_a_constant_added_to_all_rewards():
    u = make()
    moved = replace(u, ref_logprob=u.ref_logprob - 4.0)
    torch.testing.assert_close(bco(u), bco(moved))


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_value_depends_on_the_rest_of_the_batch(name):
    assert name in ACROSS
    other = [ROWS[0], *((p - 3, f, q + 5, g, wanted) for p, f, q, g, wanted in ROWS[1:])]
    loss = UNPAIRED_LOSSES[name]
    assert loss(make())[0] != loss(make(other))[0]


@EVERY_CASE
def test_extreme_values_in_float32_are_finite_with_finite_gradients(name, arguments):
    far = (0.0, -1e4)
    u = make([(p, f, q, 0.0, wanted) for p in far for f in far for q in far for wanted in (True, False)], torch.float32)
    values = UNPAIRED_LOSSES[name](u, **arguments)
    (gradient,) = torch.autograd.grad(values.sum(), u.logprob)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
