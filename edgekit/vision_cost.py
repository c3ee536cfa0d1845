"""What one image costs in a vision model: arithmetic, activations, weights; from its config.json.

Knows the layers of a few families; never a weight, a machine or an engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.formats.foreign import shown
from edgekit.registry import did_you_mean

_MAX = 1 << 20
_MAX_LAYERS = 4096


@dataclass(frozen=True)
class VisionCost:
    """``flops`` counts a multiplication and an addition as two. ``activations`` are the values that
    layers leave for the next, ``peak`` the most of them that live at one time.
    """

    flops: float
    activations: float
    weights: float
    peak: float
    operators: int


class _Trace:
    """Walks through a network, layer by layer, and counts."""

    def __init__(self, side: int, channels: int) -> None:
        self.side, self.channels = side, channels
        self.macs = self.activations = self.weights = self.peak = 0.0
        self.operators = 0

    def conv(self, out: int, kernel: int, stride: int = 1, *, groups: int = 1) -> None:
        """A convolution that pads to keep the size, but for its stride."""
        before = self.side**2 * self.channels
        self.side = -(-self.side // stride)
        weights = kernel**2 * self.channels // groups * out
        self._count(weights * self.side**2, self.side**2 * out, weights + out, before)
        self.channels = out

    def linear(self, rows: int, inputs: int, out: int) -> None:
        """A matrix product for ``rows`` vectors."""
        self._count(rows * inputs * out, rows * out, inputs * out + out, rows * inputs)

    def product(self, macs: float, out: float) -> None:
        """A product of activations with activations."""
        self._count(macs, out, 0, out)

    def _count(self, macs: float, out: float, weights: float, before: float) -> None:
        self.macs += macs
        self.activations += out
        self.weights += weights
        self.peak = max(self.peak, before + out)
        self.operators += 1
        if self.operators > _MAX_LAYERS:
            raise SourceError(f"config.json: more than {_MAX_LAYERS} layers")

    def cost(self) -> VisionCost:
        """The sums."""
        return VisionCost(2 * self.macs, self.activations, self.weights, self.peak, self.operators)


class _Config:
    """A config.json, of which every size that is read is a sane number."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def size(self, name: str, default: int) -> int:
        value = self._body.get(name, default)
        if isinstance(value, list) and len(set(map(str, value))) == 1:  # height and width
            value = value[0]
        if type(value) is not int or not 0 < value < _MAX:
            raise SourceError(
                f"config.json: '{name}' must be a positive integer, not {value!r:.40}"
            )
        return value

    def factor(self, name: str, default: float) -> float:
        value = self._body.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 100:
            raise SourceError(f"config.json: '{name}' must be a small number, not {value!r:.40}")
        return float(value)

    def sizes(self, name: str, default: list[int]) -> list[int]:
        value = self._body.get(name, default)
        if (
            not isinstance(value, list)
            or len(value) > 64
            or not all(type(each) is int and 0 < each < _MAX for each in value)
        ):
            raise SourceError(f"config.json: '{name}' must be a short list of positive integers")
        return value

    @property
    def labels(self) -> int:
        """Classes that the head tells apart."""
        names = self._body.get("id2label")
        return len(names) if isinstance(names, dict) and names else 1000

    def text(self, name: str, default: str) -> str:
        return str(self._body.get(name, default))


def cost(config: Mapping[str, Any]) -> VisionCost | None:
    """The cost of one image; None for a ``model_type`` that is no vision family known here.

    Raises SourceError for sizes that are missing or absurd.
    """
    count = _FAMILIES.get(str(config.get("model_type")))
    return count(_Config(config)) if count else None


def required(config: Mapping[str, Any]) -> VisionCost:
    """``cost``, or UnsupportedModelError that names the families."""
    found = cost(config)
    if found is None:
        name = shown(str(config.get("model_type")))
        raise UnsupportedModelError(
            f"'{name}' is no vision family that is known", hint=did_you_mean(name, list(_FAMILIES))
        )
    return found


def _vit(config: _Config) -> VisionCost:
    """https://arxiv.org/abs/2010.11929; a distilled DeiT has one token more."""
    side, patch = config.size("image_size", 224), config.size("patch_size", 16)
    width, inner = config.size("hidden_size", 768), config.size("intermediate_size", 3072)
    heads = config.size("num_attention_heads", 12)
    net = _Trace(side, config.size("num_channels", 3))
    net.conv(width, patch, patch)
    tokens = net.side**2 + (2 if config.text("model_type", "") == "deit" else 1)
    for _ in range(config.size("num_hidden_layers", 12)):
        net.linear(tokens, width, 3 * width)
        net.product(tokens**2 * width, heads * tokens**2)
        net.product(tokens**2 * width, tokens * width)
        net.linear(tokens, width, width)
        net.linear(tokens, width, inner)
        net.linear(tokens, inner, width)
    net.linear(1, width, config.labels)
    return net.cost()


def _resnet(config: _Config) -> VisionCost:
    """https://arxiv.org/abs/1512.03385, with the stride in the 3 x 3 convolution."""
    net = _Trace(config.size("image_size", 224), config.size("num_channels", 3))
    net.conv(config.size("embedding_size", 64), 7, 2)
    net.side = -(-net.side // 2)  # max pooling
    bottleneck = config.text("layer_type", "bottleneck") == "bottleneck"
    widths = config.sizes("hidden_sizes", [256, 512, 1024, 2048])
    for stage, (width, depth) in enumerate(
        zip(widths, config.sizes("depths", [3, 4, 6, 3]), strict=False)
    ):
        for block in range(depth):
            _residual(net, width, 2 if stage and not block else 1, bottleneck)
    net.linear(1, net.channels, config.labels)
    return net.cost()


def _residual(net: _Trace, width: int, stride: int, bottleneck: bool) -> None:
    side, channels = net.side, net.channels
    if bottleneck:
        net.conv(max(1, width // 4), 1)
        net.conv(max(1, width // 4), 3, stride)
        net.conv(width, 1)
    else:
        net.conv(width, 3, stride)
        net.conv(width, 3)
    if channels != width or stride > 1:
        net.side, net.channels = side, channels
        net.conv(width, 1, stride)


def _rounded(channels: float, divisor: int) -> int:
    """To the nearest multiple, but never down by more than a tenth."""
    near = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return near + divisor if near < 0.9 * channels else near


def _inverted(net: _Trace, out: int, kernel: int, stride: int, expand: int) -> None:
    """https://arxiv.org/abs/1801.04381, figure 4."""
    if expand > 1:
        net.conv(net.channels * expand, 1)
    net.conv(net.channels, kernel, stride, groups=net.channels)
    net.conv(out, 1)


# Expansion, channels, repeats, stride: table 2 of https://arxiv.org/abs/1801.04381.
_MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _mobilenet_v2(config: _Config) -> VisionCost:
    scale = config.factor("depth_multiplier", 1.0)
    net = _Trace(config.size("image_size", 224), config.size("num_channels", 3))
    net.conv(_rounded(32 * scale, 8), 3, 2)
    for expand, channels, repeats, stride in _MOBILENET_V2:
        for block in range(repeats):
            _inverted(net, _rounded(channels * scale, 8), 3, stride if not block else 1, expand)
    net.conv(_rounded(1280 * max(1.0, scale), 8), 1)
    net.linear(1, net.channels, config.labels)
    return net.cost()


# Channels and stride: table 1 of https://arxiv.org/abs/1704.04861.
_MOBILENET_V1 = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


def _mobilenet_v1(config: _Config) -> VisionCost:
    scale = config.factor("depth_multiplier", 1.0)
    net = _Trace(config.size("image_size", 224), config.size("num_channels", 3))
    net.conv(_rounded(32 * scale, 8), 3, 2)
    for channels, stride in _MOBILENET_V1:
        net.conv(net.channels, 3, stride, groups=net.channels)
        net.conv(_rounded(channels * scale, 8), 1)
    net.linear(1, net.channels, config.labels)
    return net.cost()


def _efficientnet(config: _Config) -> VisionCost:
    """https://arxiv.org/abs/1905.11946; squeeze-and-excitation counts its two small layers."""
    wide = config.factor("width_coefficient", 2.0)
    deep = config.factor("depth_coefficient", 3.1)
    divisor = config.size("depth_divisor", 8)
    net = _Trace(config.size("image_size", 600), config.size("num_channels", 3))
    net.conv(_rounded(32 * wide, divisor), 3, 2)
    stages = zip(
        config.sizes("out_channels", [16, 24, 40, 80, 112, 192, 320]),
        config.sizes("kernel_sizes", [3, 3, 5, 3, 5, 5, 3]),
        config.sizes("strides", [1, 2, 2, 2, 1, 2, 1]),
        config.sizes("num_block_repeats", [1, 2, 2, 3, 3, 4, 1]),
        config.sizes("expand_ratios", [1, 6, 6, 6, 6, 6, 6]),
        strict=False,
    )
    for channels, kernel, stride, repeats, expand in stages:
        for block in range(math.ceil(repeats * deep)):
            squeezed = max(1, net.channels // 4)
            inner = net.channels * expand
            _inverted(
                net, _rounded(channels * wide, divisor), kernel, 1 if block else stride, expand
            )
            net.linear(1, inner, squeezed)
            net.linear(1, squeezed, inner)
    net.conv(_rounded(config.size("hidden_dim", 2560), divisor), 1)
    net.linear(1, net.channels, config.labels)
    return net.cost()


_FAMILIES: dict[str, Callable[[_Config], VisionCost]] = {
    "vit": _vit,
    "deit": _vit,
    "resnet": _resnet,
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2": _mobilenet_v2,
    "efficientnet": _efficientnet,
}
