"""Decoders: the lean one gives the model's own logits, and is chosen only for models that it can run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimtab.builtin import byte_tokenizer, tiny_policy
from trimtab.models import make_policy
from trimtab.records import Prompt
from trimtab.sampling import decoders, sample
from trimtab.sampling.decoders import CacheDecoder, LeanDecoder, is_lean
from trimtab.sampling.llama import Llama, has_its_parts
from trimtab.sampling.products import PlainProduct

PROMPTS = [Prompt.from_text(text) for text in ("Once upon a time", "a", "A longer prompt than the others here is.")]

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def model_of(family: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, "vocab_size": len(byte_tokenizer()), **settings})
    return AutoModelForCausalLM.from_config(config)


LEAN = {
    "llama": {},
    "llama, biases": {"attention_bias": True},
    "llama, heads of other widths": {"head_dim": 16},
    "llama, far positions": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    },
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}

NOT_LEAN = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "smollm3": {"num_hidden_layers": 4},
    "olmo2": {},
    "gpt_neox": {},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    },
}


@pytest.mark.parametrize("name", LEAN)
def test_relatives_of_llama_are_lean(name: str) -> None:
    network = model_of(name.split(",", maxsplit=1)[0], **LEAN[name])
    assert is_lean(network)
    policy = make_policy(network, byte_tokenizer(), dtype="float32", device="cpu")
    drawn = sample(policy, PROMPTS, 3, max_new_tokens=70, seed=1, stop_ids=())
    with torch.no_grad():
        torch.testing.assert_close(drawn.logprobs, policy.logprobs(drawn.tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", NOT_LEAN)
def test_others_are_not(family: str) -> None:
    assert not is_lean(model_of(family, **NOT_LEAN[family]))


def test_numbers_decide_where_parts_look_alike() -> None:
    granite = model_of("granite", residual_multiplier=0.5)
    assert has_its_parts(granite) and not decoders.lean_agrees(granite)
    # Scales of 1 are no difference: this Granite is a Llama.
    assert is_lean(model_of("granite"))


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_decoders_sample_the_same(monkeypatch: pytest.MonkeyPatch, lora_rank: int, dtype: str) -> None:
    policy = tiny_policy(dtype=dtype, lora_rank=lora_rank)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    lean = sample(policy, PROMPTS, 4, max_new_tokens=12, seed=3)
    monkeypatch.setattr(decoders, "is_lean", lambda network: False)
    through_transformers = sample(policy, PROMPTS, 4, max_new_tokens=12, seed=3)
    if dtype == "float32":
        assert torch.equal(lean.tokens.ids, through_transformers.tokens.ids)
        torch.testing.assert_close(lean.logprobs, through_transformers.logprobs, atol=1e-5, rtol=1e-5)
    else:
        # Rounding moves a draw now and then; the first tokens have seen the least of it.
        pairs = zip(lean.texts, through_transformers.texts, strict=True)
        assert sum(one[:1] == other[:1] for one, other in pairs) > 0.8 * len(lean.texts)


def test_half_precision_samples_are_off_by_less_than_half_precision_itself() -> None:
    half, full = tiny_policy(dtype="bfloat16"), tiny_policy(dtype="float32")
    drawn = sample(half, PROMPTS, 20, max_new_tokens=40, seed=3)
    with torch.no_grad():
        scored, exact = half.logprobs(drawn.tokens), full.logprobs(drawn.tokens)
    off, rounding = ((values - scored).abs()[drawn.tokens.response_mask].mean() for values in (drawn.logprobs, exact))
    assert 0 < off < 1.5 * rounding


def test_weights_are_read_anew_for_every_call() -> None:
    policy = tiny_policy(dtype="bfloat16")
    before = sample(policy, PROMPTS, 2, max_new_tokens=8)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.5)
    after = sample(policy, PROMPTS, 2, max_new_tokens=8)
    with torch.no_grad():
        off = (after.logprobs - policy.logprobs(after.tokens)).abs()[after.tokens.response_mask]
    assert after.texts != before.texts and float(off.mean()) < 0.05


def test_full_precision_copies_no_weight() -> None:
    policy = tiny_policy()
    body = Llama.of(policy.model, torch.float32)
    own = {weight.data_ptr() for weight in policy.model.parameters()}
    products = [block.queries_keys_values for block in body.blocks]
    used = {
        weight.data_ptr() for product in products if isinstance(product, PlainProduct) for weight in product.weights
    }
    assert len(used) == 3 * len(body.blocks) and used <= own


def test_the_two_are_what_they_say() -> None:
    policy = tiny_policy()
    with torch.no_grad(), decoders.decoders(policy) as start:
        assert start.func.__self__ is LeanDecoder  # pyright: ignore
    gpt = make_policy(model_of("gpt_neox"), byte_tokenizer(), dtype="float32", device="cpu")
    with torch.no_grad(), decoders.decoders(gpt) as start:
        assert start.func.__self__ is CacheDecoder  # pyright: ignore
