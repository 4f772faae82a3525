"""Activation memory: what is kept equals a count by hand, and running layers again changes memory and nothing else."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_models import FLOAT32, network_of, random_tokens, tokens_of
from trimtab import memory
from trimtab.batches import Tokens
from trimtab.builtin import byte_tokenizer, tiny_policy
from trimtab.memory import (
    GIB,
    activation_bytes,
    choose_checkpointing,
    layers_of,
    recompute_layers,
    saved_bytes,
    weigh,
)
from trimtab.models import make_policy, make_scalar
from trimtab.records import Prompt
from trimtab.sampling import sample
from trimtab.weights import classifier_from

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "opt"]


def pairs(seed: int = 0, count: int = 3, prompt: int = 9, answer: int = 5) -> Tokens:
    """Pairs of answers to one prompt, of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, 256, generator=generator)
    rows, prompts = [], []
    for i in range(count):
        shared = draw((prompt + i,)).tolist()
        rows += [shared + draw((answer + i + j,)).tolist() for j in range(2)]
        prompts += [prompt + i] * 2
    return tokens_of(rows, prompts)


def kept_bytes(model: Any, tokens: Tokens) -> int:
    """Bytes kept for a body's backward pass, the inputs of its layers included: checkpointing keeps them aside."""
    inputs: dict[int, int] = {}

    def note(layer: Any, given: tuple[Tensor, ...]) -> None:
        inputs[given[0].untyped_storage().data_ptr()] = given[0].untyped_storage().nbytes()

    hooks = [layer.register_forward_pre_hook(note) for layer in layers_of(model.model)]
    with model.arithmetic.context(model.device):
        saved = saved_bytes(partial(model.body, tokens, model.body.layout(tokens)), model.model.parameters())
    for hook in hooks:
        hook.remove()
    return saved + sum(inputs.values())


# ---- How much is kept


def test_what_a_llama_keeps_equals_a_count_by_hand() -> None:
    """Per token and layer in float32: 6 D (two residuals, two normalized states, two inputs of linear maps), the
    queries and outputs of 4 heads of 16, keys and values of 2 heads of 16, and 4 times the width of the MLP (gate,
    silu(gate), up, their product); 3 D for the last norm; a mask per layer. What is left is a few numbers per token."""
    policy = tiny_policy()
    width, heads, shared, inner = 64, 4 * 16, 2 * 16, 128
    expected = 4 * (2 * (6 * width + 2 * heads + 2 * shared + 4 * inner) + 3 * width)
    growth = activation_bytes(policy, 200, 10) - activation_bytes(policy, 100, 10)
    assert growth / 1000 == pytest.approx(expected + 2 * 10 * 4, rel=0.03)
    masks = activation_bytes(policy, 10, 1000) - activation_bytes(policy, 1000, 10)
    assert masks == 2 * 4 * (10 * 1000**2 - 1000 * 10**2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_what_rows_and_shared_sequences_keep(family: str, dtype: str) -> None:
    for rank in (0, 2):
        policy = make_policy(network_of(family), byte_tokenizer(), lora_rank=rank, dtype=dtype, device="cpu")
        for count in (2, 6):
            tokens = pairs(count=count, prompt=20)
            layout = policy.body.layout(tokens)
            assert layout is not None
            run = partial(policy.body, tokens, layout)
            with policy.precision():
                measured = saved_bytes(run, policy.model.parameters())
            head = memory._head_bytes(policy, layout.ids.numel())
            estimate = activation_bytes(policy, *layout.ids.shape) - head
            assert measured * 0.9 < estimate < measured * 1.2, (rank, count)


def test_a_storage_counts_once_and_weights_do_not() -> None:
    weight, given = torch.ones(10, 10, requires_grad=True), torch.ones(4, 10, requires_grad=True)
    assert saved_bytes(lambda: torch.square(given @ weight), [weight]) == 4 * (40 + 40)
    assert saved_bytes(lambda: (given.square(), given.exp()), []) == 4 * (40 + 40)


def test_chunks_of_logits_are_counted_for_policies() -> None:
    classifier = classifier_from(tiny_policy().model, seed=0)
    policy, reward = tiny_policy(), make_scalar(classifier, byte_tokenizer(), **FLOAT32)
    assert memory._head_bytes(policy, 10_000) == 3 * 4 * 256 * 259
    assert memory._head_bytes(reward, 10_000) == 0


# ---- The decision


def test_layers_run_again_where_activations_take_more_than_four_fifths() -> None:
    assert weigh(8 * GIB, 10 * GIB, 2048) == memory.Checkpointing(
        False, "off: 2048 tokens at a time need about 8.0 of 10.0 GiB left for activations"
    )
    assert weigh(8 * GIB + 1, 10 * GIB, 2048).on
    assert weigh(1, -GIB, 1).on, "weights, gradients and means alone are too much"


def test_on_off_and_auto_on_a_cpu() -> None:
    policy = tiny_policy()
    assert choose_checkpointing("on", policy, 1, 100) == memory.Checkpointing(True, "on, as asked")
    assert choose_checkpointing("off", policy, 1, 100) == memory.Checkpointing(False, "off, as asked")
    auto = choose_checkpointing("auto", policy, 10**6, 10**3)
    assert not auto.on and auto.why.startswith("off: on a CPU")


def test_unknown_layers_are_never_run_again_and_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "layers_of", lambda network: [])
    with pytest.raises(ValueError, match="--gradient-checkpointing on: the layers of LlamaForCausalLM are not known"):
        choose_checkpointing("on", tiny_policy(), 1, 100)
    assert "not known" in choose_checkpointing("auto", tiny_policy(), 1, 100).why


# ---- Running layers again


def gradients(model: Any, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
    values = model.logprobs(tokens) if hasattr(model, "logprobs") else model.scores(tokens)
    pull = torch.linspace(-1, 1, values.numel()).view_as(values)
    return values.detach(), list(torch.autograd.grad((values * pull).sum(), model.trainable_parameters()))


@pytest.mark.parametrize("options", [{"share": True}, {"share": False}, {"share": False, "capacity": 64}])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_stay_and_memory_falls(family: str, rank: int, options: dict[str, Any]) -> None:
    policy = make_policy(network_of(family), byte_tokenizer(), lora_rank=rank, **FLOAT32)
    policy.body.use_layout(**options)
    tokens = pairs()
    expected, expected_gradients = gradients(policy, tokens)
    before = kept_bytes(policy, tokens)
    recompute_layers(policy.model)
    assert kept_bytes(policy, tokens) < 0.5 * before
    found, found_gradients = gradients(policy, tokens)
    assert (found - expected).abs().max() <= 1e-6
    assert any(gradient.abs().max() > 1e-3 for gradient in expected_gradients)
    for ours, theirs in zip(found_gradients, expected_gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * max(1, theirs.abs().max().item())


def test_bf16_and_reward_models_run_again_as_they_ran() -> None:
    reward = make_scalar(classifier_from(network_of("llama"), seed=0), byte_tokenizer(), **FLOAT32)
    rounded = make_policy(network_of("qwen3"), byte_tokenizer(), dtype="bfloat16", device="cpu", lora_rank=2)
    for model in (reward, rounded):
        expected, expected_gradients = gradients(model, pairs())
        before = kept_bytes(model, pairs())
        recompute_layers(model.model)
        assert kept_bytes(model, pairs()) < 0.5 * before
        found, found_gradients = gradients(model, pairs())
        assert torch.equal(found, expected)
        for ours, theirs in zip(found_gradients, expected_gradients, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_copy_runs_its_own_layers_again() -> None:
    policy, tokens = tiny_policy(), random_tokens()
    recompute_layers(policy.model)
    copied = copy.deepcopy(policy.model)
    assert all(layer.forward.__self__ is layer for layer in layers_of(copied))  # pyright: ignore
    frozen, before = policy.frozen(), policy.logprobs(tokens).detach()
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.mul_(1.1)
    assert torch.equal(frozen.logprobs(tokens), before)
    assert not torch.allclose(policy.logprobs(tokens), before)


def test_sampling_and_saving_do_not_notice(tmp_path: Any) -> None:
    policy, prompts = tiny_policy(), [Prompt.from_user("One?"), Prompt.from_user("Two, three?")]
    expected = sample(policy, prompts, 2, max_new_tokens=6, seed=1)
    recompute_layers(policy.model)
    found = sample(policy, prompts, 2, max_new_tokens=6, seed=1)
    assert found.texts == expected.texts and torch.equal(found.logprobs, expected.logprobs)
    policy.save(tmp_path / "model")


@pytest.mark.gpu
def test_on_a_gpu_the_estimate_bounds_what_a_step_takes() -> None:
    from trimtab.builtin import tiny
    from trimtab.models import make_policy

    policy = make_policy(*tiny(), device="cuda")
    tokens = pairs(count=16, prompt=200, answer=100)
    layout = policy.body.layout(tokens)
    assert layout is not None
    policy.logprobs(tokens).sum().backward()  # kernels and workspaces are made once
    before = torch.cuda.memory_allocated()
    with policy.precision():
        states = policy.body(Tokens(*(part.cuda() for part in vars(tokens).values())), policy.body.layout(tokens))
    kept = torch.cuda.memory_allocated() - before
    estimate = activation_bytes(policy, *layout.ids.shape) - memory._head_bytes(policy, layout.ids.numel())
    assert states.requires_grad and kept / 2 < estimate < kept * 2
    assert choose_checkpointing("auto", policy, *layout.ids.shape).why.startswith("off: ")
    assert choose_checkpointing("auto", policy, 10**6, 10**3).on
