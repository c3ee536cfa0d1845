"""Ranges of a trained network's values without training: what quantization-aware training starts
from, and the rivals that it has to beat.

Knows a network's Levels and dense layers; never labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgekit.training import learned_steps, vit
from edgekit.training.learned_steps import Levels, RowSteps
from edgekit.training.vit import QuantLinear, VisionTransformer

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Method:
    """How the range of an activation and the steps of a weight are found, and whether the means of
    the outputs are corrected then.
    """

    name: str
    of_values: Callable[[torch.Tensor, Levels], tuple[torch.Tensor, torch.Tensor]]
    of_rows: Callable[[torch.Tensor, RowSteps], torch.Tensor]
    corrects: bool = False


MIN_MAX = Method("min-max", learned_steps.whole_range, learned_steps.row_whole)
LEAST_ERROR = Method("least error", learned_steps.least_error, learned_steps.row_least_error)
CORRECTED = Method(
    "least error, means corrected",
    learned_steps.least_error,
    learned_steps.row_least_error,
    corrects=True,
)
METHODS = (MIN_MAX, LEAST_ERROR, CORRECTED)


@torch.no_grad()
def quantized(
    config: Mapping[str, Any], state: State, inputs: torch.Tensor, method: Method
) -> VisionTransformer:
    """The network of ``config`` with the float weights ``state``, every grid fitted to what
    ``inputs`` (float32 [samples, channels, height, width], of no test) do to the float network.
    """
    watching = vit.build({**config, "weight_bits": 0})
    _load(watching, state)
    watched = {n: each for n, each in watching.named_modules() if isinstance(each, Levels)}
    for each in watched.values():
        each.seen = []
    watching.eval()(inputs)
    network = vit.build(config)
    _load(network, state)
    for name, layer in network.named_modules():
        if isinstance(layer, Levels):
            seen = watched[name].seen
            assert seen
            layer.set(*method.of_values(torch.cat(seen), layer))
        if isinstance(layer, QuantLinear) and layer.steps:
            layer.steps.set(method.of_rows(layer.weight, layer.steps))
    network.eval()
    if method.corrects:
        _correct_means(config, state, network, inputs)
    return network


def _load(network: nn.Module, state: State) -> None:
    """All but the grids, which the float network does not have."""
    found = network.load_state_dict(dict(state), strict=False)
    assert not found.unexpected_keys
    assert all(each.endswith(("log_step", "offset")) for each in found.missing_keys)


def _correct_means(
    config: Mapping[str, Any], state: State, network: VisionTransformer, inputs: torch.Tensor
) -> None:
    """The bias of one dense layer after the other moves by what quantization did to the mean of
    its outputs (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", appendix D, where there are inputs to measure it on).
    """
    plain = vit.build({**config, "weight_bits": 0, "activation_bits": 0})
    plain.load_state_dict(dict(state))
    plain.eval()
    names = [n for n, each in network.named_modules() if isinstance(each, QuantLinear)]
    wanted = _mean_outputs(plain, names, inputs)
    for name in names:
        layer = network.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        layer.bias += wanted[name] - _mean_outputs(network, [name], inputs)[name]


def _mean_outputs(
    network: nn.Module, names: list[str], inputs: torch.Tensor
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def noted(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def note(layer: nn.Module, given: Any, output: torch.Tensor) -> None:
            found[name] = output.reshape(-1, output.shape[-1]).mean(0)

        return note

    hooks = [network.get_submodule(n).register_forward_hook(noted(n)) for n in names]
    network(inputs)
    for hook in hooks:
        hook.remove()
    return found
