"""Preference losses: literal values and gradients, values by hand, limits, signs, swaps, and extreme inputs."""

import inspect
import math
from dataclasses import replace

import pytest
import torch

from tests.losses import literal
from trimtab.batches import Pairs
from trimtab.losses.preference import (
    ACROSS,
    ALL_LOSSES,
    PREFERENCE_LOSSES,
    REFERENCE_FREE,
    LengthSplitPairs,
    WeightedPairs,
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    chi_po,
    discopop,
    dpo,
    dpop,
    exo,
    f_dpo,
    hinge,
    ipo,
    ld_dpo,
    length_normalized_dpo,
    log_odds,
    nca,
    orpo,
    preferred_ft,
    r_dpo,
    robust,
    rpo,
    simpo,
    slic,
    sppo,
    tangent_expm1,
    wpo,
)

FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected")

# chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length; away from kinks and from equal ranks.
ROWS = [
    (-12.3, -15.1, -13.0, -14.2, 7.0, 9.0),
    (-40.2, -33.3, -38.7, -34.9, 21.0, 14.0),
    (-3.7, -6.4, -4.9, -5.2, 2.0, 2.0),
    (-55.0, -51.5, -53.2, -53.6, 30.0, 33.0),
    (-8.4, -8.6, -8.1, -9.4, 5.0, 1.0),
    (-20.6, -22.8, -18.2, -25.9, 11.0, 12.0),
    (-0.9, -1.4, -2.2, -0.3, 1.0, 3.0),
]

CASES = [
    ("dpo", {}),
    ("dpo", {"beta": 0.7, "label_smoothing": 0.2}),
    ("robust", {}),
    ("robust", {"beta": 0.6, "label_smoothing": 0.35}),
    ("ipo", {}),
    ("ipo", {"tau": 0.3, "average": False}),
    ("hinge", {}),
    ("hinge", {"beta": 0.4}),
    ("slic", {}),
    ("slic", {"delta": 2.5, "lam": 0.7}),
    ("simpo", {}),
    ("simpo", {"beta": 1.3, "gamma": -0.4}),
    ("orpo", {}),
    ("orpo", {"lam": 2.0}),
    ("cpo", {}),
    ("cpo", {"beta": 0.5, "alpha": 0.3, "average": False}),
    ("alphapo", {}),
    ("alphapo", {"alpha": -0.5, "beta": 1.1, "gamma": 0.6}),
    ("alphapo", {"alpha": 0.0}),
    ("length_normalized_dpo", {}),
    ("length_normalized_dpo", {"beta": 1.7}),
    ("r_dpo", {}),
    ("r_dpo", {"beta": 0.4, "alpha": 0.3}),
    ("dpop", {}),
    ("dpop", {"beta": 0.4, "lam": 0.6}),
    ("rpo", {}),
    ("rpo", {"beta": 0.8, "alpha": 0.05}),
    ("exo", {}),
    ("exo", {"beta": 0.7, "label_smoothing": 0.2}),
    ("nca", {}),
    ("nca", {"beta": 0.9}),
    ("bco_pair", {}),
    ("bco_pair", {"beta": 0.7, "delta": 0.4}),
    ("apo_zero", {}),
    ("apo_zero", {"beta": 0.9}),
    ("apo_down", {}),
    ("apo_down", {"beta": 0.9}),
    ("discopop", {}),
    ("discopop", {"beta": 0.8, "tau": 1.4}),
    ("sppo", {}),
    ("sppo", {"eta": 3.0}),
    ("aot", {}),
    ("aot", {"beta": 0.6}),
    ("aot_unpaired", {}),
    ("aot_unpaired", {"beta": 0.6}),
    ("f_dpo", {}),
    ("f_dpo", {"beta": 0.6, "divergence": "forward_kl"}),
    ("f_dpo", {"beta": 0.6, "divergence": "js"}),
    ("f_dpo", {"beta": 0.6, "divergence": "alpha"}),
    ("f_dpo", {"beta": 0.6, "divergence": "alpha", "alpha": 0.2}),
    ("f_dpo", {"beta": 0.6, "divergence": "alpha", "alpha": 1.0}),
    ("chi_po", {}),
    ("chi_po", {"beta": 0.6, "r_max": 0.5}),
    ("unlikelihood", {}),
    ("unlikelihood", {"alpha": 0.9}),
    ("preferred_ft", {}),
    ("preferred_ft", {"average": True}),
]
EVERY_CASE = pytest.mark.parametrize(("name", "arguments"), CASES, ids=[f"{name}-{a}" for name, a in CASES])


def make_pairs(rows=ROWS, dtype=torch.float64) -> Pairs:
    columns = torch.tensor(rows, dtype=dtype).unbind(1)
    return Pairs(*(column.clone().requires_grad_() for column in columns))


def at_reference(log_ratio: float = 0.0, length: float = 10.0) -> Pairs:
    """One pair with D = 0, both log-ratios `log_ratio`, in float64."""
    return make_pairs([(-20.0 + log_ratio, -20.0 + log_ratio, -20.0, -20.0, length, length)])


def with_margin(margin: float, **changes) -> Pairs:
    """One pair with D = `margin`, half of it in each answer."""
    pair = make_pairs([(-20 + margin / 2, -20 - margin / 2, -20.0, -20.0, 10.0, 10.0)])
    return replace(pair, **{name: torch.tensor([value], dtype=torch.float64) for name, value in changes.items()})


def swapped(p: Pairs) -> Pairs:
    return Pairs(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.rejected_length, p.chosen_length)


def gradients(loss, p: Pairs, **arguments) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(
        loss(p, **arguments).sum(), [getattr(p, name) for name in FIELDS], materialize_grads=True
    )


def literal_values(name, arguments, rows):
    function = getattr(literal, name)
    return function(rows, **arguments) if name in ACROSS else [function(*row, **arguments) for row in rows]


def literal_gradient(name, arguments, column):
    """d sum(losses) / d (the entry of every row in one column)."""
    entries = []
    for i, row in enumerate(ROWS):

        def total(moved, i=i):
            return math.fsum(literal_values(name, arguments, [*ROWS[:i], tuple(moved), *ROWS[i + 1 :]]))

        entries.append(literal.derivative(total, row, column))
    return entries


def test_every_loss_has_a_literal_version_with_default_and_other_arguments():
    for name, function in PREFERENCE_LOSSES.items():
        cases = [arguments for case, arguments in CASES if case == name]
        hyperparameters = set(inspect.signature(function).parameters) - {"p"}
        assert {} in cases, name
        assert set().union(*cases) == hyperparameters, name


@EVERY_CASE
def test_value_is_the_literal_one(name, arguments):
    expected = torch.tensor(literal_values(name, arguments, ROWS), dtype=torch.float64)
    torch.testing.assert_close(PREFERENCE_LOSSES[name](make_pairs(), **arguments), expected, rtol=1e-10, atol=1e-12)


@EVERY_CASE
def test_value_in_float32_is_close_to_the_literal_one(name, arguments):
    values = PREFERENCE_LOSSES[name](make_pairs(dtype=torch.float32), **arguments)
    assert values.dtype == torch.float32
    expected = torch.tensor(literal_values(name, arguments, ROWS), dtype=torch.float32)
    torch.testing.assert_close(values, expected, rtol=2e-5, atol=2e-6)


@EVERY_CASE
def test_gradient_is_the_literal_one(name, arguments):
    for column, gradient in enumerate(gradients(PREFERENCE_LOSSES[name], make_pairs(), **arguments)):
        expected = torch.tensor(literal_gradient(name, arguments, column), dtype=torch.float64)
        torch.testing.assert_close(
            gradient, expected, rtol=1e-7, atol=1e-8, msg=lambda m, c=column: f"{FIELDS[c]}: {m}"
        )


@EVERY_CASE
def test_one_number_per_pair_that_only_batchwide_losses_take_from_other_pairs(name, arguments):
    whole = PREFERENCE_LOSSES[name](make_pairs(), **arguments)
    alone = torch.cat([PREFERENCE_LOSSES[name](make_pairs([row]), **arguments) for row in ROWS])
    assert whole.shape == (len(ROWS),)
    assert torch.equal(whole, alone) == (name not in ACROSS)


@EVERY_CASE
def test_order_of_the_pairs_does_not_matter(name, arguments):
    order = [3, 0, 6, 2, 5, 1, 4]
    shuffled = PREFERENCE_LOSSES[name](make_pairs([ROWS[i] for i in order]), **arguments)
    torch.testing.assert_close(shuffled, PREFERENCE_LOSSES[name](make_pairs(), **arguments)[order], rtol=0, atol=0)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_reference_free_losses_and_only_they_ignore_the_reference(name):
    shift = torch.linspace(0.3, 1.7, len(ROWS), dtype=torch.float64)
    p = make_pairs()
    other = replace(p, ref_chosen=p.ref_chosen + shift, ref_rejected=p.ref_rejected - 2 * shift)
    same = torch.equal(PREFERENCE_LOSSES[name](p), PREFERENCE_LOSSES[name](other))
    assert same == (name in REFERENCE_FREE)


@pytest.mark.parametrize(
    ("loss", "arguments", "pair", "expected"),
    [
        (dpo, {"beta": 0.1}, at_reference(), math.log(2)),
        (dpo, {"beta": 1.0}, with_margin(math.log(3)), math.log(4 / 3)),
        (dpo, {"beta": 1.0, "label_smoothing": 0.25}, with_margin(math.log(3)), math.log(4) - 0.75 * math.log(3)),
        (robust, {"beta": 1.0, "label_smoothing": 0.25}, with_margin(math.log(3)), math.log(4) - 1.5 * math.log(3)),
        (ipo, {"tau": 0.1}, at_reference(), 25.0),
        (ipo, {"tau": 0.25}, with_margin(10.0), 1.0),
        (ipo, {"tau": 0.25, "average": False}, with_margin(10.0), 64.0),
        (hinge, {"beta": 0.05}, with_margin(4.0), 0.8),
        (hinge, {"beta": 0.05}, with_margin(24.0), 0.0),
        (slic, {"delta": 1.0, "lam": 0.1}, with_margin(0.5), 0.5 + 0.1 * 19.75),
        (simpo, {"beta": 2.0, "gamma": 1.0}, with_margin(5.0), math.log(2)),
        (orpo, {"lam": 2.0}, with_margin(0.0, chosen=-10 * math.log(2), rejected=-10 * math.log(2)), 3 * math.log(2)),
        (orpo, {"lam": 1.0}, with_margin(0.0, chosen=-10 * math.log(4 / 3), rejected=-10 * math.log(4)),
         math.log(4 / 3) + math.log(10 / 9)),
        (length_normalized_dpo, {"beta": 5.0}, with_margin(2 * math.log(3)), math.log(4 / 3)),
        (r_dpo, {"beta": 0.1, "alpha": 0.5}, with_margin(0.0, rejected_length=12.0), math.log(1 + math.e)),
        (dpop, {"beta": 0.1, "lam": 5.0}, with_margin(-2.0), math.log(1 + math.exp(0.7))),
        (dpop, {"beta": 0.1, "lam": 5.0}, with_margin(2.0), math.log(1 + math.exp(-0.2))),
        (rpo, {"beta": 0.1, "alpha": 0.5}, at_reference(), math.log(2) + 1.0),
        (exo, {"label_smoothing": 0.25}, at_reference(), 0.5 * math.log(4 / 3)),
        (nca, {}, at_reference(), 2 * math.log(2)),
        (bco_pair, {}, at_reference(), 2 * math.log(2)),
        (apo_zero, {}, at_reference(), 1.0),
        (apo_zero, {"beta": 1.0}, with_margin(2 * math.log(3)), 0.5),
        (apo_down, {"beta": 1.0}, with_margin(2 * math.log(3)), 0.75 + 0.1),
        (discopop, {}, at_reference(), 0.5 * math.log(2) + 0.5),
        (sppo, {"eta": 1000.0}, at_reference(), 500_000.0),
        (chi_po, {"beta": 0.5}, with_margin(2 * math.log(2)), math.log(1 + 0.5 * math.exp(-0.75))),
        (f_dpo, {"beta": 1.0, "divergence": "forward_kl"}, with_margin(2 * math.log(2)), math.log(1 + math.exp(-1.5))),
        (f_dpo, {"beta": 1.0, "divergence": "js"}, with_margin(2 * math.log(2)), math.log(1.5)),
        (preferred_ft, {}, at_reference(), 20.0),
        (preferred_ft, {"average": True}, at_reference(), 2.0),
    ],
)  # fmt: skip
def test_value_by_hand(loss, arguments, pair, expected):
    assert loss(pair, **arguments).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["dpo", "length_normalized_dpo", "dpop", "f_dpo", "chi_po", "aot", "aot_unpaired"])
def test_ln_2_where_policy_and_reference_agree(name):
    rows = [(pw, pl, pw, pl, nw, nl) for pw, pl, _, _, nw, nl in ROWS]
    values = PREFERENCE_LOSSES[name](make_pairs(rows, torch.float32))
    torch.testing.assert_close(values, torch.full_like(values, math.log(2)), rtol=0, atol=1e-6)


def test_dpo_gradient_is_the_papers_coefficient():
    p = make_pairs()
    chosen, rejected, *_ = gradients(dpo, p, beta=0.3)
    coefficient = -0.3 * torch.sigmoid(-0.3 * p.margin.detach())
    torch.testing.assert_close(chosen, coefficient)
    torch.testing.assert_close(rejected, -coefficient)


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        (dpo, {"label_smoothing": 0.0}),
        (robust, {"label_smoothing": 0.0}),
        (f_dpo, {"divergence": "reverse_kl"}),
        (f_dpo, {"divergence": "alpha", "alpha": 1.0}),
        (r_dpo, {"alpha": 0.0}),
        (dpop, {"lam": 0.0}),
        (rpo, {"alpha": 0.0}),
    ],
)
def test_limits_that_are_dpo(loss, arguments):
    torch.testing.assert_close(loss(make_pairs(), beta=0.4, **arguments), dpo(make_pairs(), beta=0.4))


def test_limits_between_other_losses():
    p = make_pairs()
    forward = f_dpo(p, divergence="forward_kl")
    torch.testing.assert_close(f_dpo(p, divergence="alpha", alpha=0.0), forward)
    torch.testing.assert_close(f_dpo(p, divergence="alpha", alpha=1e-9), forward, rtol=1e-6, atol=0)
    near_one = f_dpo(p, divergence="alpha", alpha=1 - 1e-7)
    torch.testing.assert_close(near_one, dpo(p), rtol=1e-5, atol=0)
    alphapo = PREFERENCE_LOSSES["alphapo"]
    torch.testing.assert_close(alphapo(p, alpha=1e-7, beta=2.0, gamma=1.0), simpo(p), rtol=1e-5, atol=0)


def test_simpo_without_margin_is_reference_free_length_normalized_dpo_at_equal_lengths():
    p = make_pairs()
    equal = replace(p, rejected_length=p.chosen_length)
    no_reference = replace(equal, ref_chosen=torch.zeros_like(p.chosen), ref_rejected=torch.zeros_like(p.chosen))
    torch.testing.assert_close(
        simpo(equal, beta=1.7, gamma=0.0), length_normalized_dpo(no_reference, beta=1.7), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.45])
def test_robust_is_unbiased_for_the_clean_dpo_loss_under_flips(rate):
    p = make_pairs()
    flipped = robust(swapped(p), label_smoothing=rate)
    expectation = (1 - rate) * robust(p, label_smoothing=rate) + rate * flipped
    torch.testing.assert_close(expectation, dpo(p), rtol=1e-10, atol=0)


@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_ipo_is_smallest_where_the_margin_is_half_of_one_over_tau(tau):
    best = with_margin(1 / (2 * tau))
    assert ipo(best, tau=tau, average=False).item() == pytest.approx(0, abs=1e-20)
    assert all(gradient.abs().max() < 1e-10 for gradient in gradients(ipo, best, tau=tau, average=False))
    best_average = with_margin(10 / (2 * tau))
    assert ipo(best_average, tau=tau).item() == pytest.approx(0, abs=1e-20)


def test_conservative_dpo_is_smallest_where_the_model_is_as_sure_as_the_labels():
    sure = with_margin(math.log(0.8 / 0.2))
    assert all(gradient.abs().max() < 1e-10 for gradient in gradients(dpo, sure, beta=1.0, label_smoothing=0.2))
    assert exo(sure, beta=1.0, label_smoothing=0.2).item() == pytest.approx(0, abs=1e-12)


# Losses whose gradient at D = 0 has the other sign for the chosen answer, with the log-ratios where it has.
WRONG_WAY_FOR_CHOSEN = {
    ("nca", 3.0),  # its absolute terms pull a likely chosen answer back to the reference
    *(("discopop", log_ratio) for log_ratio in (-3.0, 0.0, 3.0)),  # not convex: uphill at D = 0
}
WRONG_WAY_FOR_REJECTED = {("discopop", log_ratio) for log_ratio in (-3.0, 0.0, 3.0)}


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@pytest.mark.parametrize("log_ratio", [-3.0, 0.0, 3.0])
def test_signs_of_the_gradient_at_margin_zero(name, log_ratio):
    arguments = {"beta": 1.0} if name == "nca" else {}
    chosen, rejected, *_ = gradients(PREFERENCE_LOSSES[name], at_reference(log_ratio), **arguments)
    assert (chosen.item() > 0) == ((name, log_ratio) in WRONG_WAY_FOR_CHOSEN)
    assert (rejected.item() < 0) == ((name, log_ratio) in WRONG_WAY_FOR_REJECTED)
    assert chosen.item() or rejected.item()


def test_apo_down_makes_a_well_separated_chosen_answer_less_likely():
    chosen, rejected, *_ = gradients(apo_down, with_margin(30.0))
    assert chosen.item() > 0
    assert rejected.item() > 0


@pytest.mark.parametrize(
    ("loss", "arguments", "difference"),
    [
        (dpo, {"beta": 0.3}, lambda p: -0.3 * p.margin),
        (dpo, {"beta": 0.3, "label_smoothing": 0.2}, lambda p: -0.6 * 0.3 * p.margin),
        (robust, {"beta": 0.3, "label_smoothing": 0.2}, lambda p: -0.3 * p.margin / 0.6),
        (ipo, {"tau": 0.2, "average": False}, lambda p: -2 / 0.2 * p.margin),
        (r_dpo, {"beta": 0.3, "alpha": 0.1},
         lambda p: -0.3 * p.margin - 0.1 * (p.chosen_length - p.rejected_length)),
        (bco_pair, {"beta": 0.3}, lambda p: -0.3 * p.margin),
        (sppo, {"eta": 3.0}, lambda p: -2 * 3.0 * p.margin),
        (exo, {"beta": 0.3, "label_smoothing": 0.2},
         lambda p: -math.log(4) * torch.tanh(0.3 * p.margin / 2)),
        (apo_down, {"beta": 0.3},
         lambda p: torch.sigmoid(0.3 * (p.chosen - p.ref_chosen)) - torch.sigmoid(0.3 * (p.rejected - p.ref_rejected))
         - torch.tanh(0.3 * p.margin / 2)),
    ],
)  # fmt: skip
def test_difference_to_the_swapped_pair(loss, arguments, difference):
    p = make_pairs()
    torch.testing.assert_close(loss(p, **arguments) - loss(swapped(p), **arguments), difference(p))


def test_sums_with_the_swapped_pair():
    p = make_pairs()
    two = torch.full_like(p.chosen, 2)
    torch.testing.assert_close(apo_zero(p) + apo_zero(swapped(p)), two)
    torch.testing.assert_close(hinge(p, beta=0.05) + hinge(swapped(p), beta=0.05), two)


EXTREMES = [(pw, pl, fw, fl, 3.0, 5.0) for pw in (0, -1e4) for pl in (0, -1e4) for fw in (0, -1e4) for fl in (0, -1e4)]
EXTREMES += [(-1e-7, -90.0, -90.0, -1e-7, 1.0, 1.0), (-90.0, -1e-7, -1e-7, -90.0, 1.0, 1.0)]


@EVERY_CASE
def test_extreme_values_in_float32_are_finite_with_finite_gradients(name, arguments):
    p = make_pairs(EXTREMES, torch.float32)
    assert PREFERENCE_LOSSES[name](p, **arguments).isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(PREFERENCE_LOSSES[name], p, **arguments))


@pytest.mark.parametrize("name", ["dpo", "robust", "ipo", "hinge", "exo", "rpo", "sppo"])
def test_a_hopelessly_misordered_pair_still_pushes(name):
    chosen, rejected, *_ = gradients(PREFERENCE_LOSSES[name], make_pairs([(-1e4, -1.0, -1.0, -1e4, 9.0, 9.0)]))
    if name != "exo":  # its divergence is reversed, and flat where the model is sure
        assert chosen.item() < 0 < rejected.item()
    assert chosen.isfinite().all()


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha"])
def test_f_dpo_still_pushes_a_chosen_answer_up_beyond_the_tangent(divergence):
    chosen, *_ = gradients(f_dpo, make_pairs([(-200.0, -10.0, -10.0, -10.0, 9.0, 9.0)]), divergence=divergence)
    assert chosen.item() < 0


def test_tangent_expm1_is_smooth_where_it_leaves_the_exponential():
    x = torch.tensor([-50.0, 0.0, 1e-9, 29.999, 30.001, 31.0], dtype=torch.float64, requires_grad=True)
    values = tangent_expm1(x)
    (slopes,) = torch.autograd.grad(values.sum(), x)
    expected = [math.expm1(v) for v in (-50.0, 0.0, 1e-9, 29.999)]
    expected += [math.expm1(30) + math.exp(30) * beyond for beyond in (0.001, 1.0)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)
    torch.testing.assert_close(slopes, x.detach().clamp(max=30).exp())


def test_log_odds_are_accurate_near_certainty_in_float32():
    logprob = torch.tensor([-1e-4, -0.1, -5.0, -40.0])
    expected = [p - math.log(-math.expm1(p)) for p in logprob.double().tolist()]
    torch.testing.assert_close(log_odds(logprob), torch.tensor(expected), rtol=1e-5, atol=0)
    assert log_odds(torch.zeros(1)).item() == pytest.approx(-math.log(1e-6), rel=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.5, -0.1])
def test_exo_rejects_a_label_smoothing_at_which_it_is_infinite_or_turned_round(rate):
    with pytest.raises(ValueError, match=r"label_smoothing must be in \(0, 0.5\)"):
        exo(make_pairs(), label_smoothing=rate)


@pytest.mark.parametrize("rate", [0.5, 0.7, -0.1])
def test_robust_rejects_flips_it_cannot_undo(rate):
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        robust(make_pairs(), label_smoothing=rate)


def test_chi_po_clips_a_difference_outside_twice_the_reward_bound():
    pair = with_margin(-6.0)
    assert chi_po(pair, beta=1.0, r_max=1.0).item() == pytest.approx(math.log(1 + math.exp(2)))
    assert all(gradient.item() == 0 for gradient in gradients(chi_po, pair, beta=1.0, r_max=1.0))


def test_aot_matches_ranks_by_hand():
    def pairs(u, v):
        zero, one = torch.zeros(2), torch.ones(2)
        return Pairs(torch.tensor(u), zero, torch.tensor(v), zero, one, one)

    # u = (3, 1), v = (0, 2): by rank 1 meets 0 and 3 meets 2, so both differences are 1.
    torch.testing.assert_close(aot(pairs([3.0, 1.0], [0.0, 2.0]), beta=1.0), torch.full((2,), math.log(1 + 1 / math.e)))
    # u = p_w - f_w = (3, -1), v = p_l - f_l = (0, 0): the differences are 3 and -1.
    unpaired = aot_unpaired(pairs([3.0, 1.0], [0.0, 2.0]), beta=1.0)
    torch.testing.assert_close(unpaired, torch.tensor([math.log(1 + math.exp(-3)), math.log(1 + math.e)]))


def test_aot_unpaired_ignores_which_rejected_answer_belongs_to_which_chosen_one():
    p = make_pairs()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    other = replace(p, rejected=p.rejected[order], ref_rejected=p.ref_rejected[order])
    torch.testing.assert_close(aot_unpaired(other), aot_unpaired(p), rtol=0, atol=0)


SPLIT_ROWS = [(-4.0, -5.2, -3.3, 0.0, -4.4, -4.9, -2.1, 0.0), (-7.7, -6.1, 0.0, -9.2, -7.2, -6.8, 0.0, -10.6)]


def split_pairs() -> LengthSplitPairs:
    columns = torch.tensor(SPLIT_ROWS, dtype=torch.float64).unbind(1)
    return LengthSplitPairs(*(column.clone().requires_grad_() for column in columns))


def literal_ld_dpo(row, *, beta=0.1, alpha=0.5):
    pw, pl, w_tail, l_tail, fw, fl, fw_tail, fl_tail = row
    chosen, rejected = pw + alpha * w_tail, pl + alpha * l_tail
    return literal.dpo(chosen, rejected, fw + alpha * fw_tail, fl + alpha * fl_tail, 1, 1, beta=beta)


@pytest.mark.parametrize("arguments", [{}, {"beta": 0.8, "alpha": 0.3}, {"alpha": 0.0}])
def test_ld_dpo_value_and_gradient_are_the_literal_ones(arguments):
    p = split_pairs()
    values = ld_dpo(p, **arguments)
    expected = torch.tensor([literal_ld_dpo(row, **arguments) for row in SPLIT_ROWS], dtype=torch.float64)
    torch.testing.assert_close(values, expected)
    inputs = list(vars(p).values())
    for column, gradient in enumerate(torch.autograd.grad(values.sum(), inputs)):
        slopes = [literal.derivative(lambda moved: literal_ld_dpo(moved, **arguments), r, column) for r in SPLIT_ROWS]
        torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_ld_dpo_with_whole_tails_is_dpo_and_with_agreeing_policies_ln_2():
    p = split_pairs()
    ones = torch.ones_like(p.chosen_head)
    whole = Pairs(
        p.chosen_head + p.chosen_tail,
        p.rejected_head + p.rejected_tail,
        p.ref_chosen_head + p.ref_chosen_tail,
        p.ref_rejected_head + p.ref_rejected_tail,
        ones,
        ones,
    )
    torch.testing.assert_close(ld_dpo(p, alpha=1.0), dpo(whole))
    same = replace(p, **{f"ref_{name}": getattr(p, name) for name in vars(p) if not name.startswith("ref_")})
    torch.testing.assert_close(ld_dpo(same), math.log(2) * ones)


def test_wpo_is_dpo_times_weights_that_pass_no_gradient():
    p = make_pairs()
    chosen_weight = torch.linspace(0.2, 1, len(ROWS), dtype=torch.float64, requires_grad=True)
    rejected_weight = torch.linspace(1, 0.3, len(ROWS), dtype=torch.float64, requires_grad=True)
    values = wpo(WeightedPairs(p, chosen_weight, rejected_weight))
    products = [0.2 * 1, 0.3 * 1]
    for row, product, index in ((ROWS[0], products[0], 0), (ROWS[-1], products[1], -1)):
        assert values[index].item() == pytest.approx(product * literal.dpo(*row, beta=0.01))
    chosen, weight = torch.autograd.grad(values.sum(), [p.chosen, chosen_weight], allow_unused=True)
    assert weight is None
    (plain,) = torch.autograd.grad(dpo(p, beta=0.01).sum(), p.chosen)
    torch.testing.assert_close(chosen, (chosen_weight * rejected_weight).detach() * plain)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_every_hyperparameter_is_keyword_only_with_a_default(name):
    _, *hyperparameters = inspect.signature(ALL_LOSSES[name]).parameters.values()
    for parameter in hyperparameters:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is not parameter.empty
