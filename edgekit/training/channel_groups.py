"""Channels that must go together: found by torch-pruning, scored, tried without, and cut out.

Knows convolutions, batch norms and gradients; never a recipe, a clock or a set of data.

A channel of a residual stream is made by several convolutions and read by several more: all of them
lose it, or none (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning
from torch import nn

Criterion = Literal["l1", "taylor", "bn", "activation"]
Scores = dict[str, torch.Tensor]
_MADE, _READ, _NORM = "made", "read", "norm"


@dataclass(frozen=True)
class ChannelGroup:
    """``width`` channels that are made by the convolutions ``makers``, go through the batch norms
    ``norms``, and are read by the layers ``readers``; all are names of modules. ``name`` is that of
    the first maker.
    """

    name: str
    width: int
    makers: tuple[str, ...]
    norms: tuple[str, ...]
    readers: tuple[str, ...]


def find(network: nn.Module, shape: tuple[int, int, int], last: str) -> tuple[ChannelGroup, ...]:
    """The groups of a network for images of ``shape``, but for the outputs of the layer ``last``.

    Every group must keep its channels' order from layer to layer: no flattening, no shuffle.
    """
    names = {module: name for name, module in network.named_modules()}
    return tuple(_described(group, names) for group in _groups(network, shape, last).values())


def _groups(network: nn.Module, shape: tuple[int, int, int], last: str) -> dict[str, Any]:
    """torch-pruning's own, by the name of the module that they start from."""
    mode = network.training
    names = {module: name for name, module in network.named_modules()}
    graph = torch_pruning.DependencyGraph()
    graph.build_dependency(network.eval(), (torch.zeros(1, *shape),), verbose=False)
    network.train(mode)
    found = graph.get_all_groups([network.get_submodule(last)], [nn.Conv2d, nn.Linear])
    return {names[group[0].dep.target.module]: group for group in found}


def _described(group: Any, names: Mapping[nn.Module, str]) -> ChannelGroup:
    members: dict[str, list[str]] = {_MADE: [], _READ: [], _NORM: []}
    for item in group:
        module = item.dep.target.module
        if module not in names:
            continue  # an addition, an activation: nothing to cut
        if isinstance(module, nn.BatchNorm2d):
            role = _NORM
        else:
            reads = "in_channels" in item.dep.handler.__name__
            role = _READ if reads else _MADE
        members[role].append(names[module])
    made, norms, read = (tuple(dict.fromkeys(members[role])) for role in (_MADE, _NORM, _READ))
    return ChannelGroup(made[0], len(group[0].idxs), made, norms, read)


def cut(
    network: nn.Module,
    shape: tuple[int, int, int],
    last: str,
    removed: Mapping[str, Sequence[int]],
) -> None:
    """Take channels out of ``network``: group name -> their numbers. In place."""
    groups = _groups(network, shape, last)
    for name, numbers in removed.items():
        if numbers:
            groups[name].prune(sorted(numbers))


@contextmanager
def without(network: nn.Module, group: ChannelGroup, numbers: Sequence[int]) -> Iterator[None]:
    """Inside the block the channels are silent, which is as if they had been cut: what leaves a
    batch norm whose scale and shift are 0 is 0.
    """
    chosen = torch.as_tensor(list(numbers), dtype=torch.long)
    norms = [network.get_submodule(name) for name in group.norms]
    held = [(norm.weight.detach().clone(), norm.bias.detach().clone()) for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.weight[chosen] = 0.0
            norm.bias[chosen] = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, (weight, bias) in zip(norms, held, strict=True):
                norm.weight.copy_(weight)
                norm.bias.copy_(bias)


def scores(
    criterion: Criterion,
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    losses: Sequence[Callable[[nn.Module], torch.Tensor]],
) -> Scores:
    """How much each channel matters: group name -> float32 [width], larger matters more.

    ``losses`` each give the mean loss of one batch. "taylor" is what the loss would change by, and
    compares across groups as it is; the others are divided by their group's mean.

    - l1: the sum of its weights' absolute values, over all that make it (Li et al. 2017, "Pruning
      Filters for Efficient ConvNets", section 3.1);
    - bn: the absolute scale of its batch norms (Liu et al. 2017, "Learning Efficient Convolutional
      Networks through Network Slimming", section 3);
    - activation: the mean absolute value that leaves its batch norms (Molchanov et al. 2017,
      "Pruning Convolutional Neural Networks for Resource Efficient Inference", section 2.2);
    - taylor: the square of gradient times value, summed over scale and shift of its batch norms
      (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", section 3: the
      squared gradient of a gate behind the batch norm), in the mean over the batches.
    """
    network.eval()
    if criterion == "taylor":
        return _taylor(network, groups, losses)
    if criterion == "activation":
        found = _activation(network, groups, losses)
    else:
        found = {group.name: _of_weights(criterion, network, group) for group in groups}
    return {name: each / each.mean().clamp(min=1e-12) for name, each in found.items()}


@torch.no_grad()
def _of_weights(criterion: Criterion, network: nn.Module, group: ChannelGroup) -> torch.Tensor:
    if criterion == "bn":
        parts = [network.get_submodule(name).weight.abs() for name in group.norms]
    else:
        parts = [network.get_submodule(n).weight.abs().flatten(1).sum(1) for n in group.makers]
    return torch.stack(parts).sum(0).float().cpu()


def _taylor(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    losses: Sequence[Callable[[nn.Module], torch.Tensor]],
) -> Scores:
    found = {group.name: torch.zeros(group.width) for group in groups}
    for loss in losses:
        network.zero_grad(set_to_none=True)
        loss(network).backward()
        for group in groups:
            norms = [network.get_submodule(name) for name in group.norms]
            change = torch.stack(
                [each.grad * each.detach() for norm in norms for each in (norm.weight, norm.bias)]
            )
            found[group.name] += change.sum(0).square().float().cpu() / len(losses)
    network.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def _activation(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    losses: Sequence[Callable[[nn.Module], torch.Tensor]],
) -> Scores:
    found = {group.name: torch.zeros(group.width) for group in groups}
    hooks = []
    for group in groups:

        def add(module: Any, given: Any, made: torch.Tensor, name: str = group.name) -> None:
            found[name] += made.abs().mean(dim=(0, 2, 3)).float().cpu()

        hooks += [network.get_submodule(norm).register_forward_hook(add) for norm in group.norms]
    try:
        for loss in losses:
            loss(network)
    finally:
        for hook in hooks:
            hook.remove()
    return found
