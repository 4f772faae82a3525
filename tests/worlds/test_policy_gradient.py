"""Online RL on a world where every answer can be listed: expected gradients, their variance, and where ascent ends.

An expectation is a sum over all answers, or over all groups of answers, each with its probability. The answers of a
world all have its length, unless token 0 is said to end them.
"""

import itertools

import pytest
import torch
from torch import Tensor

from tests.worlds.enumerable import TabularPolicy, World, kl, optimum, total_variation
from trimtab.advantages import Scores, centred, ema, gae, grpo, remax, reward_to_go, rloo, spread
from trimtab.batches import mean_over
from trimtab.kl import KL_LOSSES, KlTerms, exact_kl, k1, k2, k3, log_ratio, shaped_rewards
from trimtab.losses.policy import POLICY_LOSSES, PolicyTerms, reinforce

SMALL = World(vocabulary=2, length=2)
WORLD = World(vocabulary=3, length=2)
BETA = 0.5


def zeros_like(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores)


def scored(scores: Tensor, group_size: int = 1, baseline: Tensor | None = None) -> Scores:
    valid = torch.ones(len(scores), dtype=torch.bool)
    return Scores(scores, valid, zeros_like(scores) if baseline is None else baseline, group_size)


def flat(gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def gradient(value: Tensor, policy: TabularPolicy) -> Tensor:
    return flat(torch.autograd.grad(value, list(policy.parameters()), retain_graph=True))


def exact_gradient(policy: TabularPolicy, rewards: Tensor) -> Tensor:
    """The gradient of the expected reward, by differentiating the sum over all strings."""
    return gradient((policy.all_logprobs()[0].exp() * rewards).sum(), policy)


def answer_logprobs(policy: TabularPolicy) -> Tensor:
    """Log-probabilities of the tokens of every string, `[S, T]`."""
    strings = policy.world.strings()
    return policy.token_logprobs(torch.zeros(len(strings), dtype=torch.long), strings)


def probabilities(policy: TabularPolicy) -> Tensor:
    return policy.all_logprobs()[0].exp().detach()


def ascent(policy: TabularPolicy, advantages: Tensor, weights: Tensor, rows: Tensor, name: str = "reinforce") -> Tensor:
    """The expected ascent direction of a loss on some strings (by their places), each row with its weight."""
    logprobs = answer_logprobs(policy)[rows]
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    per_token = advantages if advantages.dim() == 2 else spread(advantages, mask)
    losses = POLICY_LOSSES[name](PolicyTerms(logprobs, logprobs.detach(), per_token, mask))
    return -gradient(mean_over("sums", losses * weights[:, None], mask, length=1).total, policy)


def groups(policy: TabularPolicy, size: int) -> tuple[Tensor, Tensor]:
    """The strings of every group of `size` answers as rows, and the weight of each row in the group's mean."""
    listed = torch.tensor(list(itertools.product(range(policy.world.num_strings), repeat=size)))
    weights = probabilities(policy)[listed].prod(-1) / size
    return listed.flatten(), weights.repeat_interleave(size)


def world_of(seed: int, world: World = WORLD) -> tuple[TabularPolicy, Tensor]:
    """A policy and rewards whose mean is away from 0, so that a baseline has something to do."""
    return TabularPolicy(world, seed=seed), world.rewards(seed + 100)[0] + 2


def greedy(policy: TabularPolicy) -> int:
    """The place of the string that takes the likeliest token every time."""
    place = 0
    for logits in policy.logits:
        place = place * policy.world.vocabulary + int(logits[0, place].argmax())
    return place


# ---- Expected gradients


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_reinforce_and_every_clipped_loss_at_ratio_one_are_unbiased(name):
    policy, rewards = world_of(1)
    rows = torch.arange(WORLD.num_strings)
    found = ascent(policy, rewards, probabilities(policy), rows, name)
    torch.testing.assert_close(found, exact_gradient(policy, rewards))


@pytest.mark.parametrize("baseline", [-3.0, 0.7, 40.0])
def test_a_baseline_that_does_not_know_the_answer_leaves_the_gradient(baseline):
    policy, rewards = world_of(2)
    advantages = ema(scored(rewards, baseline=torch.full_like(rewards, baseline)))
    found = ascent(policy, advantages, probabilities(policy), torch.arange(WORLD.num_strings))
    torch.testing.assert_close(found, exact_gradient(policy, rewards))


def test_remax_is_unbiased():
    policy, rewards = world_of(3)
    advantages = remax(scored(rewards, baseline=rewards[greedy(policy)].expand_as(rewards)))
    assert advantages[greedy(policy)] == 0
    found = ascent(policy, advantages, probabilities(policy), torch.arange(WORLD.num_strings))
    torch.testing.assert_close(found, exact_gradient(policy, rewards))


@pytest.mark.parametrize(("world", "size"), [(WORLD, 2), (WORLD, 3), (SMALL, 4)])
@pytest.mark.parametrize("name", ["reinforce", "ppo_clip"])
def test_rloo_is_unbiased_and_centred_is_short_of_it_by_one_answer(world, size, name):
    policy, rewards = world_of(4, world)
    rows, weights = groups(policy, size)
    exact = exact_gradient(policy, rewards)
    found = ascent(policy, rloo(scored(rewards[rows], size)), weights, rows, name)
    torch.testing.assert_close(found, exact)
    short = ascent(policy, centred(scored(rewards[rows], size)), weights, rows, name)
    torch.testing.assert_close(short, exact * (size - 1) / size)


def test_grpo_in_pairs_follows_the_probability_to_win():
    # With two answers and their own standard deviation, an advantage is 1 for the better one and -1 for the other.
    policy, rewards = world_of(5)
    rows, weights = groups(policy, 2)
    found = ascent(policy, grpo(scored(rewards[rows], 2), eps=1e-12, correction=0), weights, rows)
    wins = (rewards[:, None] - rewards).sign() @ probabilities(policy)
    torch.testing.assert_close(found, exact_gradient(policy, wins))


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_the_true_values_is_unbiased(lam):
    policy, rewards = world_of(6)
    weights = probabilities(policy)
    mask = torch.ones(WORLD.num_strings, 2, dtype=torch.bool)
    by_first = weights.view(3, 3)
    second = (by_first * rewards.view(3, 3)).sum(-1) / by_first.sum(-1)
    values = torch.stack([(weights * rewards).sum().expand(9), second.repeat_interleave(3)], dim=1)
    token_rewards = shaped_rewards(rewards, torch.zeros(9, 2, dtype=torch.float64), mask, coefficient=0.0)
    advantages, _ = gae(token_rewards, values, mask, gamma=1.0, lam=lam)
    found = ascent(policy, advantages, weights, torch.arange(9))
    torch.testing.assert_close(found, exact_gradient(policy, rewards))


def test_values_read_one_token_too_late_are_a_bias():
    # A critic that has seen the token it judges takes the token's merit away: what the alignment is there to prevent.
    policy, rewards = world_of(6)
    weights, mask = probabilities(policy), torch.ones(9, 2, dtype=torch.bool)
    seen_first = ((weights * rewards).view(3, 3).sum(-1) / weights.view(3, 3).sum(-1)).repeat_interleave(3)
    token_rewards = shaped_rewards(rewards, torch.zeros(9, 2, dtype=torch.float64), mask, coefficient=0.0)
    late, _ = gae(token_rewards, torch.stack([seen_first, rewards], dim=1), mask, gamma=1.0, lam=1.0)
    found = ascent(policy, late, weights, torch.arange(9))
    assert (found - exact_gradient(policy, rewards)).norm() > 0.5 * exact_gradient(policy, rewards).norm()


# ---- Variance


def variance_for_one_answer(policy: TabularPolicy, rewards: Tensor, size: int) -> float:
    """The total variance of the gradient of a group, times its size: what one answer's worth of sampling brings."""
    logprobs = policy.all_logprobs()[0]
    slopes = torch.stack([gradient(one, policy) for one in logprobs])
    listed = torch.tensor(list(itertools.product(range(len(slopes)), repeat=size)))
    scores = rewards[listed.flatten()]
    advantages = scores if size == 1 else rloo(scored(scores, size))
    estimates = (advantages.view(-1, size, 1) * slopes[listed]).mean(1)
    weights = probabilities(policy)[listed].prod(-1)
    torch.testing.assert_close(weights @ estimates, exact_gradient(policy, rewards))
    return size * (weights @ (estimates - weights @ estimates).square().sum(-1)).item()


@pytest.mark.parametrize("seed", range(5))
def test_more_siblings_mean_less_variance_at_the_same_number_of_answers(seed):
    policy, rewards = world_of(seed, SMALL)
    single, two, four = (variance_for_one_answer(policy, rewards, size) for size in (1, 2, 4))
    assert four < two < single


# ---- Averages over answers of unequal lengths


def ended_by_zero(world: World) -> tuple[Tensor, Tensor]:
    """The tokens of every string up to its first 0, as a mask, and the place of the string that goes on with zeros."""
    strings = world.strings()
    before = (strings == 0).long().cumsum(-1) - (strings == 0).long()
    mask = before == 0
    powers = world.vocabulary ** torch.arange(world.length - 1, -1, -1)
    return mask, (torch.where(mask, strings, 0) * powers).sum(-1)


@pytest.mark.parametrize(("kind", "is_exact"), [("sums", True), ("constant", True), ("sequences", False)])
def test_sums_are_the_policy_gradient_of_answers_of_unequal_lengths(kind, is_exact):
    world = World(vocabulary=3, length=3)
    policy, rewards = world_of(7, world)
    mask, same_answer = ended_by_zero(world)
    rewards = rewards[same_answer]
    logprobs = torch.where(mask, answer_logprobs(policy), float("nan"))
    assert 1 < mask.sum(-1).double().mean() < 3
    advantages = spread(rewards, mask)
    losses = reinforce(PolicyTerms(logprobs, logprobs.detach(), advantages, mask)) * probabilities(policy)[:, None]
    mean = mean_over(kind, losses, mask, length=3)
    found = -gradient(mean.total * (mask.shape[0] / mean.count), policy) * (3 if kind == "constant" else 1)
    exact = exact_gradient(policy, rewards)
    if is_exact:
        torch.testing.assert_close(found, exact)
    else:
        cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0)
        assert cosine < 0.99


# ---- KL


def two_policies() -> tuple[TabularPolicy, TabularPolicy]:
    return TabularPolicy(WORLD, seed=11), TabularPolicy(WORLD, seed=12)


def per_prefix(policy: TabularPolicy, reference: TabularPolicy, drawn: TabularPolicy, forward: bool = False) -> Tensor:
    """The KL of every next-token distribution, summed with the probability that `drawn` comes by: `[]`."""
    total, reached = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for own, ref, sampled in zip(policy.logits, reference.logits, drawn.logits, strict=True):
        p, q = own[0].log_softmax(-1), ref[0].log_softmax(-1).detach()
        total = total + (reached * (exact_kl(q, p) if forward else exact_kl(p, q))).sum()
        reached = (reached[:, None] * sampled[0].softmax(-1).detach()).flatten()
    return total.sum()


def listed_terms(policy: TabularPolicy, reference: TabularPolicy, old: TabularPolicy) -> KlTerms:
    own, ref, drawn = (answer_logprobs(one) for one in (policy, reference, old))
    return KlTerms(own, drawn.detach(), ref.detach(), torch.ones_like(own, dtype=torch.bool))


@pytest.mark.parametrize(("estimator", "is_exact"), [(k1, True), (k3, True), (k2, False)])
def test_values_of_the_estimators(estimator, is_exact):
    policy, reference = two_policies()
    terms = listed_terms(policy, reference, policy)
    found = (probabilities(policy) @ estimator(terms.log_ratio).sum(-1)).item()
    exact = kl(policy.all_logprobs(), reference.all_logprobs()).item()
    assert (found == pytest.approx(exact, rel=1e-12)) is is_exact
    assert per_prefix(policy, reference, policy).item() == pytest.approx(exact, rel=1e-12)


def test_k1_as_a_plain_loss_has_no_expected_gradient():
    policy, reference = two_policies()
    terms = listed_terms(policy, reference, policy)
    found = gradient((probabilities(policy)[:, None] * k1(terms.log_ratio)).sum(), policy)
    torch.testing.assert_close(found, torch.zeros_like(found))


@pytest.mark.parametrize(("name", "forward"), [("k1", False), ("k2", False), ("k3_weighted", False), ("k3", True)])
def test_gradients_of_the_losses_are_those_of_each_tokens_kl(name, forward):
    policy, reference = two_policies()
    terms = listed_terms(policy, reference, policy)
    found = gradient((probabilities(policy)[:, None] * KL_LOSSES[name](terms)).sum(), policy)
    torch.testing.assert_close(found, gradient(per_prefix(policy, reference, policy, forward), policy))
    other = gradient(per_prefix(policy, reference, policy, not forward), policy)
    assert (found - other).norm() > 0.1 * found.norm()


def test_only_the_weighted_k3_is_right_for_tokens_of_an_older_policy():
    (policy, reference), old = two_policies(), TabularPolicy(WORLD, seed=13)
    terms, weights = listed_terms(policy, reference, old), probabilities(old)[:, None]
    exact = per_prefix(policy, reference, old)
    losses = {name: (weights * loss(terms)).sum() for name, loss in KL_LOSSES.items()}
    torch.testing.assert_close(losses["k3_weighted"], exact)
    for name, loss in losses.items():
        off = (gradient(loss, policy) - gradient(exact, policy)).norm() / gradient(exact, policy).norm()
        assert (off.item() < 1e-9) is (name == "k3_weighted")


@pytest.mark.parametrize("credit", ["answer", "to go"])
def test_kl_in_the_reward_has_the_whole_gradient_and_kl_in_the_loss_a_part(credit):
    policy, reference = two_policies()
    terms, rows = listed_terms(policy, reference, policy), torch.arange(9)
    rewards = shaped_rewards(
        torch.zeros(9, dtype=torch.float64), k1(terms.log_ratio).detach(), terms.mask, coefficient=1.0
    )
    advantages = rewards.sum(-1) if credit == "answer" else reward_to_go(rewards, terms.mask)
    found = ascent(policy, advantages, probabilities(policy), rows)
    whole = gradient(kl(policy.all_logprobs(), reference.all_logprobs().detach()).sum(), policy)
    torch.testing.assert_close(found, -whole)
    part = gradient((probabilities(policy)[:, None] * KL_LOSSES["k1"](terms)).sum(), policy)
    assert (part - whole).norm() > 0.1 * whole.norm()


# ---- Where exact ascent ends


def climb(policy: TabularPolicy, direction, steps: int = 400) -> Tensor:
    """The log-probabilities of all strings after following an ascent direction with Adam."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        upward, start = -direction(policy), 0
        for parameter in policy.parameters():
            parameter.grad = upward[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        optimizer.step()
        schedule.step()
    return policy.all_logprobs().detach()


def shaped(policy: TabularPolicy, reference: TabularPolicy, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The rewards of the tokens of every string with KL priced in, and their mask."""
    own, ref = answer_logprobs(policy).detach(), answer_logprobs(reference).detach()
    mask = torch.ones_like(own, dtype=torch.bool)
    return shaped_rewards(scores, k1(log_ratio(own, ref, mask)), mask, coefficient=BETA), mask


def token_credit(policy, reference, scores) -> Tensor:
    rewards, mask = shaped(policy, reference, scores)
    rows = torch.arange(len(scores))
    return ascent(policy, reward_to_go(rewards, mask), probabilities(policy), rows, "ppo_clip")


def group_credit(policy, reference, scores) -> Tensor:
    rows, weights = groups(policy, 2)
    answers = shaped(policy, reference, scores)[0].sum(-1)
    return ascent(policy, rloo(scored(answers[rows], 2)), weights, rows)


def greedy_credit(policy, reference, scores) -> Tensor:
    answers = shaped(policy, reference, scores)[0].sum(-1)
    advantages = remax(scored(answers, baseline=answers[greedy(policy)].expand_as(answers)))
    return ascent(policy, advantages, probabilities(policy), torch.arange(len(scores)))


@pytest.mark.parametrize("direction", [token_credit, group_credit, greedy_credit])
def test_with_kl_in_the_reward_ascent_ends_at_the_known_optimum(direction):
    reference, scores = TabularPolicy(WORLD, seed=21), WORLD.rewards(22)[0]
    best = optimum(reference.all_logprobs().detach(), scores[None], BETA)
    policy = TabularPolicy(WORLD, seed=21)
    assert total_variation(policy.all_logprobs().detach(), best).item() > 0.2
    end = climb(policy, lambda now: direction(now, reference, scores))
    assert total_variation(end, best).item() < 1e-3


def kl_in_the_loss(name: str, world: World) -> float:
    """How far from the optimum ascent ends with a KL loss."""
    reference, scores = TabularPolicy(world, seed=23), world.rewards(24)[0]
    best = optimum(reference.all_logprobs().detach(), scores[None], BETA)

    def direction(policy: TabularPolicy) -> Tensor:
        weights = probabilities(policy)
        price = (weights[:, None] * KL_LOSSES[name](listed_terms(policy, reference, policy))).sum()
        reward = ascent(policy, scores - weights @ scores, weights, torch.arange(len(scores)))
        return reward - BETA * gradient(price, policy)

    return total_variation(climb(TabularPolicy(world, seed=23), direction), best).item()


@pytest.mark.parametrize(("name", "arrives"), [("k1", True), ("k2", True), ("k3_weighted", True), ("k3", False)])
def test_kl_in_the_loss_ends_at_the_optimum_of_one_token_answers_unless_it_is_k3(name, arrives):
    distance = kl_in_the_loss(name, World(vocabulary=5, length=1))
    assert distance < 1e-3 if arrives else distance > 0.02


def test_kl_in_the_loss_misses_the_optimum_of_longer_answers():
    assert kl_in_the_loss("k1", WORLD) > 0.02
