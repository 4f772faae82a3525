"""Products of prepared weights are the products of the layers they were made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trimtab.builtin import tiny_policy
from trimtab.projection import Head
from trimtab.sampling import products
from trimtab.sampling.products import PackedProduct, PlainProduct, can_pack, joined_biases, product_of, projection_of

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not can_pack(CPU):
        pytest.skip("this processor or torch packs no weights")
    monkeypatch.setattr(products, "can_pack", lambda device: request.param)
    return request.param


def layers(bias: bool) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(48, size, bias=bias) for size in (32, 16, 16)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 300])
@torch.no_grad()
def test_a_joined_product_is_the_products_side_by_side(packs: bool, bias: bool, rows: int) -> None:
    product = product_of(*layers(bias), dtype=torch.bfloat16)
    assert isinstance(product, PackedProduct if packs else PlainProduct)
    states = torch.randn(rows, 2, 48)
    expected = torch.cat([F.linear(*rounded(states, layer)) for layer in layers(bias)], -1)
    found = product(states)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2**-8)


def rounded(states: torch.Tensor, layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Factors as bf16 has them, for a product in float64."""
    bias = None if layer.bias is None else layer.bias.bfloat16().double()
    return states.bfloat16().double(), layer.weight.bfloat16().double(), bias


@torch.no_grad()
def test_full_precision_is_exact_and_copies_nothing() -> None:
    parts = layers(True)
    product = product_of(*parts, dtype=torch.float32)
    assert isinstance(product, PlainProduct)
    assert [weight.data_ptr() for weight in product.weights] == [part.weight.data_ptr() for part in parts]
    states = torch.randn(5, 48)
    assert torch.equal(product(states), torch.cat([part(states) for part in parts], -1))


@torch.no_grad()
def test_adapters_are_merged_unless_they_are_switched_off() -> None:
    policy = tiny_policy(lora_rank=2)
    layer = policy.model.base_model.layers[0].self_attn.q_proj  # pyright: ignore
    layer.lora_B["default"].weight.normal_()
    states = torch.randn(5, 64)
    with_adapter = product_of(layer, dtype=torch.float32)(states)
    torch.testing.assert_close(with_adapter, layer(states), atol=1e-5, rtol=1e-5)
    assert policy.adapter is not None
    with policy.adapter.disable_adapter():
        assert torch.equal(product_of(layer, dtype=torch.float32)(states), layer(states))
    assert (with_adapter - layer.base_layer(states)).abs().max() > 0.1


@torch.no_grad()
def test_logits_are_float32_and_shaped_as_the_family_does(packs: bool) -> None:
    torch.manual_seed(0)
    head = Head(torch.randn(300, 48), torch.randn(300), scale=0.5, cap=30.0)
    states = torch.randn(4, 48)
    exact = projection_of(head, CPU, fast=False)(states)
    assert torch.equal(exact, head.logits(states))
    fast = projection_of(head, CPU, fast=True)(states)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, exact, atol=0.15, rtol=0.02)


def test_biases_of_all_or_of_none() -> None:
    assert joined_biases((None, None), torch.float32) is None
    with pytest.raises(AssertionError, match="either all"):
        joined_biases((torch.zeros(2), None), torch.float32)
