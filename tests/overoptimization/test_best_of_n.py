"""Best-of-n against the enumeration of every subset."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from trimtab.overoptimization.best_of_n import best_of, expected_best_of_n, kl_bound


def enumerated(proxy: list[float], gold: list[float], n: int) -> float:
    """The mean, over every subset of n answers, of the mean gold score of its answers with the highest proxy score."""
    values = []
    for subset in combinations(range(len(proxy)), n):
        highest = max(proxy[i] for i in subset)
        best = [gold[i] for i in subset if proxy[i] == highest]
        values.append(sum(best) / len(best))
    return sum(values) / len(values)


@pytest.mark.parametrize("n", range(1, 8))
def test_estimate_is_the_mean_over_every_subset(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    assert float(expected_best_of_n(proxy, gold, n)) == pytest.approx(
        enumerated(proxy.tolist(), gold.tolist(), n), abs=1e-12
    )


@pytest.mark.parametrize("n", range(1, 8))
def test_ties_of_the_proxy_share_their_gold_score(n: int) -> None:
    proxy = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    gold = torch.tensor([3.0, -1.0, 0.5, 2.0, 4.0, -2.0, 7.0], dtype=torch.float64)
    # Random tie-breaking inside a subset and over the whole sample agree in expectation.
    assert float(expected_best_of_n(proxy, gold, n)) == pytest.approx(
        enumerated(proxy.tolist(), gold.tolist(), n), abs=1e-12
    )


def test_hand_value() -> None:
    # Pairs of (1, 2, 3): {1,2} -> 20, {1,3} and {2,3} -> 30.
    value = expected_best_of_n(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0]), 2)
    assert float(value) == pytest.approx((20 + 30 + 30) / 3)


def test_limits_are_the_mean_and_the_best() -> None:
    generator = torch.Generator().manual_seed(1)
    proxy, gold = torch.randn(2, 5, 400, generator=generator)
    torch.testing.assert_close(expected_best_of_n(proxy, gold, 1), gold.double().mean(-1))
    best = gold.gather(-1, best_of(proxy)[:, None])[:, 0].double()
    torch.testing.assert_close(expected_best_of_n(proxy, gold, 400), best)


def test_leading_dimensions_are_prompts_and_order_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    proxy, gold = torch.randn(2, 3, 4, 16, generator=generator)
    together = expected_best_of_n(proxy, gold, 5)
    assert together.shape == (3, 4)
    torch.testing.assert_close(together[2, 1], expected_best_of_n(proxy[2, 1], gold[2, 1], 5))
    order = torch.randperm(16, generator=generator)
    torch.testing.assert_close(together, expected_best_of_n(proxy[..., order], gold[..., order], 5))


def test_many_answers_do_not_overflow() -> None:
    proxy = torch.arange(60_000, dtype=torch.float64)
    assert float(expected_best_of_n(proxy, torch.ones_like(proxy), 30_000)) == pytest.approx(1, abs=1e-6)


def test_estimate_is_unbiased_for_fresh_draws() -> None:
    generator = torch.Generator().manual_seed(3)
    proxy = torch.randn(20_000, 8, generator=generator)
    # The best of 4 standard normal draws has mean 1.02938 (order statistics); gold equals proxy here.
    assert float(expected_best_of_n(proxy, proxy, 4).mean()) == pytest.approx(1.02938, abs=0.015)


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (4, 0.636), (16, 1.835), (64, 3.175), (128, 3.860), (60_000, 10.00)])
def test_kl_bound(n: int, nats: float) -> None:
    assert kl_bound(n) == pytest.approx(nats, abs=6e-3)


def test_kl_bound_is_exact_without_ties_and_a_bound_with_them() -> None:
    def exact(size: int, n: int) -> float:
        # Uniform policy over `size` answers ranked without ties: P(best of n is the i-th) = (i^n - (i-1)^n) / size^n.
        chances = [(i / size) ** n - ((i - 1) / size) ** n for i in range(1, size + 1)]
        return sum(chance * math.log(chance * size) for chance in chances if chance > 0)

    assert exact(100_000, 8) == pytest.approx(kl_bound(8), abs=1e-3)
    assert exact(4, 8) < kl_bound(8) - 0.1


def test_the_first_of_equal_scores_is_best() -> None:
    scores = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-1.0, -2.0, -3.0, 0.0]])
    assert best_of(scores).tolist() == [1, 0, 3]


def test_errors_say_what_was_given() -> None:
    with pytest.raises(ValueError, match="N = 3"):
        expected_best_of_n(torch.zeros(3), torch.zeros(3), 4)
    with pytest.raises(ValueError, match="n = 0"):
        expected_best_of_n(torch.zeros(3), torch.zeros(3), 0)
    with pytest.raises(ValueError, match="one shape"):
        expected_best_of_n(torch.zeros(3), torch.zeros(4), 2)
    with pytest.raises(ValueError, match="n >= 1"):
        kl_bound(0)
    with pytest.raises(ValueError, match="finite"):
        best_of(torch.tensor([[0.0, float("nan")]]))
