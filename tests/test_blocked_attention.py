"""Attention by blocks of queries against a literal float64 version, whatever the blocks are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_attention import error, gradient, pairs, policy_of
from trimtab import blocked_attention as blocked
from trimtab.batches import Tokens
from trimtab.blocked_attention import blocked_attention
from trimtab.layout import lay_out

SIZE = 8


def literal(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """softmax(scaling Q K^T + bias) V, head by head."""
    shared = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        keys, values = key[:, head // shared], value[:, head // shared]
        scores = torch.einsum("sid,sjd->sij", query[:, head], keys) * scaling + bias[:, 0]
        heads.append(torch.einsum("sij,sjd->sid", scores.softmax(-1), values))
    return torch.stack(heads, 1)


def inputs(sequences: int, heads: int, groups: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values, a gradient at the result, and a bias that hides some earlier tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sequences, count, length, SIZE) for count in (heads, groups, groups, heads)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    sees = (torch.rand(sequences, 1, length, length, generator=generator) < 0.7).tril() | torch.eye(length).bool()
    return [*drawn, torch.zeros(sees.shape, dtype=torch.float32).masked_fill_(~sees, -torch.inf)]


def with_gradients(attend, query: Tensor, key: Tensor, value: Tensor, slope: Tensor, bias: Tensor) -> list[Tensor]:
    """The result, and the gradients of its product with `slope`."""
    leaves = [each.detach().requires_grad_() for each in (query, key, value)]
    result = attend(*leaves, bias, 0.3)
    return [result.detach(), *torch.autograd.grad(result, leaves, slope)]


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("rows", "scores"), [(128, 2**20), (4, 2**20), (5, 60), (1, 1)])
def test_it_is_the_literal_formula_for_all_blocks(heads: int, groups: int, rows: int, scores: int, monkeypatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ROWS", rows)
    monkeypatch.setattr(blocked, "BLOCK_SCORES", scores)
    exact = inputs(3, heads, groups, 11)
    expected = with_gradients(literal, *exact[:4], exact[4].double())
    found = with_gradients(blocked_attention, *(each.float() for each in exact))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one.double(), other, atol=2e-6)


def test_a_token_that_sees_itself_alone_gives_its_own_value() -> None:
    query, key, value, slope, _ = (each.float() for each in inputs(1, 2, 2, 5))
    alone = torch.full((1, 1, 5, 5), -torch.inf).masked_fill_(torch.eye(5).bool(), 0.0)
    result, to_query, to_key, to_value = with_gradients(blocked_attention, query, key, value, slope, alone)
    assert torch.equal(result, value)
    assert not to_query.any() and not to_key.any(), "a share of one does not depend on scores"
    assert torch.allclose(to_value, slope)


def test_what_is_not_seen_does_not_matter() -> None:
    query, key, value, _, _ = (each.float() for each in inputs(1, 2, 1, 6))
    bias = torch.zeros(1, 1, 6, 6).masked_fill_(~torch.ones(6, 6).tril().bool(), -torch.inf)
    bias[:, :, 4:, 1] = -torch.inf
    before = blocked_attention(query, key, value, bias, 1.0)
    key[:, :, 1], value[:, :, 1] = 7.0, -9.0
    after = blocked_attention(query, key, value, bias, 1.0)
    assert torch.equal(before[:, :, 4:], after[:, :, 4:])
    assert not torch.allclose(before[:, :, 1:4], after[:, :, 1:4])


def test_in_bf16_it_is_as_close_as_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ROWS", 32)
    exact = inputs(2, 6, 2, 100)
    rough = inputs(2, 6, 2, 100, torch.bfloat16)
    expected = with_gradients(literal, *exact[:4], exact[4].double())

    def torchs(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
        keys, values = (each.repeat_interleave(3, 1) for each in (key, value))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias == 0, scale=scaling)

    found, other = (with_gradients(attend, *rough) for attend in (blocked_attention, torchs))
    for ours, theirs, right in zip(found, other, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - right).norm() < 1.3 * (theirs.double() - right).norm()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral", "gpt_neox"])
def test_families_run_layouts_by_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen on CPUs; states and gradients are those of plain rows."""
    monkeypatch.setattr(blocked, "BLOCK_ROWS", 7)
    policy = policy_of(family)
    policy.body.use_layout(share=False)
    expected = policy.logprobs(pairs()), gradient(policy, pairs())
    policy.body.use_layout(share=True)
    assert (policy.body.attention, policy.body.why) == ("blocked", "blocked attention, chosen for cpu")
    assert policy.body.layout(pairs()) is not None
    assert torch.allclose(policy.logprobs(pairs()), expected[0], atol=1e-5)
    assert error(gradient(policy, pairs()), expected[1]) < 1e-5
    policy.body.use_layout(share=False)
    assert policy.body.attention == "sdpa"


def test_rows_and_padding_run_by_sdpa_under_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llama")
    policy.body.use_layout(share=True)
    tokens = pairs()
    called: list[int] = []
    monkeypatch.setattr("trimtab.attention.blocked_attention", lambda *heads: called.append(1) or heads[0])
    policy.body(tokens, None)
    assert not called
    policy.body(tokens, lay_out(tokens, share=True))
    assert called


def test_what_changes_attention_is_not_run_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong is found by the probe, and sdpa runs instead; asked for by name, it is an error."""
    monkeypatch.setattr("trimtab.attention.blocked_attention", lambda query, *others: query)
    policy = policy_of("llama")
    policy.body.use_layout(share=True)
    assert policy.body.attention == "sdpa"
    assert "gives other states or gradients" in policy.body.why
    with pytest.raises(ValueError, match="attention blocked: blocked attention gives other states or gradients"):
        policy.body.use_layout(share=True, attention="blocked")
    with pytest.raises(ValueError, match="attention blocked: GptOssForCausalLM does not leave its attention to"):
        policy_of("gpt_oss").body.use_layout(attention="blocked")


def test_dropout_of_attention_is_refused() -> None:
    policy = policy_of("llama", attention_dropout=0.5)
    policy.model.train()
    policy.body.use_layout(share=True)
    assert policy.body.attention == "sdpa"
    assert "drops 50% of its attention" in policy.body.why


def test_a_padded_sequence_has_no_nan() -> None:
    """Sequences of unequal length: padding sees itself."""
    policy = policy_of("llama")
    policy.body.use_layout(share=True)
    tokens: Tokens = pairs(prompt=30, answers=(5, 3, 40, 2))
    assert policy.logprobs(tokens).isfinite().all()
    assert gradient(policy, tokens).isfinite().all()
