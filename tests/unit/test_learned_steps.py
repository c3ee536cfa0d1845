"""Learned steps: the published gradients, ranges that lose least, and rounding without training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgekit.exporters import weight_grid
from edgekit.training import classify, folded_vit, learned_steps, post_training, vit
from edgekit.training.learned_steps import Levels, OnGrid, RowSteps

CONFIG: dict[str, Any] = {
    "shape": [1, 8, 8],
    "classes": 3,
    "patch": 2,
    "width": 24,
    "depth": 2,
    "heads": 2,
    "hidden": 48,
}
BITS = {"weight_bits": 4, "activation_bits": 4}


def straight_through(
    x: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, low: int, high: int
) -> torch.Tensor:
    """The same formula, its gradients left to autograd: round passes them as they are."""
    value = ((x - offset) / step).clamp(low, high)
    return (value + (value.round() - value).detach()) * step + offset


@pytest.mark.parametrize("steps", [1, 7])
def test_the_gradients_are_those_of_the_papers(steps: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(7, 50, dtype=torch.float64)
    found = []
    for mine in (True, False):
        x = torch.randn(7, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        step = torch.linspace(0.2, 0.5, steps, dtype=torch.float64)
        step = step if steps == 1 else step.view(-1, 1)
        offset = torch.full((1,), 0.13, dtype=torch.float64) if steps == 1 else None
        given = [x, step] if offset is None else [x, step, offset]
        for each in given:
            each.requires_grad_()
        if mine:
            out = OnGrid.apply(x, step, offset, -4, 3, 1.0)
        else:
            out = straight_through(x, step, torch.zeros(1) if offset is None else offset, -4, 3)
        (out * weights).sum().backward()
        found.append([out.detach(), *(each.grad for each in given)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_steps_gradient_is_scaled_as_asked() -> None:
    x, gradients = torch.randn(4, 9), []
    for scale in (1.0, 0.25):
        step = torch.full((1,), 0.3, requires_grad=True)
        OnGrid.apply(x, step, None, -8, 7, scale).sum().backward()
        gradients.append(step.grad)
    torch.testing.assert_close(gradients[0] * 0.25, gradients[1])


@pytest.mark.parametrize(("bits", "kind", "count"), [(4, "signed", 16), (3, "offset", 8)])
def test_values_take_no_more_levels_than_the_bits_have(bits: int, kind: Any, count: int) -> None:
    levels = Levels(bits, kind).eval()
    x = torch.randn(5000) * 3 + 1
    levels.set(*learned_steps.least_error(x, levels))
    found = levels(x.view(1, -1))
    assert len(found.unique()) == count
    torch.testing.assert_close(levels.train()(x.view(1, -1)), found)


def test_softmax_needs_no_sign_and_gelu_an_offset() -> None:
    probabilities = torch.randn(200, 16).softmax(1)
    gelu = torch.nn.functional.gelu(torch.randn(4000))

    def error(x: torch.Tensor, kind: Any) -> float:
        levels = Levels(4, kind).eval()
        levels.set(*learned_steps.least_error(x, levels))
        return (levels(x.view(1, -1)) - x.view(1, -1)).square().mean().item()

    assert error(probabilities, "unsigned") < 0.5 * error(probabilities, "signed")
    assert error(gelu, "offset") < 0.7 * error(gelu, "signed")


def test_a_search_loses_less_than_the_whole_range() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000)
    x[7] = 20.0
    weight = torch.randn(6, 400)
    weight[:, 5] = 9.0
    levels, rows = Levels(4, "offset").eval(), RowSteps(4, 6)
    errors = []
    for of_values, of_rows in (
        (learned_steps.whole_range, learned_steps.row_whole),
        (learned_steps.least_error, learned_steps.row_least_error),
    ):
        levels.set(*of_values(x, levels))
        rows.set(of_rows(weight, rows))
        off = (rows(weight) - weight).square().sum(1).detach()
        errors.append(((levels(x.view(1, -1)) - x).square().sum().item(), off))
    assert errors[1][0] < 0.5 * errors[0][0]
    assert (errors[1][1] < 0.6 * errors[0][1]).all()


def test_rows_keep_to_what_4_bits_hold_everywhere() -> None:
    rows = RowSteps(4, 3)
    assert (rows.low, rows.high) == (-7, 7)  # LiteRT's have no -8
    assert (RowSteps(2, 3).low, RowSteps(2, 3).high) == (-2, 1)


def network_and_inputs() -> tuple[vit.VisionTransformer, torch.Tensor]:
    torch.manual_seed(0)
    network = vit.build(CONFIG).eval()
    with torch.no_grad():
        for each in network.parameters():
            each.add_(0.3 * torch.randn_like(each) / each.shape[-1] ** 0.5)
    return network, torch.randn(64, 1, 8, 8)


def off(network: torch.nn.Module, plain: torch.nn.Module, inputs: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = plain(inputs)
        return float((network(inputs) - wanted).square().mean() / wanted.square().mean())


def test_more_bits_and_better_methods_lose_less() -> None:
    plain, inputs = network_and_inputs()
    state = plain.state_dict()

    def error(bits: int, method: post_training.Method) -> float:
        config = CONFIG | {"weight_bits": min(bits, 4), "activation_bits": bits}
        return off(post_training.quantized(config, state, inputs, method), plain, inputs)

    rough, searched, corrected = (error(4, each) for each in post_training.METHODS)
    assert searched < rough and corrected < searched
    assert error(3, post_training.LEAST_ERROR) > searched > error(8, post_training.LEAST_ERROR)


def test_corrected_biases_give_the_float_networks_means() -> None:
    plain, inputs = network_and_inputs()
    found = post_training.quantized(
        CONFIG | BITS, plain.state_dict(), inputs, post_training.CORRECTED
    )
    with torch.no_grad():
        torch.testing.assert_close(
            found(inputs).mean(0), plain(inputs).mean(0), atol=1e-4, rtol=1e-3
        )


def test_the_ends_are_quantized_only_where_asked() -> None:
    plain, inputs = network_and_inputs()
    for ends, count in ((False, 12), (True, 14)):
        network = post_training.quantized(
            CONFIG | BITS | {"ends": ends}, plain.state_dict(), inputs, post_training.MIN_MAX
        )
        steps = [each for each in network.modules() if isinstance(each, RowSteps)]
        assert len(steps) == count


@pytest.mark.parametrize("ends", [False, True])
def test_a_folded_network_answers_alike_and_its_weights_lie_on_grids(ends: bool) -> None:
    plain, inputs = network_and_inputs()
    config = CONFIG | BITS | {"ends": ends}
    network = post_training.quantized(config, plain.state_dict(), inputs, post_training.LEAST_ERROR)
    made, folded = folded_vit.folded(config, network)
    assert not any(isinstance(each, Levels | RowSteps) for each in folded.modules())
    # A value on the edge between two levels may go either way.
    assert off(folded, network, inputs) < 1e-3
    again = vit.build(made)
    again.load_state_dict(folded.state_dict())
    for name, layer in again.named_modules():
        if isinstance(layer, vit.QuantLinear):
            on_grid = weight_grid.of_rows(layer.weight.detach().numpy()) is not None
            assert on_grid == (ends or name not in ("embed", "head")), name


def test_a_bootstrap_holds_the_lead_and_an_equal_pair_none() -> None:
    torch.manual_seed(0)
    one = (torch.rand(2000) < 0.9).tolist()
    other = [hit and torch.rand(()) < 0.98 for hit in one]
    other = [bool(each) for each in other]
    lead = classify.bootstrap(one, other)
    assert 0 < lead.low < lead.value < lead.high < 0.05
    # The same as with images drawn one by one.
    both = torch.tensor(one).double() - torch.tensor(other).double()
    drawn = both[torch.randint(0, 2000, (2000, 2000))].mean(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert (lead.low, lead.high) == pytest.approx((low, high), abs=1.5e-3)
    same = classify.bootstrap(one, one)
    assert (same.value, same.low, same.high) == (0, 0, 0)
