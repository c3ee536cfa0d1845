"""A trained vision transformer whose steps and offsets go into the weights around them.

Between two products only ``round`` and ``clip`` are left of most grids, and weights stay on theirs:
a factor for a whole row, or for a whole matrix, moves its step alone. Knows the network's algebra;
never how any step was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgekit.training import vit
from edgekit.training.learned_steps import Levels, Rounded
from edgekit.training.vit import QuantLinear, VisionTransformer


@torch.no_grad()
def folded(
    config: Mapping[str, Any], network: VisionTransformer
) -> tuple[dict[str, Any], VisionTransformer]:
    """The config and the network that answer as ``network`` of ``config`` does, in fewer steps.

    A value x on a grid is ``step q + offset``. What takes it folds that in, (W step) q + (W offset
    + bias); what gives it divides, and only q is passed on.
    """
    made = {**config, "weight_bits": 0, "folded": True}
    found = vit.build(made).eval()
    _take_over(found, network)
    if isinstance(network.of_pixels, Levels):
        _own(found.of_pixels, 1 / network.of_pixels.step, network.of_pixels)
        _takes(found.embed, network.of_pixels)
    for old, new in zip(network.blocks, found.blocks, strict=True):
        _gives(new.norm1, old.attention.entering)
        _attention(old.attention, new.attention)
        _gives(new.norm2, old.entering)
        _takes(new.widen, old.entering)
        _own(new.of_gelu, 1 / old.of_gelu.step, old.of_gelu)
        _takes(new.narrow, old.of_gelu)
    if isinstance(network.of_mean, Levels):
        _gives(found.norm, network.of_mean)  # the mean of what is divided is divided
        _takes(found.head, network.of_mean)
    return made, found


def _attention(old: Any, new: Any) -> None:
    for name in ("query", "key", "value"):
        layer = getattr(new, name)
        _takes(layer, old.entering)
        _gives(layer, getattr(old, f"of_{name}"))
    new.steps.copy_(old.size**-0.5 * old.of_query.step * old.of_key.step)
    _own(new.of_softmax, 1 / old.of_softmax.step, old.of_softmax)
    mixed = old.of_softmax.step * old.of_value.step
    _own(new.leaving, mixed / old.leaving.step, old.leaving)
    _takes(new.out, old.leaving)


def _take_over(found: VisionTransformer, network: VisionTransformer) -> None:
    """All weights, each on its grid."""
    state = {name: each.clone() for name, each in network.state_dict().items()}
    for name, layer in network.named_modules():
        if isinstance(layer, QuantLinear) and layer.steps:
            state[f"{name}.weight"] = layer.steps(layer.weight)
    found.load_state_dict(state, strict=False)


def _takes(layer: QuantLinear, given: Levels) -> None:
    """``layer`` is given the numbers of levels instead of values."""
    layer.bias += layer.weight.sum(1) * given.start
    layer.weight *= given.step


def _gives(layer: nn.Linear | nn.LayerNorm, to: Levels) -> None:
    """``layer`` gives values in steps, counted from the offset."""
    layer.bias.copy_((layer.bias - to.start) / to.step)
    by = to.step if isinstance(layer, nn.LayerNorm) else to.step.unsqueeze(1)
    layer.weight /= by


def _own(rounds: Rounded, gain: torch.Tensor, levels: Levels) -> None:
    """What comes before ``rounds`` cannot take the step in: it multiplies by itself."""
    assert rounds.gain is not None
    rounds.gain.copy_(gain)
    if rounds.shift is not None:
        rounds.shift.copy_(-levels.start / levels.step)
