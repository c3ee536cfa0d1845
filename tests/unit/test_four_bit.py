"""Weights of four bits: the levels, the rounding, the cost, and the gradient that goes through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgekit.training.four_bit import BLOCK, FourBit, levels, quantize_linears

# QLoRA, appendix E, to four digits.
PAPER = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
PAPER += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


def linear(inner: int = 192, outer: int = 80, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inner, outer, bias=bias)


def test_the_levels_are_those_of_the_paper() -> None:
    assert levels().tolist() == pytest.approx(PAPER, abs=1e-4)


def test_each_weight_is_the_nearest_level_times_its_block_s_scale() -> None:
    layer = linear()
    blocks = layer.weight.detach().reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / scale[..., None] - levels()).abs().argmin(-1)
    expected = (levels()[nearest] * scale).view_as(layer.weight)
    # The scales have 8 bits: within 1/254 of the widest of 256.
    torch.testing.assert_close(FourBit(layer).weight, expected, rtol=0, atol=5e-4)


def test_values_on_the_levels_come_back_and_a_layer_of_zeros_stays_one() -> None:
    layer = linear(256, 64, bias=False)
    picks = torch.randint(0, 16, (64, 256), generator=torch.Generator().manual_seed(1))
    picks[:, ::BLOCK] = 15  # each block's largest is 1: all scales are alike
    with torch.no_grad():
        layer.weight.copy_(0.3 * levels()[picks])
    torch.testing.assert_close(FourBit(layer).weight, layer.weight.detach())
    with torch.no_grad():
        layer.weight.zero_()
    assert not FourBit(layer).weight.any()


@pytest.mark.parametrize("shape", [(192, 80), (63, 5), (64, 1)])
def test_any_shape_goes(shape: tuple[int, int]) -> None:
    layer = linear(*shape)
    x = torch.randn(3, shape[0])
    error = (FourBit(layer)(x) - layer(x)).abs().mean() / layer(x).abs().mean()
    assert 0.001 < error < 0.3


def test_it_costs_little_more_than_four_bits_a_weight() -> None:
    layer = FourBit(linear(1024, 1024, bias=False))
    assert 8 * layer.size_bytes / 1024**2 == pytest.approx(4.127, abs=0.002)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_gradient_is_that_of_the_rounded_matrix_and_nothing_else_is_kept(bf16: bool) -> None:
    layer = FourBit(linear())
    x = torch.randn(4, 192, requires_grad=True)
    kept: list[torch.Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        out = layer(x)
    assert sum(each.numel() for each in kept) == 0
    (2 * out).sum().backward()
    expected = 2 * torch.ones(4, 80) @ layer.weight
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, expected, rtol=2e-2 if bf16 else 1e-5, atol=2e-2)


def test_a_model_s_linear_layers_are_changed_but_those_that_are_named() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(linear(), nn.ReLU()), "lm_head": linear()})
    taken = quantize_linears(model, {"lm_head"})
    assert isinstance(model["body"][0], FourBit) and type(model["lm_head"]) is nn.Linear
    assert taken == model["body"][0].size_bytes
    # What is packed is no part of a checkpoint, and nothing in it is trained.
    assert set(model["body"].state_dict()) == {"0.bias"}
