"""Sampling: the right distribution, whatever the batch; greedy and log-probabilities as the model has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from trimtab.builtin import byte_tokenizer, tiny_policy
from trimtab.models import Policy, make_policy
from trimtab.records import Prompt
from trimtab.sampling import Samples, answers, sample
from trimtab.sampling.draws import Choice
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


def generated(policy: Policy, prompt: Prompt, **settings: float) -> list[int]:
    """The ids that transformers gives as a prompt's greedy answer, which nothing ends early."""
    ids = torch.tensor([encode_prompt(policy.tokenizer, prompt)])
    ending = {"eos_token_id": None, "pad_token_id": policy.pad_id}
    found = policy.model.generate(  # pyright: ignore
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **ending, **settings
    )
    return found[0, ids.shape[1] :].tolist()


def test_greedy_is_what_transformers_generates(policy: Policy) -> None:
    greedy = sample(policy, PROMPTS, 1, max_new_tokens=12, temperature=0, stop_ids=())
    for row, prompt in enumerate(PROMPTS):
        assert responses(greedy)[row] == generated(policy, prompt, min_new_tokens=12, max_new_tokens=12)
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
    monkeypatch.setattr(answers.Decoding, "start", classmethod(certain_end(eos_id(policy.tokenizer))))
    drawn = sample(policy, PROMPTS[:2], 2, max_new_tokens=4)
    assert drawn.finished.all() and drawn.texts == [""] * 4
    assert (drawn.tokens.response_lengths == 1).all(), "the end token carries loss although padding looks like it"


def certain_end(eos: int):
    """A start whose logits leave no choice but the end of sequence."""
    start = answers.Decoding.start.__func__  # pyright: ignore

    def started(cls: type, *given: Any) -> answers.Decoding:
        batch = start(cls, *given)
        batch.logits = torch.full_like(batch.logits, -1e4)
        batch.logits[:, eos] = 0
        return batch

    return started


def test_finished_rows_leave_the_batch(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, step = [], answers.Decoding.step

    def counting(self: answers.Decoding, ids: torch.Tensor) -> None:
        sizes.append(len(ids))
        step(self, ids)

    monkeypatch.setattr(answers.Decoding, "step", counting)
    free = sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, stop_ids=())
    assert sizes == [30] * 11
    sizes.clear()
    common = int(torch.tensor(responses(free)).flatten().mode().values)
    stopped = sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, stop_ids={common})
    alive = [sum(len(answer) > step for answer in responses(stopped)) for step in range(1, 12)]
    assert sizes[-1] < 30 and all(count <= size <= count * 8 / 7 + 1 for count, size in zip(alive, sizes, strict=False))


def test_stop_text_ends_an_answer_and_stays_out_of_its_text(policy: Policy) -> None:
    free = sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, stop_ids=())
    # The byte tokenizer writes one letter a token, so a text of two letters ends one token after it begins.
    text = max({t[i : i + 2] for t in free.texts for i in range(9) if t[i : i + 2].isascii()}, key=count_in(free.texts))
    stopped = sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, stop_ids=(), stop=(text, "no answer says this"))
    assert stopped.finished.any() and not stopped.finished.all()
    for before, after, ended, ids in zip(
        free.texts, stopped.texts, stopped.finished.tolist(), responses(stopped), strict=True
    ):
        assert ended == (text in before) and after == before.split(text)[0]
        assert decode(policy.tokenizer, ids) == (after + text if ended else before)
    assert sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, stop=("no answer says this",)).texts == (
        sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3).texts
    )


def count_in(texts: list[str]) -> Callable[[str], int]:
    return lambda part: sum(part in text for text in texts)


def test_a_repetition_penalty_counts_prompt_and_answer(policy: Policy) -> None:
    drawn = sample(policy, PROMPTS[:3], 2, max_new_tokens=8, repetition_penalty=1.7, temperature=0.8, seed=5)
    choice = Choice(0.8, repetition_penalty=1.7)
    with torch.no_grad():
        logits = policy.model(
            input_ids=drawn.tokens.ids, attention_mask=drawn.tokens.attention_mask.long()
        ).logits.float()
    for row, columns in enumerate(drawn.tokens.response_mask):
        for t in columns.nonzero()[:, 0].tolist():
            seen = torch.zeros(1, logits.shape[-1], dtype=torch.bool)
            seen[0, drawn.tokens.ids[row, :t]] = True
            shaped = choice.shape(logits[row, t - 1][None], seen)[0].log_softmax(-1)
            plain = logits[row, t - 1].log_softmax(-1)
            token = drawn.tokens.ids[row, t]
            assert float(drawn.sampled_logprobs[row, t]) == pytest.approx(float(shaped[token]), abs=1e-4)
            assert float(drawn.logprobs[row, t]) == pytest.approx(float(plain[token]), abs=1e-4)
    apart = sample(
        policy, PROMPTS[:3], 2, max_new_tokens=8, repetition_penalty=1.7, temperature=0.8, seed=5, batch_rows=1
    )
    assert apart.texts == drawn.texts


def test_greedy_with_a_penalty_is_what_transformers_generates(policy: Policy) -> None:
    found = sample(policy, PROMPTS[:1], max_new_tokens=20, temperature=0, repetition_penalty=1.3, stop_ids=())
    assert responses(found)[0] == generated(policy, PROMPTS[0], repetition_penalty=1.3, max_new_tokens=20)


def test_steps_draw_different_answers_and_can_be_repeated(policy: Policy, samples: Samples) -> None:
    at_step = {step: sample(policy, PROMPTS, 5, max_new_tokens=12, seed=3, step=step).texts for step in (0, 7, 8)}
    assert at_step[0] == samples.texts, "step 0 is the default"
    assert not set(at_step[7]) & set(at_step[8]) and not set(at_step[7]) & set(at_step[0])
    assert sample(policy, PROMPTS[::-1], 5, max_new_tokens=12, seed=3, step=7).texts[-5:] == at_step[7][:5]


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
        ({"temperature": 0.0, "min_p": 0.5}, "have no effect"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"step": -1}, "step is -1"),
        ({"stop": ("",)}, "stop text is empty"),
        ({"stop": ("<|im_end|>",)}, "special token"),
    ],
)
def test_settings_that_mean_nothing(policy: Policy, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(policy, PROMPTS[:1], **settings)  # pyright: ignore


def test_no_prompts(policy: Policy) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        sample(policy, [])
