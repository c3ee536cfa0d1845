"""Channels and weights taken out of a network: the right ones, all that hang together, no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

from edgekit.device import load_profile
from edgekit.errors import RecipeError, UsageError
from edgekit.training import (
    bootstrap,
    channel_choice,
    channel_groups,
    residual,
    sensitivity_scan,
    sparsity,
)
from edgekit.training.convolution_time import Convolution, Measured, Predicted, total_ms

SHAPE = (1, 16, 16)
Kind = Literal["basic", "inverted"]
kinds = pytest.mark.parametrize("kind", ["basic", "inverted"])


def config(kind: Kind = "basic") -> dict[str, Any]:
    return residual.config(SHAPE, 3, kind=kind, widths=(8, 12), blocks=(1, 2), expand=2)


def network(body: dict[str, Any]) -> torch.nn.Module:
    """With batch norms that have seen something, as after training."""
    torch.manual_seed(0)
    made = residual.build(body)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for each, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.3)):
                torch.nn.init.uniform_(each, low, low + 1)
    return made.eval()


def losses(count: int = 3) -> list[Any]:
    torch.manual_seed(1)
    batches = [(torch.randn(8, *SHAPE), torch.randint(0, 3, (8,))) for _ in range(count)]
    return [lambda net, x=x, y=y: F.cross_entropy(net(x), y) for x, y in batches]


# Which go together


def test_what_is_added_up_goes_together_and_what_is_inside_a_block_goes_alone() -> None:
    groups = channel_groups.find(network(config()), SHAPE, "head")
    makers = {frozenset(group.makers): group for group in groups}
    inside = [{f"stages.{name}.first.conv"} for name in ("0.0", "1.0", "1.1")]
    first = {"stem.conv", "stages.0.0.second.conv"}
    second = {f"stages.1.{name}.conv" for name in ("0.second", "0.shortcut", "1.second")}
    assert set(makers) == set(map(frozenset, (*inside, first, second)))
    assert set(makers[frozenset(second)].readers) == {"stages.1.1.first.conv", "head"}
    assert sorted(group.width for group in groups) == [8, 12, 16, 24, 24]


def test_a_depthwise_convolution_goes_with_what_it_reads() -> None:
    groups = channel_groups.find(network(config("inverted")), SHAPE, "head")
    (inside,) = [g for g in groups if "stages.0.0.expand.conv" in g.makers]
    assert set(inside.makers) == {"stages.0.0.expand.conv", "stages.0.0.depthwise.conv"}
    assert inside.readers == ("stages.0.0.project.conv",) and len(inside.norms) == 2


@kinds
def test_a_silent_channel_is_as_good_as_one_that_was_cut(kind: Kind) -> None:
    net, images = network(config(kind)), torch.randn(4, *SHAPE)
    whole = net(images)
    for group in channel_groups.find(net, SHAPE, "head"):
        numbers = [0, 3, group.width - 1]
        with channel_groups.without(net, group, numbers):
            silent = net(images)
        assert torch.equal(net(images), whole)
        smaller = network(config(kind))
        channel_groups.cut(smaller, SHAPE, "head", {group.name: numbers})
        torch.testing.assert_close(smaller(images), silent, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(silent, whole, atol=1e-4)


@kinds
def test_the_config_of_what_is_left_builds_it_again(kind: Kind) -> None:
    net = network(config(kind))
    removed = {
        group.name: list(range(1 + number))
        for number, group in enumerate(channel_groups.find(net, SHAPE, "head"))
    }
    channel_groups.cut(net, SHAPE, "head", removed)
    again = residual.build(residual.config_of(net, config(kind)))
    again.load_state_dict(net.state_dict())
    images = torch.randn(2, *SHAPE)
    assert torch.equal(again.eval()(images), net(images))


@kinds
def test_a_knob_is_the_width_of_its_group(kind: Kind) -> None:
    body = config(kind)
    net = network(body)
    for group in channel_groups.find(net, SHAPE, "head"):
        for maker in group.makers:
            turned = residual.turned(body, residual.knob(maker), group.width - 2)
            smaller = network(body)
            channel_groups.cut(smaller, SHAPE, "head", {group.name: [0, 1]})
            assert residual.config_of(smaller, body) == turned


# Which matter


@pytest.mark.parametrize("criterion", ["l1", "taylor", "bn", "activation"])
def test_channels_that_do_nothing_matter_least(criterion: Any) -> None:
    net = network(config())
    groups = channel_groups.find(net, SHAPE, "head")
    with torch.no_grad():
        for group in groups:
            for name in group.norms:
                norm = net.get_submodule(name)
                norm.weight[5] = norm.bias[5] = 0.0
            for name in group.makers:
                net.get_submodule(name).weight[5] = 0.0
    found = channel_groups.scores(criterion, net, groups, losses())
    for group in groups:
        scores = found[group.name]
        assert scores.shape == (group.width,) and float(scores.min()) == float(scores[5])
        # Others may be dead by chance: their ReLU lets nothing through.
        assert float(scores[5]) == 0.0 and int((scores > 0).sum()) > 0.8 * group.width


def test_taylor_tells_what_the_loss_would_lose() -> None:
    net = network(config())
    groups = channel_groups.find(net, SHAPE, "head")
    (stream,) = [group for group in groups if "stem.conv" in group.makers]
    loss = losses(1)
    found = channel_groups.scores("taylor", net, groups, loss)[stream.name].sqrt()
    change = []
    for channel in range(stream.width):
        with channel_groups.without(net, stream, [channel]), torch.no_grad():
            change.append(float(loss[0](net)))
    real = (torch.tensor(change) - float(loss[0](net).detach())).abs()
    assert float(torch.corrcoef(torch.stack([found, real]))[0, 1]) > 0.7


def test_the_scan_leaves_the_network_as_it_was_and_goes_through_a_file(tmp_path: Path) -> None:
    net, images = network(config()), torch.randn(4, *SHAPE)
    groups = channel_groups.find(net, SHAPE, "head")
    before = net(images)
    scores = channel_groups.scores("l1", net, groups, losses())
    rows = sensitivity_scan.scan(
        net, groups, scores, lambda each: {"loss": float(losses(1)[0](each)), "accuracy": 0.5}
    )
    assert torch.equal(net(images), before)
    assert [(r.width, r.removed) for r in rows[:4]] == [
        (groups[0].width, groups[0].width * quarter // 4) for quarter in range(4)
    ]
    whole = {row.loss for row in rows if row.removed == 0}
    assert len(whole) == 1 and all(row.loss not in whole for row in rows if row.removed)
    sensitivity_scan.write(tmp_path / "scan.csv", rows)
    assert sensitivity_scan.read(tmp_path / "scan.csv") == rows


# What it takes, and what goes for it


@kinds
@pytest.mark.parametrize("shape", [SHAPE, (3, 28, 21)])
def test_the_convolutions_of_a_config_are_those_of_its_network(
    kind: Kind, shape: tuple[int, int, int]
) -> None:
    body = residual.config(shape, 3, kind=kind, widths=(8, 12), blocks=(1, 2), expand=2)
    seen: list[Convolution] = []

    def see(module: Any, given: Any, made: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear):
            seen.append(Convolution(module.in_features, module.out_features, 1, 1, 1, 1, 1))
            return
        sizes = (module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0])
        seen.append(Convolution(*sizes, module.groups, *made.shape[2:]))

    net = residual.build(body)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(see)
    net.eval()(torch.zeros(1, *shape))
    told = list(residual.convolutions(body, shape))
    assert sorted(map(str, told)) == sorted(map(str, seen))
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert sum(each.cost.weights - each.outputs for each in told) == weights


def test_wider_convolutions_are_measured_to_take_longer() -> None:
    times = Measured()
    narrow, wide = (Convolution(width, width, 3, 1, 1, 14, 14) for width in (16, 128))
    assert times.ms(wide) > 4 * times.ms(narrow) > 0
    assert times.ms(wide) == times.ms(wide)  # measured once


def test_a_board_with_slower_cores_takes_longer() -> None:
    wide = Convolution(128, 128, 3, 1, 1, 14, 14)
    new, old = (Predicted(load_profile(name)).ms(wide) for name in ("rpi5", "rpi3b-plus"))
    assert old > 2 * new > 0


class Products:
    """A millisecond for every million multiplications."""

    def ms(self, convolution: Convolution) -> float:
        return convolution.cost.flops / 2e6


def _chosen(
    target: float,
    scores: dict[str, torch.Tensor] | None = None,
    least: dict[str, int] | None = None,
) -> Any:
    net = network(config())
    groups = channel_groups.find(net, SHAPE, "head")
    scores = scores or {group.name: torch.arange(group.width) + 1.0 for group in groups}
    now = total_ms(Products(), residual.convolutions(config(), SHAPE))
    found = channel_choice.choose(
        config(), SHAPE, groups, scores, Products(), target_ms=target * now, chunk=4, least=least
    )
    channel_groups.cut(net, SHAPE, "head", found.removed)
    after = residual.config_of(net, config())
    return found, now, total_ms(Products(), residual.convolutions(after, SHAPE)), groups, after


@pytest.mark.parametrize("target", [0.8, 0.4, 0.2])
def test_what_is_chosen_reaches_the_latency(target: float, tmp_path: Path) -> None:
    found, before, after, _, body = _chosen(target)
    assert after <= target * before and after == pytest.approx(found.ms)
    for numbers in found.removed.values():  # the least scores, which are the first
        assert numbers == list(range(len(numbers)))
    for stage in body["stages"]:
        assert all(width % 4 == 0 for width in (stage["width"], *stage["inner"]))
    found.write(tmp_path / "choice.json")
    assert channel_choice.read(tmp_path / "choice.json") == found


def test_groups_that_matter_keep_their_channels() -> None:
    groups = channel_groups.find(network(config()), SHAPE, "head")
    dear = groups[0].name
    scores = {g.name: torch.full((g.width,), 1e3 if g.name == dear else 1.0) for g in groups}
    found, *_ = _chosen(0.5, scores)
    assert dear not in found.removed and found.removed


def test_no_group_falls_below_what_it_shall_keep() -> None:
    least = {g.name: g.width // 2 for g in channel_groups.find(network(config()), SHAPE, "head")}
    found, _, _, groups, _ = _chosen(0.4, least=least)
    left = {g.name: g.width - len(found.removed.get(g.name, [])) for g in groups}
    assert all(left[name] >= fewest for name, fewest in least.items())
    with pytest.raises(RecipeError, match="fewest channels left everywhere"):
        _chosen(0.2, least=least)


def test_a_latency_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(RecipeError, match="fewest channels left everywhere"):
        _chosen(0.001)


# Zeros


def test_two_of_every_four_stay_and_they_are_the_largest() -> None:
    net = network(config())
    masks = sparsity.n_of_m(net, 2, 4)
    assert "stem.conv.weight" not in masks  # one input
    kernel = net.get_parameter("stages.1.1.first.conv.weight").detach()
    mask = masks["stages.1.1.first.conv.weight"]
    for place in range(0, kernel.shape[1], 4):
        part, kept = kernel[:, place : place + 4].abs(), mask[:, place : place + 4]
        assert bool((kept.sum(1) == 2).all())
        lowest_kept = part.masked_fill(kept == 0, 9).amin(1)
        assert bool((lowest_kept >= part.masked_fill(kept == 1, 0).amax(1)).all())
    assert 0.4 < sparsity.zeros(masks, net) <= 0.5


def test_unstructured_zeros_are_the_smallest_of_all_layers() -> None:
    net = network(config())
    masks = sparsity.unstructured(net, 0.8)
    assert sparsity.zeros(masks, net) == pytest.approx(0.8, abs=0.01)
    kept = torch.cat([net.get_parameter(n).detach()[m == 1].abs() for n, m in masks.items()])
    gone = torch.cat([net.get_parameter(n).detach()[m == 0].abs() for n, m in masks.items()])
    assert float(kept.min()) >= float(gone.max())
    assert all(bool(mask.any()) for mask in sparsity.unstructured(net, 0.99999).values())


def test_zeros_stay_zero_while_the_rest_learns() -> None:
    net = network(config())
    masks = sparsity.n_of_m(net, 2, 4)
    masked = sparsity.Masked(net, masks).train()
    optimizer = torch.optim.AdamW(masked.parameters(), lr=1e-2)
    for loss in losses():
        optimizer.zero_grad()
        loss(masked).backward()
        optimizer.step()
    state = sparsity.applied(masked.state_dict(), masks)
    assert set(state) == set(residual.build(config()).state_dict())
    assert all(bool((state[name][mask == 0] == 0).all()) for name, mask in masks.items())
    plain = residual.build(config())
    plain.load_state_dict(state)
    images = torch.randn(2, *SHAPE)
    torch.testing.assert_close(plain.eval()(images), masked.eval()(images))


# How sure


def test_the_bootstrap_of_pairs_is_near_what_theory_says() -> None:
    torch.manual_seed(0)
    a = (torch.rand(4000) < 0.9).double().tolist()
    b = [1 - value if number % 50 == 0 else value for number, value in enumerate(a)]
    gains = torch.tensor(a) - torch.tensor(b)
    half = 1.96 * float(gains.std()) / 4000**0.5
    found = bootstrap.paired(a, b)
    assert found.value == pytest.approx(float(gains.mean()))
    assert found.high - found.value == pytest.approx(half, rel=0.15)
    assert found.value - found.low == pytest.approx(half, rel=0.15)
    assert bootstrap.paired(a, b) == found
    same = bootstrap.paired(a, a)
    assert (same.low, same.high) == (0.0, 0.0)
    with pytest.raises(UsageError):
        bootstrap.paired([1.0], [])


def test_the_bootstrap_of_a_ratio_knows_that_both_sides_are_of_the_same_samples() -> None:
    torch.manual_seed(0)
    whole = torch.rand(4000).double() + 0.5
    half = bootstrap.ratio((whole / 2).tolist(), whole.tolist())
    assert (half.low, half.value, half.high) == pytest.approx((0.5, 0.5, 0.5))
    noisy = whole / 2 + 0.3 * torch.randn(4000)
    found = bootstrap.ratio(noisy.tolist(), whole.tolist())
    # The delta method: the deviation of a - ratio * b, over the mean of b.
    error = 1.96 * float((noisy - found.value * whole).std()) / 4000**0.5 / float(whole.mean())
    assert found.value == pytest.approx(0.5, abs=0.01)
    assert found.high - found.low == pytest.approx(2 * error, rel=0.15)
    with pytest.raises(UsageError):
        bootstrap.ratio([1.0], [])
