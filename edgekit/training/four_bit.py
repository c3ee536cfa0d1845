"""Frozen linear layers whose weights take four bits: what QLoRA trains its adapters on.

Knows matrices and their codes; never a model, nor what is trained beside them.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3. A block of 64
weights is divided by its largest magnitude and rounded to the nearest of 16 levels (4-bit
NormalFloat); the magnitudes less their mean take 8 bits, with a step for 256 (double quantization,
there in floats of 8 bits, here in whole numbers).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BLOCK, _SCALES = 64, 256


def levels() -> torch.Tensor:
    """The 16 levels of NF4, float32 from -1 to 1: quantiles of a normal distribution, eight above
    zero, zero, and seven below (section 3, equation 4; the offset is that of the authors' code,
    https://github.com/bitsandbytes-foundation/bitsandbytes, ``create_normal_map``).
    """
    offset = 1 - (1 / 32 + 1 / 30) / 2

    def half(count: int) -> torch.Tensor:
        shares = torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)
        return torch.special.ndtri(shares)[:-1]

    found = torch.cat([half(8), torch.zeros(1, dtype=torch.float64), -half(7)]).sort().values
    return (found / found[-1]).float()


class FourBit(nn.Linear):
    """A linear layer with the weights of ``linear``, rounded, and its bias: nothing to train. It
    costs 4.127 bits a weight: a code, and for 64 of them one scale of 8 bits (and 32 for 256).
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # Not part of the state: a checkpoint keeps what is trained.
        for name, each in zip(("codes", "scales", "steps", "mean"), _packed(linear), strict=True):
            self.register_buffer(name, each, persistent=False)
        table = levels()
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)
        self.register_buffer("table", pairs, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """float32 [out, in], made anew at each call."""
        steps = self.steps.repeat_interleave(_SCALES)[: len(self.scales)]
        scales = self.scales.float() * steps + self.mean
        values = F.embedding(self.codes.int(), self.table).view(len(scales), BLOCK)
        values = (values * scales[:, None]).view(-1)
        return values[: self.out_features * self.in_features].view(self.out_features, -1)

    @property
    def size_bytes(self) -> int:
        """Of codes and scales."""
        held = (self.codes, self.scales, self.steps, self.mean)
        return sum(each.numel() * each.element_size() for each in held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Product.apply(x, self)
        return found


class _Product(torch.autograd.Function):
    """x W^T + b that keeps codes for the backward pass, and not the matrix made of them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FourBit) -> torch.Tensor:
        ctx.layer, ctx.kind = layer, x.dtype
        return F.linear(x, layer.weight.to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (gradient @ ctx.layer.weight.to(gradient.dtype)).to(ctx.kind), None


@torch.no_grad()
def _packed(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (uint8, two a byte), scales (int8), their steps (float32) and their mean (float32)."""
    flat = linear.weight.detach().float().reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    mean = largest.mean()
    rest = F.pad(largest - mean, (0, -len(largest) % _SCALES)).view(-1, _SCALES)
    steps = rest.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    scales = (rest / steps[:, None]).round().to(torch.int8).view(-1)[: len(largest)]
    table = levels()
    halfway = (table[1:] + table[:-1]) / 2
    # By the exact magnitude: so no value lies outside of -1 to 1.
    normal = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(normal, halfway).to(torch.uint8).view(-1, 2)
    return codes[:, 0] * 16 + codes[:, 1], scales, steps, mean


def quantize_linears(model: nn.Module, keep: set[str]) -> int:
    """Make every linear layer of ``model`` a FourBit but those whose last name is in ``keep``; the
    bytes that they take now are returned.
    """
    taken = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name not in keep:
                layer = FourBit(child)
                setattr(parent, name, layer)
                taken += layer.size_bytes
    return taken
