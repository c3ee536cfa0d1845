"""A small residual network for images, every width of which may be its own: what recipes cut down.

Knows its layers, its config and the shapes of its convolutions; never how it is trained or pruned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import RecipeError
from edgekit.training.convolution_time import Convolution

Kind = Literal["basic", "inverted"]
# A width of a config: that of stage i, or the one inside of block j of stage i.
Knob = tuple[str, int] | tuple[str, int, int]


class ConvNorm(nn.Module):
    """A convolution without bias, padded to keep the size, and its batch norm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.conv(x))
        return found


class Basic(nn.Module):
    """relu(shortcut(x) + second(relu(first(x)))) (He et al. 2016, "Deep Residual Learning for Image
    Recognition", section 3.2, equations 1 and 2; the shortcut is their option B).
    """

    def __init__(self, inputs: int, inner: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, inner, kernel, stride)
        self.second = ConvNorm(inner, width, kernel)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.shortcut(x) + self.second(F.relu(self.first(x))))


class Inverted(nn.Module):
    """Widened, convolved channel by channel, narrowed without an activation; x is added where the
    shapes allow it (Sandler et al. 2018, "MobileNetV2", section 3.3 and figure 3b).
    """

    def __init__(self, inputs: int, inner: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = ConvNorm(inputs, inner, 1)
        self.depthwise = ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = ConvNorm(inner, width, 1)
        self.same = stride == 1 and inputs == width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return x + y if self.same else y


_BLOCKS: dict[str, type[nn.Module]] = {"basic": Basic, "inverted": Inverted}


class Residual(nn.Module):
    """float32 [batch, channels, height, width] -> logits [batch, classes].

    A 3x3 convolution with stride 2, the stages (each but the first halves the sides), the mean over
    all places, a dense layer. ``stages`` are dicts with "kind", "kernel", "width" and "inner", the
    widths inside of its blocks, one each.
    """

    def __init__(self, channels: int, classes: int, stages: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        width = stages[0]["width"]
        self.stem = ConvNorm(channels, width, 3, 2)
        built = []
        for number, stage in enumerate(stages):
            blocks = []
            for at, inner in enumerate(stage["inner"]):
                stride = 2 if number and not at else 1
                block = _BLOCKS[stage["kind"]]
                blocks.append(block(width, inner, stage["width"], stage["kernel"], stride))
                width = stage["width"]
            built.append(nn.ModuleList(blocks))
        self.stages = nn.ModuleList(built)
        self.head = nn.Linear(width, classes)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """What each stage makes: [batch, width, height, width] each, the last one last."""
        x = F.relu(self.stem(image))
        found = []
        for stage in self.stages:
            for block in stage:
                x = block(x)
            found.append(x)
        return found

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The logits of what the last stage made."""
        logits: torch.Tensor = self.head(features.mean(dim=(2, 3)))
        return logits

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(image)[-1])


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of a folder's config (registry.NETWORKS)."""
    return Residual(**config)


def config(
    shape: tuple[int, int, int],
    classes: int,
    *,
    kind: Kind,
    widths: Sequence[int],
    blocks: Sequence[int],
    expand: float = 1.0,
    kernel: int = 3,
) -> dict[str, Any]:
    """A config with blocks that are ``expand`` times as wide inside as their stage.

    ``shape`` is channels, height and width of an image. Raises RecipeError.
    """
    if not widths or len(widths) != len(blocks) or min(*widths, *blocks) < 1:
        raise RecipeError("widths and blocks must be as many, and each at least 1")
    if min(shape[1:]) < 2 ** len(widths):
        raise RecipeError(f"{shape[1:]} pixels cannot be halved {len(widths)} times")
    stages = [
        {
            "kind": kind,
            "kernel": kernel,
            "width": width,
            "inner": [max(1, round(expand * width))] * count,
        }
        for width, count in zip(widths, blocks, strict=True)
    ]
    return {"channels": shape[0], "classes": classes, "stages": stages}


def config_of(network: nn.Module, like: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a network that was ``like`` before channels were taken out of it."""
    found: dict[str, Any] = copy.deepcopy(dict(like))
    for stage, blocks in zip(found["stages"], network.stages, strict=True):
        last = blocks[-1]
        makers = {"basic": ("first", "second"), "inverted": ("expand", "project")}
        inner, out = makers[stage["kind"]]
        stage["inner"] = [getattr(block, inner).conv.out_channels for block in blocks]
        stage["width"] = getattr(last, out).conv.out_channels
    return found


def knob(layer: str) -> Knob:
    """Which width of the config the outputs of a convolution have: ``layer`` is its name in the
    network, such as ``stages.1.0.first.conv``.
    """
    if layer.startswith("stem."):
        return "width", 0
    _, stage, block, name, *_ = layer.split(".")
    if name in ("first", "expand", "depthwise"):
        return "inner", int(stage), int(block)
    return "width", int(stage)


def width(config: Mapping[str, Any], layer: str) -> int:
    """How many outputs the convolution ``layer`` has."""
    which, stage, *block = knob(layer)
    found = config["stages"][stage][which]
    return int(found[block[0]] if block else found)


def turned(config: Mapping[str, Any], knob: Knob, value: int) -> dict[str, Any]:
    """The config with another value of one of its widths."""
    found: dict[str, Any] = copy.deepcopy(dict(config))
    if knob[0] == "width":
        found["stages"][knob[1]]["width"] = value
    else:
        found["stages"][knob[1]]["inner"][knob[-1]] = value
    return found


def convolutions(config: Mapping[str, Any], shape: tuple[int, int, int]) -> Iterator[Convolution]:
    """Every convolution of the network, in order, for images of ``shape``; the dense layer is one
    of 1 x 1 on one place.
    """
    _, height, width = shape
    height, width = -(-height // 2), -(-width // 2)
    inputs = config["stages"][0]["width"]
    yield Convolution(config["channels"], inputs, 3, 2, 1, height, width)
    for number, stage in enumerate(config["stages"]):
        kernel, out = stage["kernel"], stage["width"]
        for at, inner in enumerate(stage["inner"]):
            stride = 2 if number and not at else 1
            before = height, width
            height, width = -(-height // stride), -(-width // stride)
            if stage["kind"] == "basic":
                yield Convolution(inputs, inner, kernel, stride, 1, height, width)
                yield Convolution(inner, out, kernel, 1, 1, height, width)
                if stride > 1 or inputs != out:
                    yield Convolution(inputs, out, 1, stride, 1, height, width)
            else:
                yield Convolution(inputs, inner, 1, 1, 1, *before)
                yield Convolution(inner, inner, kernel, stride, inner, height, width)
                yield Convolution(inner, out, 1, 1, 1, height, width)
            inputs = out
    yield Convolution(inputs, config["classes"], 1, 1, 1, 1, 1)
