"""Sampling: the right distribution, whatever the batch; greedy and log-probabilities as the model has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from trimtab import sampling
from trimtab.builtin import byte_tokenizer, tiny_policy
from trimtab.models import Policy, make_policy
from trimtab.records import Prompt
from trimtab.sampling import Choice, Samples, draw, inverse_cdf, keep_top_k, keep_top_p, row_key, sample, uniforms
from trimtab.tokens import decode, encode_prompt, eos_id

TEXTS = ["Once upon a time", "a", "The weather today is", "1 2 3", "Dear reader, this is a longer prompt than others."]
PROMPTS = [*map(Prompt.from_text, TEXTS), Prompt.from_user("Say hello.")]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def samples(policy: Policy) -> Samples:
    return sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3)


def responses(samples: Samples) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(samples.tokens.ids, samples.tokens.response_mask, strict=True)]


def next_distribution(policy: Policy, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)


# ---- The whole


@pytest.mark.parametrize("batch_rows", [1, 7, 30])
def test_same_samples_in_every_batch(policy: Policy, samples: Samples, batch_rows: int) -> None:
    again = sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, batch_rows=batch_rows)
    assert torch.equal(again.tokens.ids, samples.tokens.ids)
    torch.testing.assert_close(again.logprobs, samples.logprobs, atol=1e-5, rtol=1e-5)


def test_same_samples_in_every_order_of_the_prompts(policy: Policy, samples: Samples) -> None:
    order = [4, 2, 5, 0, 1, 3]
    shuffled = sample(policy, [PROMPTS[i] for i in order], 5, max_new_tokens=12, seed=3)
    expected = [text for i in order for text in samples.texts[5 * i : 5 * i + 5]]
    assert shuffled.texts == expected
    assert shuffled.row_prompts[5:10] == [PROMPTS[2]] * 5


def test_fewer_answers_are_the_first_of_more(policy: Policy, samples: Samples) -> None:
    fewer = sample(policy, PROMPTS, 2, max_new_tokens=12, seed=3)
    assert fewer.texts == [text for i in range(len(PROMPTS)) for text in samples.texts[5 * i : 5 * i + 2]]


def test_repeated_prompts_and_other_seeds_give_other_answers(policy: Policy, samples: Samples) -> None:
    twice = sample(policy, [PROMPTS[0], PROMPTS[0]], 5, max_new_tokens=12, seed=3)
    assert twice.texts[:5] == samples.texts[:5]
    assert not set(twice.texts[:5]) & set(twice.texts[5:])
    assert not set(sample(policy, PROMPTS[:1], 5, max_new_tokens=12, seed=4).texts) & set(samples.texts[:5])


def test_rows_are_prompt_then_answer_then_padding(policy: Policy, samples: Samples) -> None:
    tokens = samples.tokens
    assert len(tokens) == len(samples.texts) == len(samples.finished) == 5 * len(PROMPTS)
    for row, prompt in enumerate(samples.row_prompts):
        ids = encode_prompt(policy.tokenizer, prompt)
        answer = responses(samples)[row]
        assert tokens.ids[row][tokens.attention_mask[row]].tolist() == ids + answer
        assert tokens.response_mask[row].nonzero()[0].item() == len(ids)
        assert tokens.attention_mask[row].int().diff().le(0).all(), "padding stands on the right"
    outside = ~tokens.response_mask
    assert not samples.logprobs[outside].any() and not samples.sampled_logprobs[outside].any()


def test_logprobs_are_those_of_the_policy(policy: Policy, samples: Samples) -> None:
    with torch.no_grad():
        expected = policy.logprobs(samples.tokens)
    torch.testing.assert_close(samples.logprobs, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(samples.sampled_logprobs, expected, atol=1e-4, rtol=1e-4)


def test_shaped_sampling_reports_both_distributions(policy: Policy) -> None:
    drawn = sample(policy, PROMPTS[:2], 3, max_new_tokens=1, temperature=0.7, top_k=20, top_p=0.9, seed=1)
    choice = Choice(0.7, 20, 0.9)
    for row, prompt in enumerate(drawn.row_prompts):
        plain = next_distribution(policy, encode_prompt(policy.tokenizer, prompt)).log()
        shaped = choice.shape(plain.float()[None])[0].log_softmax(-1)
        [token] = responses(drawn)[row]
        assert float(drawn.logprobs[row].sum()) == pytest.approx(float(plain[token]), abs=1e-4)
        assert float(drawn.sampled_logprobs[row].sum()) == pytest.approx(float(shaped[token]), abs=1e-4)


def test_first_tokens_have_the_frequencies_of_the_distribution(policy: Policy) -> None:
    drawn = sample(policy, PROMPTS[:1], 4000, max_new_tokens=1, seed=0, batch_rows=4000, stop_ids=())
    probability = next_distribution(policy, encode_prompt(policy.tokenizer, PROMPTS[0])).numpy()
    counts = np.bincount([token for [token] in responses(drawn)], minlength=len(probability))
    # Tokens too rare for the chi-square approximation share a bin.
    rare = probability * 4000 < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(probability[~rare], probability[rare].sum()) * 4000
    keep = expected > 0
    assert keep.sum() > 5, "the test needs several likely tokens"
    assert chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue > 1e-3


def test_second_tokens_depend_on_the_first(policy: Policy) -> None:
    # The joint distribution over two tokens: mean of -log p equals the entropy of both positions.
    drawn = sample(policy, PROMPTS[:1], 1500, max_new_tokens=2, seed=0, batch_rows=1500, stop_ids=())
    surprise = -drawn.logprobs.sum(-1).double()
    prompt = encode_prompt(policy.tokenizer, PROMPTS[0])
    first = next_distribution(policy, prompt)
    with torch.no_grad():
        ids = torch.tensor([[*prompt, token] for token in range(len(first))])
        second = torch.cat([policy.model(input_ids=part).logits[:, -1].double() for part in ids.split(64)]).softmax(-1)

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -torch.special.xlogy(p, p).sum(-1)

    exact = float(entropy(first) + first @ entropy(second))
    assert abs(float(surprise.mean()) - exact) < 4 * float(surprise.std()) / 1500**0.5


def test_greedy_is_what_transformers_generates(policy: Policy) -> None:
    greedy = sample(policy, PROMPTS, 1, max_new_tokens=12, temperature=0, stop_ids=())
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([encode_prompt(policy.tokenizer, prompt)])
        expected = policy.model.generate(  # pyright: ignore
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=12,
            max_new_tokens=12,
            eos_token_id=None,
            pad_token_id=policy.pad_id,
        )
        assert responses(greedy)[row] == expected[0, ids.shape[1] :].tolist()
    assert not greedy.sampled_logprobs.any(), "greedy is certain of its token"
    assert (greedy.logprobs[greedy.tokens.response_mask] < 0).all()


def other_family(name: str) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": len(byte_tokenizer()),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    match name:
        case "learned positions":
            return GPT2LMHeadModel(GPT2Config(**sizes))
        case "sliding window":
            narrow: dict[str, Any] = {"num_key_value_heads": 1, "intermediate_size": 16, "sliding_window": 4}
            return MistralForCausalLM(MistralConfig(**sizes, **narrow))
    # Neither rotary nor learned: distances are added to the attention, so the padding must not count.
    return BloomForCausalLM(BloomConfig(**{**sizes, "n_head": 2, "n_layer": 2}))


@pytest.mark.parametrize("family", ["learned positions", "sliding window", "attention biases"])
def test_other_families_sample_what_they_score(family: str) -> None:
    model = make_policy(other_family(family), byte_tokenizer(), dtype="float32", device="cpu")
    drawn = sample(model, PROMPTS, 3, max_new_tokens=12, seed=0, temperature=0.5)
    with torch.no_grad():
        torch.testing.assert_close(drawn.logprobs, model.logprobs(drawn.tokens), atol=1e-4, rtol=1e-4)
    alone = sample(model, PROMPTS, 3, max_new_tokens=12, seed=0, temperature=0.5, batch_rows=1)
    assert torch.equal(alone.tokens.ids, drawn.tokens.ids)


def test_adapter_is_sampled_from() -> None:
    adapted = tiny_policy(lora_rank=2)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
        trained = {id(weight) for weight in adapted.trainable_parameters()}
        drawn = sample(adapted, PROMPTS, 2, max_new_tokens=6)
        assert {id(weight) for weight in adapted.trainable_parameters()} == trained
        torch.testing.assert_close(drawn.logprobs, adapted.logprobs(drawn.tokens), atol=1e-4, rtol=1e-4)
        assert (drawn.logprobs - adapted.reference().logprobs(drawn.tokens)).abs().max() > 0.1


def test_half_precision_samples_stay_close_to_what_is_scored() -> None:
    half = tiny_policy(dtype="bfloat16")
    drawn = sample(half, PROMPTS, 3, max_new_tokens=12)
    with torch.no_grad():
        off = (drawn.logprobs - half.logprobs(drawn.tokens)).abs()[drawn.tokens.response_mask]
    assert float(off.mean()) < 0.02


def test_stop_token_ends_an_answer_and_belongs_to_it(policy: Policy) -> None:
    free = sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, stop_ids=())
    assert not free.finished.any() and (free.tokens.response_lengths == 12).all()
    common = int(torch.tensor(responses(free)).flatten().mode().values)
    stopped = sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, stop_ids={common})
    for whole, cut, text, finished in zip(
        responses(free), responses(stopped), stopped.texts, stopped.finished, strict=True
    ):
        # The same draws up to the first stop token, and that token included.
        end = whole.index(common) + 1 if common in whole else 12
        assert cut == whole[:end]
        assert bool(finished) == (common in whole)
        assert text == decode(policy.tokenizer, cut[:-1] if finished else cut)
    assert stopped.finished.any() and not stopped.finished.all()
    assert [answer.finished for answer in stopped.answers] == stopped.finished.tolist()
    assert [list(answer.ids) for answer in stopped.answers] == responses(stopped)
    assert [answer.text for answer in stopped.answers] == stopped.texts


def test_end_of_sequence_that_is_also_padding(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.Decoding, "start", classmethod(certain_end(eos_id(policy.tokenizer))))
    drawn = sample(policy, PROMPTS[:2], 2, max_new_tokens=4)
    assert drawn.finished.all() and drawn.texts == [""] * 4
    assert (drawn.tokens.response_lengths == 1).all(), "the end token carries loss although padding looks like it"


def certain_end(eos: int):
    """A start whose log-probabilities leave no choice but the end of sequence."""
    start = sampling.Decoding.start.__func__  # pyright: ignore

    def started(cls: type, policy: Policy, answers: list[sampling.Answer]) -> sampling.Decoding:
        batch = start(cls, policy, answers)
        batch.logprobs = torch.full_like(batch.logprobs, -1e4)
        batch.logprobs[:, eos] = 0
        return batch

    return started


def test_finished_rows_leave_the_batch(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, step = [], sampling.Decoding.step

    def counting(self: sampling.Decoding, ids: torch.Tensor) -> None:
        sizes.append(len(ids))
        step(self, ids)

    monkeypatch.setattr(sampling.Decoding, "step", counting)
    free = sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, stop_ids=())
    assert sizes == [30] * 11
    sizes.clear()
    common = int(torch.tensor(responses(free)).flatten().mode().values)
    stopped = sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, stop_ids={common})
    alive = [sum(len(answer) > step for answer in responses(stopped)) for step in range(1, 12)]
    assert sizes[-1] < 30 and all(count <= size <= count * 8 / 7 + 1 for count, size in zip(alive, sizes, strict=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_rows": 0}, "batch_rows is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 0.0, "top_k": 5}, "have no effect"),
    ],
)
def test_settings_that_mean_nothing(policy: Policy, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(policy, PROMPTS[:1], **settings)  # pyright: ignore


def test_no_prompts(policy: Policy) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        sample(policy, [])


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
    assert kept == [int((probability < 0.75).sum()) + 1, 1] and kept[0] > sampling.NUCLEUS_TOKENS


def test_top_p_counts_what_top_k_left_at_the_temperature() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two that top-k leaves, the first has 4/7 = 0.571 of the probability.
    assert Choice(top_k=2, top_p=0.57).shape(logits).isfinite()[0].tolist() == [True, False, False, False]
    assert Choice(top_k=2, top_p=0.58).shape(logits).isfinite()[0].tolist() == [True, True, False, False]
    # At temperature 0.5 the probabilities are proportional to 16, 9, 4, 1.
    shaped = Choice(temperature=0.5).shape(logits).softmax(-1)
    torch.testing.assert_close(shaped, torch.tensor([[16.0, 9.0, 4.0, 1.0]]) / 30)


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
    drawn = draw(logits.log_softmax(-1), Choice(top_k=3), uniform)
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
    keys = {row_key(s, p, i) for s in (0, 1, -1) for p in ([1], [1, 2], [2, 1]) for i in (0, 1)}
    assert len(keys) == 3 * 3 * 2
