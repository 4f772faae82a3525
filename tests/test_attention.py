"""Masks in every form that attention reads, and FlexAttention: on CPUs forward only, on CUDA with gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.test_models import config_of
from trimtab import attention
from trimtab.attention import compiled
from trimtab.batches import Tokens
from trimtab.builtin import byte_tokenizer
from trimtab.layout import lay_out
from trimtab.models import Policy, make_policy
from trimtab.precision import Precision

TORCHS_OWN = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",
)
BF16 = Precision(torch.bfloat16, "bf16")


def network_of(family: str, **more) -> PreTrainedModel:
    if family == "gemma3_text":
        more = {"layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": None, **more}
    if family == "gpt_oss":
        more = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, **more}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = config_of(family, max_position_embeddings=512, **more)
        eager = {"attn_implementation": "eager"} if family == "gemma2" else {}
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager)


def policy_of(family: str, *, frozen: bool = False, dtype: str = "float32", device: str = "cpu", **more) -> Policy:
    policy = make_policy(network_of(family, **more), byte_tokenizer(), dtype=dtype, device=device)
    policy.model.requires_grad_(not frozen)
    return policy


def pairs(prompt: int = 12, answers: tuple[int, ...] = (5, 3, 7, 2)) -> Tokens:
    """Rows of random ids, two for each prompt; prompts of at least `prompt` tokens."""
    generator = torch.Generator().manual_seed(0)
    longest = prompt + 1 + max(answers)
    ids = torch.randint(250, (len(answers), longest), generator=generator)
    ids[1::2, : prompt + 1] = ids[::2, : prompt + 1]
    prompts = torch.tensor([prompt + (i // 2) % 2 for i in range(len(answers))])[:, None]
    columns = torch.arange(longest)
    real = columns < prompts + torch.tensor(answers)[:, None]
    return Tokens(torch.where(real, ids, 0), real, real & (columns >= prompts))


def gradient(policy: Policy, tokens: Tokens) -> Tensor:
    parameters = policy.trainable_parameters()
    found = torch.autograd.grad(policy.logprobs(tokens).sum(), parameters, allow_unused=True)
    return torch.cat([each.flatten() for each in found if each is not None])


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- Masks


def test_eager_attention_reads_floats() -> None:
    layout = lay_out(pairs(), share=True)
    mask = attention.layout_mask("eager", layout, None)
    assert isinstance(mask, Tensor)
    assert torch.equal(mask == 0, layout.mask())
    assert (mask[~layout.mask()] < -1e38).all()
    assert torch.equal(attention.layout_mask("sdpa", layout, 3), layout.mask(3))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_families_with_an_attention_of_their_own_share_prompts(family: str) -> None:
    policy = policy_of(family)
    assert policy.body.attention == "eager"
    policy.body.use_layout(share=False)
    expected = policy.logprobs(pairs()), gradient(policy, pairs())
    policy.body.use_layout(share=True)
    assert policy.body.layout(pairs()) is not None
    assert torch.allclose(policy.logprobs(pairs()), expected[0], atol=1e-5)
    assert error(gradient(policy, pairs()), expected[1]) < 1e-5


# ---- FlexAttention without a GPU


@TORCHS_OWN
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral", "gpt_neox"])
def test_flex_gives_what_sdpa_gives(family: str) -> None:
    policy = policy_of(family, frozen=True)
    policy.body.use_layout(share=False)
    expected = policy.logprobs(pairs())
    policy.body.use_layout(share=True, attention="flex")
    assert policy.body.attention == "flex"
    layout = policy.body.layout(pairs())
    assert layout is not None
    assert layout.ids.shape == (1, 12 + 5 + 3 + 13 + 7 + 2), "everything in one sequence, each prompt once"
    assert torch.allclose(policy.logprobs(pairs()), expected, atol=1e-5)
    policy.body.use_layout(share=True, attention="sdpa")
    assert policy.body.attention == "sdpa"
    assert torch.allclose(policy.logprobs(pairs()), expected, atol=1e-5)


@TORCHS_OWN
def test_flex_computes_in_bf16_under_autocast() -> None:
    """Rotated and normalized queries are float32 there, values bf16."""
    policy = policy_of("qwen3", frozen=True, dtype="bfloat16")
    policy.body.use_layout(share=True, attention="sdpa")
    expected = policy.logprobs(pairs())
    policy.body.use_layout(share=True, attention="flex", precision=BF16)
    assert (policy.logprobs(pairs()) - expected).abs().max() < 0.1


@TORCHS_OWN
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_flex_has_the_gradients_of_sdpa(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's dense backward, which only a check keeps from running on CPUs; the probe sees it too."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    policy = policy_of(family)
    policy.body.use_layout(share=False)
    expected = gradient(policy, pairs())
    policy.body.use_layout(share=True)
    assert policy.body.disagrees("flex", Precision(None, "test")) is None
    attention.set_attention(policy.model, "flex")
    assert policy.body.attention == "flex"
    assert error(gradient(policy, pairs()), expected) < 1e-5


@TORCHS_OWN
def test_the_probe_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose keys get no gradient."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    policy = policy_of("llama")
    monkeypatch.setattr(
        attention, "flex_attention", lambda q, k, v, **options: flex_attention(q, k.detach(), v, **options)
    )
    assert "other states or gradients" in str(policy.body.disagrees("flex", Precision(None, "test")))


@TORCHS_OWN
def test_rows_and_caches_run_as_before_under_flex() -> None:
    policy = policy_of("gemma3_text", frozen=True)
    network, prompt = policy.model, pairs().ids[:1, :8]
    mask = torch.ones_like(prompt)

    def run() -> list[Tensor]:
        start = network(input_ids=prompt, attention_mask=mask, use_cache=True)
        step = network(
            input_ids=prompt[:, :1],
            attention_mask=torch.ones(1, 9, dtype=torch.long),
            past_key_values=start.past_key_values,
        )
        return [start.logits, step.logits]

    expected = run()
    policy.body.use_layout(share=True, attention="flex")
    for found, before in zip(run(), expected, strict=True):
        assert torch.equal(found, before)


@TORCHS_OWN
def test_a_copy_keeps_the_attention_and_a_saved_model_does_not(tmp_path: Path) -> None:
    policy = policy_of("llama", frozen=True)
    policy.body.use_layout(share=True, attention="flex")
    copied = policy.frozen()
    assert copied.policy.body.attention == "flex"
    policy.save(tmp_path / "model")
    assert attention.FLEX not in (tmp_path / "model" / "config.json").read_text()


@TORCHS_OWN
def test_a_kernel_that_gives_other_numbers_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llama", frozen=True)
    assert policy.body.why_not("flex", Precision(None, "test")) is None
    monkeypatch.setattr(attention, "flex_attention", lambda query, *arguments, **options: query)
    with pytest.raises(ValueError, match="attention flex: flex attention gives other states or gradients"):
        policy.body.use_layout(attention="flex")

    def fails(*arguments, **options):
        raise RuntimeError("no valid configuration\nmore")

    monkeypatch.setattr(attention, "flex_attention", fails)
    with pytest.raises(ValueError, match=r"flex attention failed on this cpu \(no valid configuration\)\. Use"):
        policy.body.use_layout(attention="flex")
    assert policy.body.attention == "sdpa"
    assert torch.isfinite(policy.logprobs(pairs())).all()


def test_what_cannot_be_is_refused_by_name() -> None:
    policy = policy_of("llama")
    with pytest.raises(ValueError, match="attention flex: FlexAttention has no backward pass on CPUs"):
        policy.body.use_layout(attention="flex")
    for name in ("flex", "sdpa"):
        with pytest.raises(ValueError, match=f"attention {name} has no effect on rows as they are"):
            policy.body.use_layout(share=False, attention=name)
    with pytest.raises(ValueError, match="attention fast: allowed are auto, sdpa, flex, blocked"):
        policy.body.use_layout(attention="fast")  # pyright: ignore[reportArgumentType]
    sinking = policy_of("gpt_oss", frozen=True)
    with pytest.raises(ValueError, match="attention sdpa: GptOssForCausalLM runs its own, eager"):
        sinking.body.use_layout(attention="sdpa")
    with pytest.raises(ValueError, match="attention flex: GptOssForCausalLM does not leave its attention to"):
        sinking.body.use_layout(attention="flex")
    assert policy.body.arrangement is not None, "a refused layout changes nothing"


def test_auto_is_blocks_on_cpus() -> None:
    policy = policy_of("llama")
    policy.body.use_layout()
    assert (policy.body.attention, policy.body.why) == ("blocked", "blocked attention, chosen for cpu")


def run_lengths(make, attend, device: str = "cpu", *, grad: bool) -> None:
    """Masks and attention of six packed batches, of two and more blocks of 128, one block count equal to the heads."""
    for prompt in (60, 75, 90, 130, 250, 110):
        tokens = pairs(prompt, (5, 9, 3, 6, 30, 2))
        layout = lay_out(Tokens(*(t.to(device) for t in vars(tokens).values())), share=True)
        length = layout.ids.shape[1]
        mask = make(layout.mask_mod(7), 1, None, length, length, device=torch.device(device))
        query, key, value = (torch.randn(1, heads, length, 16, device=device) for heads in (4, 2, 2))
        with torch.set_grad_enabled(grad):
            found = attend(query.requires_grad_(grad), key, value, block_mask=mask, enable_gqa=True)
            dense = layout.mask(7)
            expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, dense, enable_gqa=True)
        assert error(found, expected) < 1e-5
        if grad:
            found.sum().backward()


@TORCHS_OWN
def test_no_length_compiles_again() -> None:
    masks, kernels = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    run_lengths(compiled(create_block_mask, masks), compiled(flex_attention, kernels), grad=False)
    assert (masks.frame_count, kernels.frame_count) == (1, 1)


# ---- FlexAttention on CUDA


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_cuda_gradients_equal_those_of_sdpa(cuda: str, family: str, dtype: str, tolerance: float) -> None:
    policy = policy_of(family, dtype=dtype, device=cuda, hidden_size=64, head_dim=16)
    for tokens in (pairs(), pairs(100, (50, 30, 70, 20)), pairs(200, (5, 3, 7, 2, 9, 40))):
        policy.body.use_layout(share=True, attention="sdpa")
        expected = policy.logprobs(tokens), gradient(policy, tokens)
        policy.body.use_layout(share=True, attention="flex", precision=policy.arithmetic)
        assert error(policy.logprobs(tokens), expected[0]) < tolerance
        assert error(gradient(policy, tokens), expected[1]) < tolerance


@pytest.mark.gpu
def test_cuda_chooses_flex(cuda: str) -> None:
    policy = policy_of("llama", device=cuda, hidden_size=64, head_dim=16)
    policy.body.use_layout()
    assert (policy.body.attention, policy.body.why) == ("flex", "flex attention, chosen for cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True])
def test_cuda_lengths_compile_at_most_twice(cuda: str, grad: bool) -> None:
    masks, kernels = CompileCounterWithBackend("inductor"), CompileCounterWithBackend("inductor")
    run_lengths(compiled(create_block_mask, masks), compiled(flex_attention, kernels), cuda, grad=grad)
    assert masks.frame_count <= 2
    assert kernels.frame_count <= 2
