"""Draws: tokens chosen by hand values, the inverse CDF's edges, and uniform numbers that are uniform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from trimtab.sampling import draws
from trimtab.sampling.draws import (
    Choice,
    draw,
    inverse_cdf,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    logprobs_of,
    penalize,
    row_key,
    uniforms,
)

# ---- Choosing a token


def test_top_k_and_top_p_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    kept = lambda shaped: shaped.isfinite()[0].tolist()  # noqa: E731
    assert kept(keep_top_k(logits, 2)) == [True, True, False, False, False]
    assert kept(keep_top_k(logits, 9)) == [True] * 5
    # 0.5 reaches 0.5 by itself; 0.6 needs the second token; 0.71 the third.
    assert kept(keep_top_p(logits, 0.49)) == [True, False, False, False, False]
    assert kept(keep_top_p(logits, 0.6)) == [True, True, False, False, False]
    assert kept(keep_top_p(logits, 0.71)) == [True, True, True, False, False]
    assert kept(keep_top_p(logits, 1e-9)) == [True, False, False, False, False]
    # The order of the vocabulary does not matter.
    assert kept(keep_top_p(logits.flip(-1), 0.6)) == [False, False, False, True, True]


def test_top_p_finds_a_nucleus_larger_than_it_looks_at_first() -> None:
    logits = torch.zeros(2, 4000)
    logits[1, 7] = 50.0
    logits[0] -= torch.arange(4000) * 1e-5
    kept = keep_top_p(logits, 0.75).isfinite().sum(-1).tolist()
    probability = logits[0].double().softmax(-1).cumsum(-1)
    assert kept == [int((probability < 0.75).sum()) + 1, 1] and kept[0] > draws.NUCLEUS_TOKENS


def test_top_p_counts_what_top_k_left_at_the_temperature() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two that top-k leaves, the first has 4/7 = 0.571 of the probability.
    assert Choice(top_k=2, top_p=0.57).shape(logits).isfinite()[0].tolist() == [True, False, False, False]
    assert Choice(top_k=2, top_p=0.58).shape(logits).isfinite()[0].tolist() == [True, True, False, False]
    # At temperature 0.5 the probabilities are proportional to 16, 9, 4, 1.
    shaped = Choice(temperature=0.5).shape(logits).softmax(-1)
    torch.testing.assert_close(shaped, torch.tensor([[16.0, 9.0, 4.0, 1.0]]) / 30)


def test_min_p_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]]).log()
    assert keep_min_p(logits, 0.35).isfinite().tolist() == [[True, True, False, False, False], [True] * 5]
    assert keep_min_p(logits, 0.15).isfinite().tolist() == [[True, True, True, True, False], [True] * 5]
    # After the temperature: at 2, the second has sqrt(0.2 / 0.5) = 0.63 of the first's probability.
    assert Choice(temperature=2, min_p=0.6).shape(logits).isfinite()[0].tolist() == [True, True, False, False, False]


def test_repetition_penalty_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    seen = torch.tensor([[True, True, False, True]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, 0.0]]
    assert Choice(0.5, repetition_penalty=2.0).shape(logits, seen).tolist() == [[2.0, -8.0, 2.0, 0.0]]


def test_logprobs_are_exact_where_probabilities_are_not() -> None:
    logits = torch.tensor([[0.0, -50.0, -300.0], [1000.0, 1001.0, 999.0]])
    for ids in torch.tensor([[0, 0], [1, 1], [2, 2]]):
        expected = logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        found = logprobs_of(logits, logits.softmax(-1), ids)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [3, 256, 257, 1000])
def test_inverse_cdf_is_that_of_the_cumulative_sum(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    weights = torch.rand(50, vocabulary, generator=generator) * (torch.rand(50, vocabulary, generator=generator) > 0.5)
    weights[:, 1] = 0.5
    uniform = torch.rand(50, generator=generator, dtype=torch.float64)
    cumulative = weights.double().cumsum(-1)
    literal = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    assert torch.equal(inverse_cdf(weights, uniform), literal)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_ends_of_the_cdf_never_give_an_impossible_token(uniform: float) -> None:
    weights = torch.zeros(3, 700)
    weights[0, 299], weights[1, 0], weights[2, 256], weights[2, 600] = 0.3, 1.0, 1e-30, 0.7
    chosen = inverse_cdf(weights, torch.full((3,), uniform, dtype=torch.float64))
    assert chosen.tolist() == ([299, 0, 256] if uniform == 0 else [299, 0, 600])


def test_ruled_out_tokens_are_never_drawn() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).expand(2000, -1)
    uniform = uniforms(np.arange(2000, dtype=np.uint64), 0)
    drawn = draw(logits, Choice(top_k=3), uniform)
    assert set(drawn.ids.tolist()) == set(logits[0].topk(3).indices.tolist())


# ---- Uniform numbers


def test_split_mix_known_values() -> None:
    # The first outputs of the reference generator for seed 1234567, upper 53 bits.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = [float(uniforms(np.array([1234567], dtype=np.uint64), position)[0]) for position in range(3)]
    assert found == [(value >> 11) * 2.0**-53 for value in known]


def test_uniform_numbers_are_uniform_over_answers_and_over_positions() -> None:
    keys = np.array([row_key(0, [5, 6, 7], i) for i in range(5000)], dtype=np.uint64)
    over_answers = uniforms(keys, 3).numpy()
    over_positions = np.array([float(uniforms(keys[:1], position)[0]) for position in range(5000)])
    assert kstest(over_answers, "uniform").pvalue > 1e-3
    assert kstest(over_positions, "uniform").pvalue > 1e-3
    neighbours = np.corrcoef(over_positions[:-1], over_positions[1:])[0, 1]
    assert abs(neighbours) < 4 / 5000**0.5


def test_keys_depend_on_everything() -> None:
    prompts = ([1], [1, 2], [2, 1])
    keys = {row_key(s, p, i, t) for s in (0, 1, -1) for p in prompts for i in (0, 1) for t in (0, 1, 10**6)}
    assert len(keys) == 3 * 3 * 2 * 3
    assert row_key(0, [1], 0) == row_key(0, [1], 0, 0)
