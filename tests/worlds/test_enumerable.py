"""Exact facts on an enumerable world: its own arithmetic, DPO's gradient and optimum, and where IPO stops."""

import itertools
import math
from functools import partial

import pytest
import torch

from tests.worlds.enumerable import TabularPolicy, World, index_of, kl, log_partition, optimum, total_variation
from trimtab.batches import Pairs
from trimtab.losses.preference import dpo, ipo, robust

WORLD = World(vocabulary=3, length=2, prompts=2)


def pairs_of(logprobs, ref_logprobs, chosen, rejected, length: float) -> Pairs:
    """`Pairs` of strings of one prompt, given by their places in the list."""
    lengths = torch.full(chosen.shape, length, dtype=torch.float64)
    return Pairs(logprobs[chosen], logprobs[rejected], ref_logprobs[chosen], ref_logprobs[rejected], lengths, lengths)


def all_pairs(num_strings: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every ordered pair of two different strings."""
    ordered = torch.tensor(list(itertools.permutations(range(num_strings), 2)))
    return ordered[:, 0], ordered[:, 1]


def fit(loss, policy, reference, chosen, rejected, weights) -> None:
    """Minimize the weighted sum of a loss over pairs of strings of length 2."""
    optimizer = torch.optim.LBFGS(
        policy.parameters(), max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = (weights * loss(pairs_of(policy.all_logprobs()[0], reference[0], chosen, rejected, 2))).sum()
        value.backward()
        return value

    optimizer.step(closure)


def test_listed_probabilities_are_a_distribution_and_agree_with_single_strings():
    policy = TabularPolicy(WORLD, seed=1)
    listed = policy.all_logprobs()
    assert listed.shape == (2, 9)
    torch.testing.assert_close(listed.logsumexp(-1), torch.zeros(2, dtype=torch.float64))
    strings = WORLD.strings()
    assert torch.equal(index_of(strings, 3), torch.arange(9))
    for prompt in range(2):
        single = policy.logprobs(torch.full((9,), prompt), strings)
        torch.testing.assert_close(single, listed[prompt])


def test_samples_come_with_the_listed_probabilities():
    policy = TabularPolicy(WORLD, seed=1)
    strings = policy.sample(torch.ones(40_000, dtype=torch.long), seed=2)
    shares = torch.bincount(index_of(strings, 3), minlength=9) / 40_000
    # The standard error of a share is at most sqrt(0.25 / 40000) = 0.0025.
    assert (shares - policy.all_logprobs()[1].exp()).abs().max() < 0.01


def test_exact_kl_is_the_sum_over_strings_and_over_steps():
    policy, reference = TabularPolicy(WORLD, seed=1), TabularPolicy(WORLD, seed=2)
    exact = kl(policy.all_logprobs(), reference.all_logprobs())
    for prompt in range(2):
        brute = 0.0
        stepwise = 0.0
        for string in itertools.product(range(3), repeat=2):
            prompts, strings = torch.tensor([prompt]), torch.tensor([string])
            log_p = policy.logprobs(prompts, strings).item()
            brute += math.exp(log_p) * (log_p - reference.logprobs(prompts, strings).item())
        for t, (p_logits, q_logits) in enumerate(zip(policy.logits, reference.logits, strict=True)):
            for prefix in range(3**t):
                first = policy.logits[0].softmax(-1)[prompt, 0, prefix].item() if t else 1.0
                p, q = (logits[prompt, prefix].softmax(-1).tolist() for logits in (p_logits, q_logits))
                stepwise += first * sum(p[v] * math.log(p[v] / q[v]) for v in range(3))
        assert exact[prompt].item() == pytest.approx(brute, rel=1e-12)
        assert exact[prompt].item() == pytest.approx(stepwise, rel=1e-12)
    assert (exact > 0).all()
    torch.testing.assert_close(kl(policy.all_logprobs(), policy.all_logprobs()), torch.zeros(2, dtype=torch.float64))


def test_optimum_maximizes_reward_minus_beta_kl_and_its_value_is_beta_log_z():
    reference, rewards, beta = TabularPolicy(WORLD, seed=3).all_logprobs().detach(), WORLD.rewards(seed=4), 0.5

    def value(logprobs):
        return (logprobs.exp() * rewards).sum(-1) - beta * kl(logprobs, reference)

    best = optimum(reference, rewards, beta)
    torch.testing.assert_close(best.logsumexp(-1), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(value(best), beta * log_partition(reference, rewards, beta))
    for seed in range(5):
        noise = 0.1 * WORLD.rewards(seed=100 + seed)
        assert (value((best + noise).log_softmax(-1)) < value(best)).all()


def test_dpo_gradient_is_the_one_that_the_paper_derives():
    beta = 0.3
    policy, reference = TabularPolicy(WORLD, seed=5), TabularPolicy(WORLD, seed=6)
    strings, ref = WORLD.strings(), reference.all_logprobs().detach()
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randint(2, (12,), generator=generator)
    chosen, rejected = (torch.randint(9, (12,), generator=generator) for _ in range(2))
    lengths = torch.full((12,), 2.0, dtype=torch.float64)
    pairs = Pairs(
        policy.logprobs(prompts, strings[chosen]),
        policy.logprobs(prompts, strings[rejected]),
        ref[prompts, chosen],
        ref[prompts, rejected],
        lengths,
        lengths,
    )
    parameters = list(policy.parameters())
    ours = torch.autograd.grad(dpo(pairs, beta=beta).mean(), parameters)
    papers = [torch.zeros_like(parameter) for parameter in parameters]
    for i in range(12):
        log_w, log_l = (policy.logprobs(prompts[i : i + 1], strings[k[i : i + 1]]) for k in (chosen, rejected))
        reward_w = beta * (log_w.item() - ref[prompts[i], chosen[i]].item())
        reward_l = beta * (log_l.item() - ref[prompts[i], rejected[i]].item())
        weight = 1 / (1 + math.exp(-(reward_l - reward_w)))
        grad_w = torch.autograd.grad(log_w.sum(), parameters)
        grad_l = torch.autograd.grad(log_l.sum(), parameters)
        papers = [
            sum_so_far - beta * weight * (up - down) / 12
            for sum_so_far, up, down in zip(papers, grad_w, grad_l, strict=True)
        ]
    for mine, theirs in zip(ours, papers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_dpo_on_all_bradley_terry_pairs_finds_the_optimum():
    world, beta = World(vocabulary=4, length=2), 0.5
    reference, rewards = TabularPolicy(world, seed=8).all_logprobs().detach(), world.rewards(seed=9)
    chosen, rejected = all_pairs(world.num_strings)
    weights = (rewards[0][chosen] - rewards[0][rejected]).sigmoid() / len(chosen)
    policy = TabularPolicy(world)
    fit(partial(dpo, beta=beta), policy, reference, chosen, rejected, weights)
    best = optimum(reference, rewards, beta)
    assert total_variation(reference, best).item() > 0.2
    assert total_variation(policy.all_logprobs().detach(), best).item() < 1e-4


def test_dpo_on_many_sampled_pairs_comes_within_two_percent_of_the_optimum():
    world, beta, draws = World(vocabulary=3, length=2), 1.0, 200_000
    start = TabularPolicy(world, seed=10)
    reference, rewards = start.all_logprobs().detach(), world.rewards(seed=11)
    first, second = (index_of(start.sample(torch.zeros(draws, dtype=torch.long), s), 3) for s in (12, 13))
    win = torch.rand(draws, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    first_wins = win < (rewards[0][first] - rewards[0][second]).sigmoid()
    winner, loser = torch.where(first_wins, first, second), torch.where(first_wins, second, first)
    counts = torch.bincount(winner * 9 + loser, minlength=81).double() / draws
    chosen, rejected = torch.arange(81) // 9, torch.arange(81) % 9
    policy = TabularPolicy(world)
    fit(partial(dpo, beta=beta), policy, reference, chosen, rejected, counts)
    best = optimum(reference, rewards, beta)
    assert total_variation(reference, best).item() > 0.2
    assert total_variation(policy.all_logprobs().detach(), best).item() < 0.02


def test_robust_dpo_on_flipped_labels_finds_the_optimum_that_dpo_misses():
    world, beta, rate = World(vocabulary=3, length=2), 0.5, 0.3
    reference, rewards = TabularPolicy(world, seed=15).all_logprobs().detach(), world.rewards(seed=16)
    chosen, rejected = all_pairs(world.num_strings)
    clean = (rewards[0][chosen] - rewards[0][rejected]).sigmoid()
    weights = ((1 - rate) * clean + rate * (1 - clean)) / len(chosen)
    best, distance = optimum(reference, rewards, beta), {}
    for name, loss in (
        ("dpo", partial(dpo, beta=beta)),
        ("robust", partial(robust, beta=beta, label_smoothing=rate)),
    ):
        policy = TabularPolicy(world)
        fit(loss, policy, reference, chosen, rejected, weights)
        distance[name] = total_variation(policy.all_logprobs().detach(), best).item()
    assert distance["robust"] < 1e-3
    assert distance["dpo"] > 0.1


def margins(loss, steps: int) -> list[float]:
    """D of the one pair that is always preferred, at every step of gradient descent."""
    world = World(vocabulary=2, length=2)
    policy, reference = TabularPolicy(world, seed=17), TabularPolicy(world, seed=17).all_logprobs()[0].detach()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    found = []
    for _ in range(steps):
        pair = pairs_of(policy.all_logprobs()[0], reference, torch.tensor([3]), torch.tensor([0]), 2)
        found.append(pair.margin.item())
        optimizer.zero_grad()
        loss(pair).sum().backward()
        optimizer.step()
    return found


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_ipo_stops_at_half_of_one_over_tau_under_deterministic_preferences(tau):
    assert margins(lambda p: ipo(p, tau=tau, average=False), 400)[-1] == pytest.approx(1 / (2 * tau), abs=1e-4)
    # Length-averaged, the difference per token is what stops there: both strings have two tokens.
    assert margins(lambda p: ipo(p, tau=tau), 1000)[-1] / 2 == pytest.approx(1 / (2 * tau), abs=1e-3)


def test_dpo_does_not_stop_under_deterministic_preferences():
    path = margins(lambda p: dpo(p, beta=1.0), 2000)
    assert all(later > earlier for earlier, later in itertools.pairwise(path))
    # The gradient falls like exp(-D), so D grows like log(steps): by about log 10 from 200 steps to 2000.
    assert path[1999] - path[199] > 1.5
    assert path[1999] > 5
