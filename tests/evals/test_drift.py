"""Drift: exact KL sums, their intervals, lengths and ends, on a tiny model and on a policy of numbers."""

from __future__ import annotations

import pytest
import torch

from trimtab.builtin import tiny_policy
from trimtab.evals.drift import drift, kl_per_token
from trimtab.models import Policy
from trimtab.records import Prompt
from trimtab.sampling import Samples, sample

PROMPTS = [Prompt.from_text(text) for text in ("One day", "The cat sat on the", "a", "Numbers: 1 2 3")]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def other() -> Policy:
    moved = tiny_policy(dtype="float32", device="cpu")
    with torch.no_grad():
        for parameter in moved.model.parameters():
            parameter.mul_(1.2)
    return moved


@pytest.fixture(scope="module")
def samples(policy: Policy) -> Samples:
    return sample(policy, PROMPTS, 3, max_new_tokens=6, seed=2)


def test_no_drift_from_oneself(policy: Policy, samples: Samples) -> None:
    result = drift(policy, policy, samples)
    assert result.kl.value == pytest.approx(0, abs=1e-5)
    assert result.length.value == pytest.approx(float(samples.tokens.response_lengths.mean()))
    assert result.unfinished.value == pytest.approx(float((~samples.finished).float().mean()))
    assert result.kl.count == len(PROMPTS) and result.unfinished.count == 12


def test_kl_is_the_sum_of_the_exact_kl_of_every_token(policy: Policy, other: Policy, samples: Samples) -> None:
    tokens = samples.tokens

    def distributions(model: Policy) -> torch.Tensor:
        with torch.no_grad():
            logits = model.model(input_ids=tokens.ids, attention_mask=tokens.attention_mask.long()).logits
        return logits.double().log_softmax(-1)

    mine, theirs = distributions(policy), distributions(other)
    literal = (mine.exp() * (mine - theirs)).sum(-1).roll(1, dims=1) * tokens.response_mask
    found = kl_per_token(policy, other, samples, batch_rows=5)
    torch.testing.assert_close(found.double(), literal, atol=1e-5, rtol=1e-4)
    result = drift(policy, other, samples)
    assert result.kl.value == pytest.approx(float(literal.sum(-1).mean()), rel=1e-4)
    assert result.kl.low < result.kl.value < result.kl.high
    assert result.kl_per_token.value == pytest.approx(float(literal.sum() / tokens.response_mask.sum()), rel=1e-4)
    assert result.kl.value > 0


def test_exact_kl_agrees_with_log_ratios_of_many_samples(policy: Policy, other: Policy) -> None:
    # Two estimators of the same KL along the policy's own samples: the exact sum, and the mean log-ratio.
    drawn = sample(policy, PROMPTS[:1], 400, max_new_tokens=4, seed=5, batch_rows=400)
    with torch.no_grad():
        ratios = (drawn.logprobs - other.logprobs(drawn.tokens)).sum(-1)
    exact = kl_per_token(policy, other, drawn).sum(-1)
    difference = (ratios - exact).double()
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 20


def test_batches_do_not_matter(policy: Policy, other: Policy, samples: Samples) -> None:
    one, many = (kl_per_token(policy, other, samples, batch_rows=rows) for rows in (1, 12))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-4)
