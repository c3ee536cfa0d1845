"""Single weights set to zero: anywhere, or N of every M beside each other; and kept so in training.

Knows kernels and masks; never a clock: no engine here skips zeros, which reports must say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

Masks = dict[str, torch.Tensor]


def unstructured(network: nn.Module, share: float) -> Masks:
    """Masks (1 keeps) that leave out ``share`` of the weights of all kernels and matrices together,
    the smallest (Han et al. 2015, "Learning both Weights and Connections", section 3; one threshold
    for all layers). Of each layer one weight at least stays.
    """
    kernels = _kernels(network)
    sizes = torch.cat([each.abs().flatten() for each in kernels.values()])
    ordered = sizes.sort().values
    threshold = ordered[min(len(ordered) - 1, round(share * len(ordered)))]
    masks = {}
    for name, each in kernels.items():
        limit = torch.minimum(threshold, each.abs().max())
        masks[name] = (each.abs() >= limit).to(each.dtype)
    return masks


def n_of_m(network: nn.Module, n: int, m: int) -> Masks:
    """Masks that keep the ``n`` largest of every ``m`` weights that stand beside each other along
    the input channels (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3).
    Layers whose inputs are no multiple of ``m`` stay whole.
    """
    masks = {}
    for name, each in _kernels(network).items():
        if each.shape[1] % m:
            continue
        # [out, in / m, m, places]
        fours = (
            each.abs().flatten(2).unflatten(1, (-1, m))
            if each.dim() > 2
            else (each.abs().unflatten(1, (-1, m)).unsqueeze(-1))
        )
        best = fours.topk(n, dim=2).indices
        kept = torch.zeros_like(fours).scatter_(2, best, 1.0)
        masks[name] = kept.reshape(each.shape).to(each.dtype)
    return masks


def _kernels(network: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: each.detach()
        for name, each in network.named_parameters()
        if name.endswith("weight") and each.dim() > 1
    }


def zeros(masks: Mapping[str, torch.Tensor], network: nn.Module) -> float:
    """The share of all weights of kernels and matrices that the masks leave out."""
    total = math.fsum(each.numel() for each in _kernels(network).values())
    return math.fsum(float((mask == 0).sum()) for mask in masks.values()) / total


class Masked(nn.Module):
    """A network whose masked weights are zero in every pass, whatever the optimizer makes of them:
    their gradients are zero too.
    """

    def __init__(self, network: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.network = network
        self._names = list(masks)
        for number, mask in enumerate(masks.values()):
            self.register_buffer(f"mask_{number}", mask.clone(), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        weights = dict(self.network.named_parameters())
        masked = {
            name: weights[name] * getattr(self, f"mask_{number}")
            for number, name in enumerate(self._names)
        }
        made: torch.Tensor = torch.func.functional_call(self.network, masked, (image,))
        return made


def applied(
    state: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state of a ``Masked`` as one of its network, with the zeros in it."""
    own = {name.removeprefix("network."): each for name, each in state.items()}
    return own | {name: own[name] * mask for name, mask in masks.items()}
