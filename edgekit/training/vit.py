"""A small vision transformer whose products may be of a few bits: what is quantized, and how.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1, with the mean of all tokens
before the head instead of a class token. Knows the network and its ranges; never data, a loss or a
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.training.learned_steps import Levels, Range, Rounded, RowSteps


class QuantLinear(nn.Linear):
    """A dense layer; with ``bits`` its weight is on a grid with a step for each output."""

    def __init__(self, inputs: int, outputs: int, bits: int = 0) -> None:
        super().__init__(inputs, outputs)
        self.steps = RowSteps(bits, outputs) if bits else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.steps(self.weight) if self.steps else self.weight, self.bias)


@dataclass(frozen=True)
class Bits:
    """Of weights and of activations; 0 is float. ``folded``: the network is trained, and steps are
    part of its weights (``folded_vit``).
    """

    weights: int
    activations: int
    folded: bool

    def levels(self, kind: Range, *owns: str) -> nn.Module:
        """What rounds an activation, or nothing; ``owns`` as in Rounded."""
        if not self.activations:
            return nn.Identity()
        if self.folded:
            return Rounded(self.activations, kind, *owns)
        return Levels(self.activations, kind)


class Attention(nn.Module):
    """softmax(q k' / sqrt(d)) v of each head (Vaswani et al. 2017, section 3.2.1).

    All four operands of its two products are quantized: query, key and value have a sign; what
    softmax gives lies between 0 and 1, mostly near 0, and needs none. What comes out of a layer
    norm, and out of the heads, is rarely centred: its range has an offset that is learned.
    """

    def __init__(self, width: int, heads: int, bits: Bits) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.entering = bits.levels("offset")
        self.query = QuantLinear(width, width, bits.weights)
        self.key = QuantLinear(width, width, bits.weights)
        self.value = QuantLinear(width, width, bits.weights)
        self.of_query, self.of_key = bits.levels("signed"), bits.levels("signed")
        self.of_value = bits.levels("signed")
        self.of_softmax = bits.levels("unsigned", "gain")
        self.leaving = bits.levels("offset", "gain", "shift")
        self.out = QuantLinear(width, width, bits.weights)
        self.register_buffer("steps", torch.ones(1) if bits.folded else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.entering(x)
        query = self.of_query(self._split(self.query(x)))
        key = self.of_key(self._split(self.key(x)))
        value = self.of_value(self._split(self.value(x)))
        scale = self.size**-0.5 if self.steps is None else self.steps
        scores = query @ key.transpose(2, 3) * scale
        mixed = self.of_softmax(scores.softmax(dim=-1)) @ value
        batch, _, tokens, _ = mixed.shape
        joined = mixed.transpose(1, 2).reshape(batch, tokens, self.heads * self.size)
        found: torch.Tensor = self.out(self.leaving(joined))
        return found

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.size).transpose(1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). GELU gives no less than -0.17: an offset of
    its range keeps the levels where the values are (LSQ+: a learned offset). The sums stay float.
    """

    def __init__(self, width: int, heads: int, hidden: int, bits: Bits) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, bits)
        self.norm2 = nn.LayerNorm(width)
        self.entering = bits.levels("offset")
        self.widen = QuantLinear(width, hidden, bits.weights)
        self.of_gelu = bits.levels("offset", "gain", "shift")
        self.narrow = QuantLinear(hidden, width, bits.weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        hidden = self.of_gelu(F.gelu(self.widen(self.entering(self.norm2(x)))))
        narrowed: torch.Tensor = self.narrow(hidden)
        return x + narrowed


class VisionTransformer(nn.Module):
    """float32 [batch, channels, height, width] -> logits [batch, classes].

    ``weight_bits`` and ``activation_bits`` are those of the blocks, 0 for float; with ``ends`` the
    patch embedding and the head have as many. ``folded`` is as in Bits.
    """

    def __init__(
        self,
        shape: list[int],
        classes: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        weight_bits: int = 0,
        activation_bits: int = 0,
        ends: bool = False,
        folded: bool = False,
    ) -> None:
        super().__init__()
        channels, height, rows = shape
        self.patch = patch
        tokens = (height // patch) * (rows // patch)
        bits = Bits(weight_bits, activation_bits, folded)
        outer = bits if ends else Bits(0, 0, folded)
        self.of_pixels = outer.levels("offset", "gain", "shift")
        self.embed = QuantLinear(channels * patch * patch, width, outer.weights)
        self.places = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList([Block(width, heads, hidden, bits) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.of_mean = outer.levels("offset")
        self.head = QuantLinear(width, classes, outer.weights)
        nn.init.trunc_normal_(self.places, std=0.02)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        patches = F.pixel_unshuffle(image, self.patch).flatten(2).transpose(1, 2)
        x = self.embed(self.of_pixels(patches)) + self.places
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.of_mean(self.norm(x).mean(dim=1)))
        return logits


def build(config: Mapping[str, Any]) -> VisionTransformer:
    """The network of a config: the arguments of VisionTransformer by name."""
    return VisionTransformer(**config)
