"""Advantages: values by hand, literal twins, holes in masks, answers that are left out, whitening, running state."""

import math
import statistics
from dataclasses import asdict, replace

import pytest
import torch

from trimtab.advantages import (
    ADVANTAGES,
    COMPARING,
    SCORE_SHAPES,
    SEQUENCE_ADVANTAGES,
    RunningBaseline,
    RunningMoments,
    Scores,
    batch_centred,
    centred,
    ema,
    gae,
    grpo,
    normalized,
    raw,
    reinforce_pp,
    remax,
    reward_to_go,
    rloo,
    scaled,
    spread,
    whiten,
    with_unfinished_score,
)

SCORES = [1.0, 4.0, -2.0, 0.5, 3.0, 3.0]
BASELINE = [0.5, 0.5, 0.5, 1.0, 1.0, 1.0]
BAD = [float("nan"), float("inf"), float("-inf")]


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make(scores=SCORES, size: int = 3, valid=None, baseline=None) -> Scores:
    valid = [True] * len(scores) if valid is None else valid
    baseline = [0.0] * len(scores) if baseline is None else baseline
    return Scores(doubles(scores), torch.tensor(valid), doubles(baseline), size)


def literal(name: str, scores, valid, baseline, size: int) -> list[float]:
    """The advantages once more, answer by answer, with plain floats."""
    found = []
    for i, score in enumerate(scores):
        start = 0 if name == "batch_centred" else i // size * size
        end = len(scores) if name == "batch_centred" else start + size
        group = [scores[j] for j in range(start, end) if valid[j]]
        others = [scores[j] for j in range(start, end) if valid[j] and j != i]
        if not valid[i]:
            found.append(0.0)
        elif name in {"remax", "ema"}:
            found.append(score - baseline[i])
        elif name == "rloo":
            found.append(score - statistics.fmean(others) if others else 0.0)
        elif name == "grpo":
            std = statistics.stdev(group) if len(group) > 1 else 0.0
            found.append((score - statistics.fmean(group)) / (std + 1e-4))
        else:
            found.append(score - statistics.fmean(group))
    return found


@pytest.mark.parametrize("name", SEQUENCE_ADVANTAGES)
@pytest.mark.parametrize(
    "valid", [[True] * 6, [True, False, True, True, True, True], [False] * 3 + [True, False, False]]
)
def test_sequence_advantages_are_the_literal_ones(name, valid):
    found = SEQUENCE_ADVANTAGES[name](make(valid=valid, baseline=BASELINE))
    expected = literal(name, SCORES, valid, BASELINE, 3)
    torch.testing.assert_close(found, doubles(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SEQUENCE_ADVANTAGES)
@pytest.mark.parametrize("bad", BAD)
def test_the_score_of_an_answer_that_is_left_out_may_be_anything(name, bad):
    valid = [True, False, True, True, True, True]
    clean = SEQUENCE_ADVANTAGES[name](make(valid=valid))
    dirty = SEQUENCE_ADVANTAGES[name](make([1.0, bad, *SCORES[2:]], valid=valid))
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert clean[1] == 0


def test_advantages_by_hand():
    torch.testing.assert_close(centred(make()), doubles([0.0, 3.0, -3.0, -5 / 3, 5 / 6, 5 / 6]))
    torch.testing.assert_close(rloo(make()), doubles([0.0, 4.5, -4.5, -2.5, 1.25, 1.25]))
    torch.testing.assert_close(remax(make(baseline=BASELINE)), doubles([0.5, 3.5, -2.5, -0.5, 2.0, 2.0]))
    torch.testing.assert_close(ema(make(baseline=BASELINE)), remax(make(baseline=BASELINE)))
    two = make([5.0, 1.0], 2)
    torch.testing.assert_close(grpo(two, eps=1e-9, correction=0), doubles([1.0, -1.0]))
    torch.testing.assert_close(grpo(two, eps=1e-9), doubles([1.0, -1.0]) / math.sqrt(2))


@pytest.mark.parametrize("size", [2, 3, 6])
def test_rloo_is_a_multiple_of_dr_grpo(size):
    torch.testing.assert_close(rloo(make(size=size)), size / (size - 1) * ADVANTAGES["dr_grpo"](make(size=size)))


def test_one_group_is_the_batch():
    torch.testing.assert_close(batch_centred(make(size=2)), centred(make(size=6)))


@pytest.mark.parametrize("name", sorted(COMPARING))
def test_a_constant_added_to_a_group_changes_nothing(name):
    moved = make([s + 7.0 if i < 3 else s for i, s in enumerate(SCORES)])
    torch.testing.assert_close(SEQUENCE_ADVANTAGES[name](moved), SEQUENCE_ADVANTAGES[name](make()))


@pytest.mark.parametrize("value", [0.1, 1e6, -3.3333])
@pytest.mark.parametrize("name", sorted(COMPARING))
def test_a_group_without_spread_gets_exactly_nothing(name, value):
    alike = make([value] * 7, 7)
    alike = replace(alike, scores=alike.scores.float())
    assert SEQUENCE_ADVANTAGES[name](alike).tolist() == [0.0] * 7


@pytest.mark.parametrize("name", sorted(COMPARING))
def test_a_group_of_one_is_refused(name):
    with pytest.raises(ValueError, match="--group-size 2"):
        SEQUENCE_ADVANTAGES[name](make(size=1))


def test_grpo_makes_easy_and_hard_prompts_weigh_more():
    # One of eight right against four of eight: without the division the even prompt has the larger advantages in sum.
    hard, even = make([1.0] + [0.0] * 7, 8), make([1.0] * 4 + [0.0] * 4, 8)
    assert centred(hard).abs().max() / centred(even).abs().max() == pytest.approx(1.75)
    assert grpo(hard).abs().max() / grpo(even).abs().max() == pytest.approx(2.65, abs=0.01)


def test_spread_puts_an_answers_advantage_on_its_tokens():
    mask = torch.tensor([[False, True, True], [False, True, False]])
    assert spread(doubles([2.0, -1.0]), mask).tolist() == [[0.0, 2.0, 2.0], [0.0, -1.0, 0.0]]
    assert spread(doubles([2.0, float("nan")]), mask & (torch.arange(2) == 0)[:, None])[1].tolist() == [0.0] * 3


# ---- Token-level advantages


def literal_gae(rewards, values, mask, gamma: float, lam: float) -> list[float]:
    """Row by row: the sum over l of (gamma lam)^l delta_(t+l), over the tokens of the mask in order."""
    places = [t for t, inside in enumerate(mask) if inside]
    found = [0.0] * len(mask)
    for i, t in enumerate(places):
        for later in range(i, len(places)):
            following = values[places[later + 1]] if later + 1 < len(places) else 0.0
            delta = rewards[places[later]] + gamma * following - values[places[later]]
            found[t] += (gamma * lam) ** (later - i) * delta
    return found


def random_rows(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(6, 7, generator=generator) < 0.6
    mask[4] = False
    mask[5] = True
    return rewards, values, mask


def test_gae_by_hand():
    rewards, values = doubles([[0.0, -0.1, -0.2, 1.0]]), doubles([[9.0, 0.5, 0.6, 0.8]])
    mask = torch.tensor([[False, True, True, True]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    # deltas: -0.1 + 0.6 - 0.5 = 0; -0.2 + 0.8 - 0.6 = 0; 1 + 0 - 0.8 = 0.2
    torch.testing.assert_close(advantages, doubles([[0.0, 0.05, 0.1, 0.2]]))
    torch.testing.assert_close(returns, doubles([[0.0, 0.55, 0.7, 1.0]]))


def test_gae_by_hand_with_a_hole():
    rewards, values = doubles([[0.5, 7.0, 1.0]]), doubles([[0.2, 7.0, 0.4]])
    advantages, returns = gae(rewards, values, torch.tensor([[True, False, True]]), gamma=0.5, lam=0.5)
    # deltas: 0.5 + 0.5 * 0.4 - 0.2 = 0.5; 1 - 0.4 = 0.6; 0.5 + 0.25 * 0.6 = 0.65
    torch.testing.assert_close(advantages, doubles([[0.65, 0.0, 0.6]]))
    torch.testing.assert_close(returns, doubles([[0.85, 0.0, 1.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_gae_is_the_literal_one(gamma, lam):
    rewards, values, mask = random_rows()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    rows = zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True)
    expected = doubles([literal_gae(*row, gamma, lam) for row in rows])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + torch.where(mask, values, 0))


def test_holes_take_no_time():
    rewards, values, mask = random_rows(1)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for row in range(6):
        inside = mask[row]
        dense = torch.ones(1, int(inside.sum()), dtype=torch.bool)
        alone, _ = gae(rewards[row : row + 1, inside], values[row : row + 1, inside], dense, gamma=0.9, lam=0.8)
        torch.testing.assert_close(advantages[row, inside], alone[0])


def test_without_a_critic_gae_at_one_is_reward_to_go():
    rewards, _, mask = random_rows(2)
    to_go = torch.where(mask, torch.where(mask, rewards, 0).flip(-1).cumsum(-1).flip(-1), 0)
    advantages, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    for found in (advantages, returns, reward_to_go(rewards, mask)):
        torch.testing.assert_close(found, to_go)


def test_with_a_perfect_critic_nothing_is_a_surprise():
    rewards, _, mask = random_rows(3)
    advantages, returns = gae(rewards, reward_to_go(rewards, mask), mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))
    torch.testing.assert_close(returns, reward_to_go(rewards, mask))


@pytest.mark.parametrize("bad", BAD)
def test_token_advantages_read_nothing_outside_the_mask(bad):
    rewards, values, mask = random_rows(4)
    dirty_rewards, dirty_values = torch.where(mask, rewards, bad), torch.where(mask, values, bad)
    pairs = [
        (gae(dirty_rewards, dirty_values, mask), gae(rewards, values, mask)),
        (reward_to_go(dirty_rewards, mask), reward_to_go(rewards, mask)),
        (reinforce_pp(dirty_rewards, mask), reinforce_pp(rewards, mask)),
        (whiten(dirty_rewards, mask), whiten(rewards, mask)),
        (whiten(dirty_rewards, mask, shift_mean=False), whiten(rewards, mask, shift_mean=False)),
    ]
    for found, clean in pairs:
        torch.testing.assert_close(found, clean, rtol=0, atol=0)
    assert not any(values[~mask].any() for values in (*pairs[0][0], *(found for found, _ in pairs[1:])))


def test_padding_changes_nothing():
    rewards, values, mask = random_rows(5)
    wide = torch.nn.functional.pad
    for left, right in ((3, 0), (0, 2)):
        padded = [wide(rewards, (left, right), value=5.0), wide(values, (left, right), value=5.0)]
        found, _ = gae(*padded, wide(mask, (left, right)))
        torch.testing.assert_close(found[:, left : left + 7], gae(rewards, values, mask)[0])


# ---- Whitening


def test_whitening_is_over_the_mask():
    values, _, mask = random_rows(6)
    inside = values[mask].tolist()
    mean, std = statistics.fmean(inside), statistics.pstdev(inside)
    expected = doubles([(x - mean) / std for x in inside])
    torch.testing.assert_close(whiten(values, mask)[mask], expected, rtol=1e-6, atol=1e-6)
    unshifted = whiten(values, mask, shift_mean=False)[mask]
    torch.testing.assert_close(unshifted, doubles(inside) / std, rtol=1e-6, atol=1e-6)


def test_whitening_of_equal_values_and_of_nothing():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert not whiten(torch.full((2, 3), 0.1), mask).any()
    assert not whiten(torch.randn(2, 3), ~mask).any()
    assert whiten(torch.full((2, 3), 0.1), mask).dtype == torch.float32


def test_reinforce_pp_is_blind_to_the_scale_and_zero_of_rewards_at_the_end():
    _, _, mask = random_rows(7)
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    scores = torch.randn(6, 1, dtype=torch.float64)
    found = reinforce_pp(torch.where(last, scores, 0), mask)
    torch.testing.assert_close(reinforce_pp(torch.where(last, 5 * scores + 3, 0), mask), found, rtol=1e-6, atol=1e-6)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-12)


# ---- Running state and scores


def test_running_baseline_forgets_and_is_corrected_for_its_start():
    valid = torch.tensor([True, True, False])
    baseline = RunningBaseline(decay=0.5)
    assert baseline.value == 0
    baseline = baseline.update(doubles([1.0, 3.0, float("nan")]), valid)
    assert baseline.value == 2.0
    baseline = baseline.update(doubles([5.0, 5.0, float("nan")]), valid)
    assert baseline.value == pytest.approx((0.5 * 2 + 5) / 1.5)
    assert baseline.update(doubles([9.0] * 3), torch.zeros(3, dtype=torch.bool)) is baseline
    assert RunningBaseline(**asdict(baseline)) == baseline


def test_running_baseline_without_forgetting_is_the_mean_of_all_steps():
    baseline = RunningBaseline(decay=1.0)
    for score in (1.0, 2.0, 6.0):
        baseline = baseline.update(doubles([score]), torch.tensor([True]))
    assert baseline.value == pytest.approx(3.0)


def test_running_moments_are_those_of_everything_so_far():
    scores = torch.randn(100, generator=torch.Generator().manual_seed(8), dtype=torch.float64) * 3 + 40
    moments = RunningMoments()
    for part in scores.split([1, 7, 42, 50]):
        padded = torch.cat([part, doubles([float("inf")])])
        moments = moments.update(padded, padded.isfinite())
    assert moments.count == 100
    assert moments.mean == pytest.approx(statistics.fmean(scores.tolist()), rel=1e-12)
    assert moments.std == pytest.approx(statistics.stdev(scores.tolist()), rel=1e-12)
    assert RunningMoments(**asdict(moments)) == moments


def test_scores_without_spread_are_not_blown_up():
    moments = RunningMoments()
    for _ in range(3):
        moments = moments.update(doubles([0.1, 0.1, 0.1]), torch.ones(3, dtype=torch.bool))
    assert moments.std == 1.0
    torch.testing.assert_close(normalized(doubles([0.1]), moments), doubles([0.0]))


def test_score_shapes_by_hand():
    moments = RunningMoments(count=3, mean=2.0, squares=8.0)
    scores = doubles([2.0, 3.0, 10.0, -10.0])
    assert moments.std == 2.0
    torch.testing.assert_close(normalized(scores, moments), doubles([0.0, 0.5, 0.8, -0.8]))
    torch.testing.assert_close(scaled(scores, moments), doubles([1.0, 1.5, 5.0, -5.0]))
    torch.testing.assert_close(raw(scores, moments), scores)
    for shape in SCORE_SHAPES.values():
        assert shape(scores, moments, clip=0.25).abs().max() == 0.25


def test_answers_without_an_end_get_one_score():
    found = with_unfinished_score(doubles([3.0, 0.5]), torch.tensor([False, True]), -1.0)
    assert found.tolist() == [-1.0, 0.5]
