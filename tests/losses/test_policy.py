"""Policy losses: literal values and gradients, what is clipped, ratio 1, masks, extreme inputs, figures, averages."""

import math
from dataclasses import replace

import pytest
import torch

from tests.losses import literal
from trimtab.advantages import ADVANTAGES, SCORE_SHAPES
from trimtab.algorithms import ALGORITHMS
from trimtab.batches import Mean, mean_over
from trimtab.kl import KL_ESTIMATORS, KL_LOSSES
from trimtab.losses.arguments import check_arguments, combine, parse_arguments
from trimtab.losses.policy import (
    POLICY_LOSSES,
    PolicyTerms,
    cispo,
    clip_fraction,
    gspo,
    ppo_clip,
    ratio_statistics,
    reinforce,
    sequence_ratio,
    token_ratio,
)
from trimtab.losses.value import VALUE_LOSSES

MASK = torch.tensor(
    [[False, True, True, True, False], [False, False, True, False, True], [False, True, True, True, True]]
)
BAD = [float("nan"), float("inf"), float("-inf")]
CASES = [
    ("reinforce", {}),
    ("ppo_clip", {}),
    ("ppo_clip", {"epsilon": 0.1, "epsilon_high": 0.6}),
    ("ppo_clip", {"dual_clip": 1.5}),
    ("cispo", {}),
    ("cispo", {"max_ratio": 1.1}),
]
EVERY_CASE = pytest.mark.parametrize(("name", "arguments"), CASES)
KINDS = ("sequences", "tokens", "constant", "sums")


def make(seed: int = 0, shift: float = 0.8, dtype=torch.float64) -> PolicyTerms:
    """Ratios between about exp(-shift) and exp(shift), advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(3, 5, generator=generator, dtype=dtype)
    moved = shift * (2 * torch.rand(3, 5, generator=generator, dtype=dtype) - 1)
    advantages = torch.randn(3, 5, generator=generator, dtype=dtype)
    return PolicyTerms((old + moved).requires_grad_(), old, advantages, MASK)


def constant_per_answer(p: PolicyTerms) -> PolicyTerms:
    return replace(p, advantages=p.advantages[:, 2:3].expand(-1, 5))


def gradient(values: torch.Tensor, p: PolicyTerms) -> torch.Tensor:
    return torch.autograd.grad(values.sum(), p.logprobs)[0]


def tokens(p: PolicyTerms) -> list[tuple[tuple[int, int], float, float, float]]:
    """Place, log-probability, old one and advantage of every token of the mask."""
    columns = (p.logprobs, p.old_logprobs, p.advantages)
    return [(place, *(c[place].item() for c in columns)) for place in map(tuple, MASK.nonzero().tolist())]


@EVERY_CASE
def test_value_is_the_literal_one(name, arguments):
    p, twin = make(), getattr(literal, f"policy_{name}")
    found = POLICY_LOSSES[name](p, **arguments)
    for place, *row in tokens(p):
        assert found[place].item() == pytest.approx(twin(*row, **arguments), rel=1e-12)
    assert not found[~MASK].any()
    single = POLICY_LOSSES[name](
        PolicyTerms(p.logprobs.float(), p.old_logprobs.float(), p.advantages.float(), MASK), **arguments
    )
    torch.testing.assert_close(single, found.float(), rtol=1e-5, atol=1e-6)


@EVERY_CASE
def test_gradient_is_the_literal_one(name, arguments):
    p, twin = make(), getattr(literal, f"policy_{name}")
    slopes = gradient(POLICY_LOSSES[name](p, **arguments), p)
    for place, logprob, old, advantage in tokens(p):
        fixed = {**arguments, "frozen": logprob} if name == "cispo" else arguments
        expected = literal.derivative(lambda row, fixed=fixed: twin(*row, **fixed), (logprob, old, advantage), 0)
        assert slopes[place].item() == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert not slopes[~MASK].any()


@pytest.mark.parametrize("arguments", [{}, {"epsilon": 0.3, "epsilon_high": 0.2}])
def test_gspo_is_the_literal_loss_of_answers(arguments):
    p = constant_per_answer(make(shift=0.3))
    losses = gspo(p, **arguments)
    mean = mean_over("sequences", losses, MASK, length=5)
    slopes = gradient(mean.total, p)
    for row in range(3):
        inside = MASK[row]
        now, old = p.logprobs[row, inside].tolist(), p.old_logprobs[row, inside].tolist()
        advantage = p.advantages[row, 0].item()
        expected = literal.policy_gspo(now, old, advantage, **arguments)
        torch.testing.assert_close(losses[row, inside], torch.full((len(now),), expected, dtype=torch.float64))
        for i, t in enumerate(inside.nonzero()[:, 0].tolist()):

            def moved(column, i=i, now=now, old=old, advantage=advantage):
                return literal.policy_gspo([*now[:i], *column, *now[i + 1 :]], old, advantage, **arguments)

            assert slopes[row, t].item() == pytest.approx(literal.derivative(moved, (now[i],), 0), rel=1e-7, abs=1e-9)


def test_gspo_ratio_is_the_geometric_mean_of_the_tokens_ratios():
    p = make()
    found, tokenwise = sequence_ratio(p), token_ratio(p)
    for row in range(3):
        ratios = tokenwise[row, MASK[row]].tolist()
        expected = math.prod(ratios) ** (1 / len(ratios))
        assert found[row, MASK[row]].tolist() == pytest.approx([expected] * len(ratios))


def by_hand(ratio: float, advantage: float) -> tuple[PolicyTerms, torch.Tensor]:
    one = torch.zeros(1, 1, dtype=torch.float64)
    logprobs = (one - 1 + math.log(ratio)).requires_grad_()
    return PolicyTerms(logprobs, one - 1, one + advantage, torch.ones(1, 1, dtype=torch.bool)), logprobs


@pytest.mark.parametrize(
    ("ratio", "advantage", "arguments", "loss", "slope"),
    [
        (1.5, 2.0, {}, -2.4, 0.0),  # gained enough already
        (1.5, -2.0, {}, 3.0, 3.0),  # wrong direction: pulled back
        (0.5, 2.0, {}, -1.0, -1.0),  # wrong direction
        (0.5, -2.0, {}, 1.6, 0.0),  # lost enough already
        (1.25, 2.0, {"epsilon_high": 0.28}, -2.5, -2.5),  # DAPO's wider upper side
        (0.75, -2.0, {"epsilon_high": 0.28}, 1.6, 0.0),  # and the same lower side
        (4.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),  # dual clip: at most c times -A
        (2.5, -2.0, {"dual_clip": 3.0}, 5.0, 5.0),
        (4.0, 2.0, {"dual_clip": 3.0}, -2.4, 0.0),  # which is about negative advantages only
    ],
)
def test_ppo_clip_by_hand(ratio, advantage, arguments, loss, slope):
    p, logprobs = by_hand(ratio, advantage)
    found = ppo_clip(p, **arguments)
    assert found.item() == pytest.approx(loss)
    assert torch.autograd.grad(found.sum(), logprobs)[0].item() == pytest.approx(slope)


@pytest.mark.parametrize(("ratio", "slope"), [(0.5, -1.0), (3.0, -6.0), (50.0, -10.0)])
def test_cispo_keeps_the_gradient_of_clipped_tokens(ratio, slope):
    p, logprobs = by_hand(ratio, 2.0)
    assert torch.autograd.grad(cispo(p).sum(), logprobs)[0].item() == pytest.approx(slope)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_ratio_one_every_loss_has_the_gradient_of_reinforce(name):
    p = make(shift=0.0)
    torch.testing.assert_close(gradient(POLICY_LOSSES[name](p), p), gradient(reinforce(p), p), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("bad", BAD)
def test_nothing_outside_the_mask_reaches_a_loss_or_its_gradient(name, bad):
    p = constant_per_answer(make())
    columns = (torch.where(MASK, column.detach(), bad) for column in (p.logprobs, p.old_logprobs, p.advantages))
    logprobs, old, advantages = columns
    dirty = PolicyTerms(logprobs.requires_grad_(), old, advantages, MASK)
    found, clean = POLICY_LOSSES[name](dirty), POLICY_LOSSES[name](p)
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    torch.testing.assert_close(gradient(found, dirty), gradient(clean, p), rtol=0, atol=0)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_extreme_ratios_in_float32_are_finite_with_finite_gradients(name):
    old = torch.tensor([[0.0, 0.0, -1e4, -1e4, -200.0, -100.0]])
    logprobs = torch.tensor([[-1e4, -1e4, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    p = PolicyTerms(
        logprobs, old, torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, -1.0]]), torch.ones(1, 6, dtype=torch.bool)
    )
    values = POLICY_LOSSES[name](p)
    assert values.isfinite().all() and gradient(values, p).isfinite().all()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_padding_and_the_order_of_rows_change_nothing(name):
    p = constant_per_answer(make())
    columns = (p.logprobs.detach(), p.old_logprobs, p.advantages, MASK)
    wide = PolicyTerms(*(torch.nn.functional.pad(c, (2, 3)).flip(0) for c in columns))
    torch.testing.assert_close(POLICY_LOSSES[name](wide).flip(0)[:, 2:-3], POLICY_LOSSES[name](p).detach())


# ---- Figures


def test_figures_of_an_untouched_policy():
    p = make(shift=0.0)
    figures = {name: mean.item() for name, mean in ratio_statistics(p).items()}
    assert figures == {"ratio": 1.0, "ratio_spread": 0.0, "old_kl": 0.0}
    assert clip_fraction(p, token_ratio(p)).item() == 0


def test_figures_by_hand():
    p = make()
    rows = tokens(p)
    logs = [now - old for _, now, old, _ in rows]
    ratios = list(map(math.exp, logs))
    figures = {name: mean.item() for name, mean in ratio_statistics(p).items()}
    count = len(rows)
    assert figures["ratio"] == pytest.approx(sum(ratios) / count)
    assert figures["ratio_spread"] == pytest.approx(sum((r - 1) ** 2 for r in ratios) / count)
    assert figures["old_kl"] == pytest.approx(sum(r - 1 - d for r, d in zip(ratios, logs, strict=True)) / count)


@pytest.mark.parametrize("arguments", [{}, {"epsilon": 0.05}, {"epsilon_high": 0.6}])
def test_clip_fraction_is_the_share_of_tokens_without_gradient(arguments):
    p = make()
    stopped = (gradient(ppo_clip(p, **arguments), p)[MASK] == 0).double().mean().item()
    assert clip_fraction(p, token_ratio(p), **arguments).item() == pytest.approx(stopped)
    assert 0 < stopped < 1


def test_clip_fraction_of_gspo_is_about_whole_answers():
    p = constant_per_answer(make())
    stopped = (gradient(gspo(p), p)[MASK] == 0).double().mean().item()
    found = clip_fraction(p, sequence_ratio(p), epsilon=3e-4, epsilon_high=4e-4).item()
    assert found == pytest.approx(stopped)
    assert found > 0


def test_figures_read_nothing_outside_the_mask():
    p = make()
    columns = (torch.where(MASK, c.detach(), float("nan")) for c in (p.logprobs, p.old_logprobs, p.advantages))
    dirty = PolicyTerms(*columns, MASK)
    for name, mean in ratio_statistics(dirty).items():
        assert mean.item() == ratio_statistics(p)[name].item()
    assert clip_fraction(dirty, token_ratio(dirty)).item() == clip_fraction(p, token_ratio(p)).item()


# ---- Averages


def test_averages_by_hand():
    losses = torch.tensor([[1.0, 3.0, 9.0, 9.0], [2.0, 2.0, 2.0, 6.0], [float("nan")] * 4])
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    found = {kind: mean_over(kind, losses, mask, length=10).item() for kind in KINDS}
    assert found == pytest.approx({"sequences": 2.5, "tokens": 16 / 6, "constant": 16 / 20, "sums": 8.0})


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_to_the_same_mean_and_gradient(kind):
    p = make()
    whole = mean_over(kind, ppo_clip(p), MASK, length=7)
    expected = torch.autograd.grad(whole.total / whole.count, p.logprobs)[0]
    parts: list[Mean] = []
    for rows in ([0, 2], [1]):
        part = PolicyTerms(p.logprobs[rows], p.old_logprobs[rows], p.advantages[rows], MASK[rows])
        parts.append(mean_over(kind, ppo_clip(part), MASK[rows], length=7))
    total = parts[0] + parts[1]
    assert total.item() == pytest.approx(whole.item())
    found = sum(torch.autograd.grad(part.total, p.logprobs, retain_graph=True)[0] for part in parts) / total.count
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_averages_ignore_rows_without_tokens_and_padding(kind):
    losses, mask = make().advantages, MASK
    expected = mean_over(kind, losses, mask, length=7).item()
    more = torch.nn.functional.pad(losses, (2, 1, 0, 1), value=float("inf"))
    assert mean_over(kind, more, torch.nn.functional.pad(mask, (2, 1, 0, 1)), length=7).item() == pytest.approx(
        expected
    )


def test_averages_agree_for_answers_of_one_length_up_to_scale():
    losses, mask = torch.randn(4, 6, dtype=torch.float64), torch.ones(4, 6, dtype=torch.bool)
    found = {kind: mean_over(kind, losses, mask, length=6).item() for kind in KINDS}
    assert found["sequences"] == pytest.approx(found["tokens"]) == pytest.approx(found["constant"])
    assert found["sums"] == pytest.approx(6 * found["tokens"])


# ---- The table


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_name_of_a_row_resolves(name):
    row = ALGORITHMS[name]
    assert row.advantage in ADVANTAGES
    assert row.kl in (KL_ESTIMATORS if row.kl_in == "reward" else KL_LOSSES)
    assert row.mean_over in KINDS
    assert row.score_shape in SCORE_SHAPES
    assert row.value_loss in ("", *VALUE_LOSSES)
    assert (row.advantage == "gae") == row.critic
    combine(POLICY_LOSSES, row.loss, row.loss_arguments)
    check_arguments(ADVANTAGES[row.advantage], parse_arguments(row.advantage_arguments))
    assert row.epochs * row.minibatches == 1 or row.loss != "reinforce", "a second update needs a ratio"


def test_an_optional_argument_can_be_given_and_taken_back():
    assert combine(POLICY_LOSSES, "ppo_clip", ["epsilon_high=0.28"]).terms[0].arguments == {"epsilon_high": 0.28}
    assert combine(POLICY_LOSSES, "ppo_clip", ["epsilon_high=none"]).terms[0].arguments == {"epsilon_high": None}
    with pytest.raises(ValueError, match="epsilon_high must be at least 0"):
        combine(POLICY_LOSSES, "ppo_clip", ["epsilon_high=-1"])
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        combine(POLICY_LOSSES, "ppo_clip", ["dual_clip=0.5"])
