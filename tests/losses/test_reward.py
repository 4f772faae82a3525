"""Losses of reward models: literal values and gradients, values by hand, limits, and rankings of unequal lengths."""

import math
from dataclasses import replace

import pytest
import torch

from tests.losses import literal
from trimtab.losses.reward import (
    RANKING_LOSSES,
    REWARD_LOSSES,
    PairScores,
    bradley_terry,
    choice,
    grouped,
    hinge,
    plackett_luce,
    ties,
)

# chosen, rejected, confidence, margin; away from the kinks of the hinge.
ROWS = [
    (1.2, -0.4, 1.0, 0.0),
    (0.3, 0.9, 1.0, 0.5),
    (-2.0, 1.5, 0.8, 0.0),
    (0.7, 0.6, 0.5, 0.0),
    (2.2, -1.9, 0.25, 1.0),
    (-0.8, -0.1, 0.0, 0.2),
]
CASES = [
    ("bradley_terry", {}),
    ("bradley_terry", {"label_smoothing": 0.2, "centring": 0.01, "margin_scale": 0.4}),
    ("ties", {}),
    ("ties", {"theta": 1.5, "centring": 0.01, "margin_scale": 0.4}),
    ("hinge", {}),
    ("hinge", {"delta": 0.4, "margin_scale": 2.0}),
]
LITERAL = {"bradley_terry": literal.bradley_terry, "ties": literal.ties, "hinge": literal.reward_hinge}
EVERY_CASE = pytest.mark.parametrize(("name", "arguments"), CASES)

RANKINGS = [[1.5, 0.2, -0.3], [0.1, 0.4], [2.0, 1.1, 1.3, -0.6, -0.5]]


def make(rows=ROWS, dtype=torch.float64) -> PairScores:
    columns = torch.tensor(rows, dtype=dtype).unbind(1)
    return PairScores(*(column.clone().requires_grad_() for column in columns))


def one(chosen, rejected, confidence=1.0, margin=0.0) -> PairScores:
    return make([(chosen, rejected, confidence, margin)])


def swapped(s: PairScores) -> PairScores:
    return PairScores(s.rejected, s.chosen, 1 - s.confidence, -s.margin)


def flat(rankings=RANKINGS, dtype=torch.float64):
    scores = torch.tensor([score for ranking in rankings for score in ranking], dtype=dtype, requires_grad=True)
    return scores, torch.tensor([len(ranking) for ranking in rankings])


@EVERY_CASE
def test_value_is_the_literal_one(name, arguments):
    expected = torch.tensor([LITERAL[name](*row, **arguments) for row in ROWS], dtype=torch.float64)
    torch.testing.assert_close(REWARD_LOSSES[name](make(), **arguments), expected, rtol=1e-10, atol=1e-12)


@EVERY_CASE
def test_gradient_is_the_literal_one(name, arguments):
    s = make()
    gradients = torch.autograd.grad(REWARD_LOSSES[name](s, **arguments).sum(), [s.chosen, s.rejected])
    for column, gradient in enumerate(gradients):
        slopes = [literal.derivative(lambda row: LITERAL[name](*row, **arguments), row, column) for row in ROWS]
        torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@EVERY_CASE
def test_extreme_scores_in_float32_are_finite_with_finite_gradients(name, arguments):
    s = make([(pw, pl, c, 0.0) for pw in (1e4, -1e4) for pl in (1e4, -1e4) for c in (0.0, 0.5, 1.0)], torch.float32)
    values = REWARD_LOSSES[name](s, **arguments)
    assert values.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(values.sum(), [s.chosen, s.rejected]))


@pytest.mark.parametrize(
    ("loss", "arguments", "scores", "expected"),
    [
        (bradley_terry, {}, one(0.7, 0.7), math.log(2)),
        (bradley_terry, {}, one(math.log(3), 0.0), math.log(4 / 3)),
        (bradley_terry, {}, one(1 + math.log(3), 0.0, margin=1.0), math.log(4 / 3)),
        (bradley_terry, {"margin_scale": 0.0}, one(math.log(3), 0.0, margin=1.0), math.log(4 / 3)),
        (bradley_terry, {}, one(math.log(3), 0.0, confidence=0.75), math.log(4) - 0.75 * math.log(3)),
        (bradley_terry, {"label_smoothing": 0.25}, one(math.log(3), 0.0), math.log(4) - 0.75 * math.log(3)),
        (bradley_terry, {"centring": 0.01}, one(3.0, 3.0), math.log(2) + 0.36),
        (ties, {}, one(0.4, 0.4), math.log(3)),
        (ties, {}, one(0.4, 0.4, confidence=0.5), math.log(3)),
        (ties, {}, one(math.log(4), 0.0), math.log(3 / 2)),
        (hinge, {}, one(0.6, 0.2), 0.6),
        (hinge, {}, one(3.0, 0.2), 0.0),
        (hinge, {}, one(0.6, 0.2, margin=0.5), 1.1),
    ],
)
def test_value_by_hand(loss, arguments, scores, expected):
    assert loss(scores, **arguments).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_a_pair_written_the_other_way_round_says_the_same(name):
    torch.testing.assert_close(REWARD_LOSSES[name](swapped(make())), REWARD_LOSSES[name](make()))


@pytest.mark.parametrize("confidence", [0.6, 0.75, 0.9])
def test_bradley_terry_is_smallest_where_the_model_is_as_sure_as_the_label(confidence):
    best = one(math.log(confidence / (1 - confidence)), 0.0, confidence)
    (gradient,) = torch.autograd.grad(bradley_terry(best).sum(), best.chosen)
    assert gradient.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_a_tie_is_smallest_at_equal_scores(name):
    at = [REWARD_LOSSES[name](one(gap, 0.0, confidence=0.5)).item() for gap in (-2.0, -0.1, 0.0, 0.1, 2.0)]
    assert min(at) == at[2]
    assert at[0] == pytest.approx(at[4])
    assert at[0] > at[2]


@pytest.mark.parametrize("gap", [-3.0, 0.0, 0.4, 5.0])
def test_win_loss_and_tie_have_probabilities_that_sum_to_one(gap):
    outcomes = [math.exp(-ties(one(gap, 0.0, confidence), theta=1.7).item()) for confidence in (0.0, 0.5, 1.0)]
    assert sum(outcomes) == pytest.approx(1, rel=1e-12)


def test_ties_with_theta_near_one_is_bradley_terry_on_decided_pairs():
    decided = make([(pw, pl, round(c), m) for pw, pl, c, m in ROWS if c != 0.5])
    torch.testing.assert_close(ties(decided, theta=1 + 1e-9), bradley_terry(decided), rtol=1e-7, atol=1e-8)


def test_centring_settles_the_constant_that_bradley_terry_leaves_free():
    s = make()
    moved = replace(s, chosen=s.chosen + 2.0, rejected=s.rejected + 2.0)
    torch.testing.assert_close(bradley_terry(s), bradley_terry(moved))
    assert (bradley_terry(moved, centring=0.1).sum() > bradley_terry(s, centring=0.1).sum()).item()


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_ranking_value_is_the_literal_one(name):
    expected = torch.tensor([getattr(literal, name)(ranking) for ranking in RANKINGS], dtype=torch.float64)
    torch.testing.assert_close(RANKING_LOSSES[name](*flat()), expected, rtol=1e-12, atol=0)
    single = RANKING_LOSSES[name](*flat(dtype=torch.float32))
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_ranking_gradient_is_the_literal_one(name):
    scores, sizes = flat()
    (gradient,) = torch.autograd.grad(RANKING_LOSSES[name](scores, sizes).sum(), scores)
    slopes = [literal.derivative(getattr(literal, name), r, i) for r in RANKINGS for i in range(len(r))]
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_a_ranking_does_not_feel_its_neighbours(name):
    together = RANKING_LOSSES[name](*flat())
    alone = torch.cat([RANKING_LOSSES[name](*flat([ranking])) for ranking in RANKINGS])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_two_answers_are_bradley_terry(name):
    rankings = [[pw, pl] for pw, pl, *_ in ROWS]
    certain = make([(pw, pl, 1.0, 0.0) for pw, pl, *_ in ROWS])
    torch.testing.assert_close(RANKING_LOSSES[name](*flat(rankings)), bradley_terry(certain))


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_extreme_rankings_in_float32_are_finite_with_finite_gradients(name):
    scores, sizes = flat([[1e4, 0.0, -1e4], [-1e4, 1e4], [-1e4, 0.0, 1e4, -1e4]], torch.float32)
    values = RANKING_LOSSES[name](scores, sizes)
    (gradient,) = torch.autograd.grad(values.sum(), scores)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [2, 4, 9])
def test_values_of_equal_scores_by_hand(size):
    scores, sizes = flat([[0.3] * size])
    assert grouped(scores, sizes).item() == pytest.approx(math.log(2))
    assert plackett_luce(scores, sizes).item() == pytest.approx(math.lgamma(size + 1))
    assert choice(scores, sizes).item() == pytest.approx(math.log(size))


def test_choice_ignores_the_order_of_the_answers_that_were_not_chosen():
    reordered = [[ranking[0], *reversed(ranking[1:])] for ranking in RANKINGS]
    torch.testing.assert_close(choice(*flat(reordered)), choice(*flat()))
    assert not torch.allclose(plackett_luce(*flat(reordered))[0], plackett_luce(*flat())[0])


def test_scores_that_do_not_fit_the_sizes_are_our_mistake():
    scores, sizes = flat()
    with pytest.raises(AssertionError, match="10 answers in the rankings, 9 scores"):
        grouped(scores[:-1], sizes)
    with pytest.raises(AssertionError, match="fewer than two"):
        grouped(scores[:1], torch.tensor([1]))
