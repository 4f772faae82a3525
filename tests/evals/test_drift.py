"""Drift: exact KL sums, their intervals, lengths and ends, on a tiny model and on a policy of numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.worlds.enumerable import TabularPolicy, World, kl
from trimtab.batches import Tokens
from trimtab.builtin import tiny_policy
from trimtab.cli import main
from trimtab.evals.drift import drift, full_drift, kl_per_token, repeated_share, token_figures
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


def test_everything_else_by_literal_formulas(policy: Policy, other: Policy, samples: Samples) -> None:
    tokens, found = samples.tokens, full_drift(policy, other, samples)
    assert found.drift == drift(policy, other, samples)
    with torch.no_grad():
        theirs = other.logprobs(tokens).double()
        logits = policy.model(input_ids=tokens.ids, attention_mask=tokens.attention_mask.long()).logits.double()
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1).roll(1, dims=1) * tokens.response_mask
    count = int(tokens.response_mask.sum())
    assert found.entropy.value == pytest.approx(float(entropy.sum()) / count, rel=1e-4)
    assert found.reference_perplexity.value == pytest.approx(math.exp(-float(theirs.sum()) / count), rel=1e-4)
    assert found.sampled_kl.value == pytest.approx(float((samples.logprobs - theirs).sum(-1).mean()), rel=1e-3)
    assert found.reference_perplexity.low < found.reference_perplexity.value < found.reference_perplexity.high


def test_repetition_by_hand() -> None:
    assert repeated_share([1, 2, 3], 4) is None
    assert repeated_share([1, 2, 3, 4, 5], 4) == 0
    assert repeated_share([7] * 7, 4) == pytest.approx(3 / 4)
    assert repeated_share([1, 2, 1, 2, 1, 2], 2) == pytest.approx(1 - 2 / 5)


# ---- A world in which every answer can be listed


@dataclass(frozen=True)
class Statistics:
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor


class Listed:
    """A tabular policy as one that reads `Tokens`: a first column that says which prompt it is, then the string."""

    def __init__(self, policy: TabularPolicy) -> None:
        self.policy = policy

    def distributions(self, tokens: Tokens) -> list[Tensor]:
        """The log-probabilities of the vocabulary before each token of the strings."""
        prompts, strings = tokens.ids[:, 0], tokens.ids[:, 1:]
        prefix, found = torch.zeros_like(prompts), []
        for t, logits in enumerate(self.policy.logits):
            found.append(logits.log_softmax(-1)[prompts, prefix])
            prefix = prefix * self.policy.world.vocabulary + strings[:, t]
        return found

    def logprobs(self, tokens: Tokens) -> Tensor:
        return after_prompt(self.policy.token_logprobs(tokens.ids[:, 0], tokens.ids[:, 1:]))

    def compare(self, tokens: Tokens, reference: Listed) -> Statistics:
        mine, theirs = self.distributions(tokens), reference.distributions(tokens)
        entropy = torch.stack([-(p.exp() * p).sum(-1) for p in mine], 1)
        gap = torch.stack([(p.exp() * (p - q)).sum(-1) for p, q in zip(mine, theirs, strict=True)], 1)
        return Statistics(self.logprobs(tokens), after_prompt(entropy), after_prompt(gap))

    def kl(self, tokens: Tokens, reference: Listed) -> Tensor:
        return self.compare(tokens, reference).kl


def after_prompt(values: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(values), 1, dtype=values.dtype), values], 1)


WORLD = World(vocabulary=4, length=3, prompts=3)


def drawn_strings(policy: TabularPolicy, prompts: Tensor, strings: Tensor, n: int) -> Samples:
    ids = torch.cat([prompts[:, None], strings], 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    response = mask.clone()
    response[:, 0] = False
    logprobs = after_prompt(policy.token_logprobs(prompts, strings).detach()).float()
    distinct = tuple(Prompt.from_text(str(i)) for i in prompts[::n].tolist())
    texts = [str(row) for row in strings.tolist()]
    return Samples(distinct, n, Tokens(ids, mask, response), logprobs, logprobs, texts, torch.ones(len(ids)).bool())


def test_exact_kl_equals_enumeration_of_the_world() -> None:
    policy, reference = TabularPolicy(WORLD, seed=1), TabularPolicy(WORLD, seed=2)
    exact = kl(policy.all_logprobs(), reference.all_logprobs()).detach()
    everything = torch.arange(3).repeat_interleave(WORLD.num_strings), WORLD.strings().repeat(3, 1)
    listed = drawn_strings(policy, *everything, n=WORLD.num_strings)
    figures = token_figures(Listed(policy), Listed(reference), listed)  # pyright: ignore[reportArgumentType]
    weights = policy.all_logprobs().exp().detach().flatten()
    expected = (weights[:, None] * figures.kl.double()).sum(-1).view(3, -1).sum(-1)
    torch.testing.assert_close(expected, exact, rtol=1e-5, atol=1e-6)
    # The log-ratios of all strings, weighted by their probabilities, come to the same.
    ratios = (figures.logprobs - figures.ref_logprobs).double().sum(-1)
    torch.testing.assert_close((weights * ratios).view(3, -1).sum(-1), exact, rtol=1e-5, atol=1e-6)


def test_sampled_figures_agree_with_enumeration_within_their_error() -> None:
    policy, reference = TabularPolicy(WORLD, seed=1), TabularPolicy(WORLD, seed=2)
    truth = float(kl(policy.all_logprobs(), reference.all_logprobs()).detach().mean())
    logs = policy.all_logprobs().detach()
    entropy = float(-(logs.exp() * logs).sum(-1).mean()) / WORLD.length
    covered = {"exact": 0, "sampled": 0, "entropy": 0}
    for seed in range(60):
        # As many prompts as there are answers, drawn evenly, so that the interval is about all that varies.
        prompts = torch.randint(3, (300,), generator=torch.Generator().manual_seed(1000 + seed))
        samples = drawn_strings(policy, prompts, policy.sample(prompts, seed=seed), n=1)
        found = full_drift(Listed(policy), Listed(reference), samples, batch_rows=64)  # pyright: ignore[reportArgumentType]
        covered["exact"] += found.drift.kl.low <= truth <= found.drift.kl.high
        covered["sampled"] += found.sampled_kl.low <= truth <= found.sampled_kl.high
        covered["entropy"] += found.entropy.low <= entropy <= found.entropy.high
        assert found.drift.kl.high - found.drift.kl.low < found.sampled_kl.high - found.sampled_kl.low
    assert all(hits >= 52 for hits in covered.values()), covered


def test_the_command_measures_a_model_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(3)))
    flags = ["--model", "tiny", "--data", str(data), "--max-new-tokens", "5", "--dtype", "float32", "--device", "cpu"]
    assert main(["evaluate", "drift", *flags]) == 2
    assert "--reference" in capsys.readouterr().err
    assert main(["evaluate", "drift", *flags, "--reference", "tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-5) and found["kl"]["count"] == 3
    assert found["reference_perplexity"]["value"] > 1 and found["entropy"]["value"] > 0
    assert main(["evaluate", "drift", *flags, "--reference", "tiny"]) == 0
    assert "perplexity under the reference" in capsys.readouterr().out
