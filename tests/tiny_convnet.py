"""One small convolutional net, as a torch module and as a TFLite file made by hand of its weights.

Knows both layouts; never an exporter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tiny_tflite
import torch

SIDE = 12


class Net(torch.nn.Module):
    """Three convolutions, one of them depthwise, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = torch.nn.ModuleList(
            [
                torch.nn.Conv2d(3, 16, 3, padding=1),
                torch.nn.Conv2d(16, 16, 3, padding=1, groups=16),
                torch.nn.Conv2d(16, 32, 1),
            ]
        )
        self.dense = torch.nn.Linear(32, 10)

    def forward(self, pixels: Any) -> Any:
        for conv in self.convs:
            pixels = torch.nn.functional.relu6(conv(pixels))
        return self.dense(pixels.mean(dim=(2, 3)))


def as_tflite(net: Net, spoilt: int | None = None) -> bytes:
    """The same net with channels last and fused activations; one layer's filters reversed."""
    build = tiny_tflite.Builder()
    value = given = build.tensor("pixels", (1, SIDE, SIDE, 3))
    for number, conv in enumerate(net.convs):
        weight = conv.weight.detach().numpy()
        weight = weight[::-1] if number == spoilt else weight
        depthwise = conv.groups > 1
        axes = (1, 2, 3, 0) if depthwise else (0, 2, 3, 1)
        weights = build.constant(f"w{number}", np.ascontiguousarray(weight.transpose(axes)))
        bias = build.constant(f"b{number}", conv.bias.detach().numpy())
        out = build.tensor(f"conv{number}", (1, SIDE, SIDE, conv.out_channels))
        kind = "DepthwiseConv2D" if depthwise else "Conv2D"
        name = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        build.operator(name, [value, weights, bias], [out], f"{kind}Options")
        options = build.graph.operators[-1].builtinOptions
        options.strideW = options.strideH = 1
        options.dilationWFactor = options.dilationHFactor = 1
        options.fusedActivationFunction = 3  # RELU6
        if depthwise:
            options.depthMultiplier = 1
        value = out
    pooled, classes = build.tensor("pooled", (1, 32)), build.tensor("classes", (1, 10))
    axes = build.constant("axes", np.array([1, 2], np.int32))
    build.operator("MEAN", [value, axes], [pooled], "ReducerOptions")
    weight = net.dense.weight.detach().numpy()
    weights = build.constant("w3", weight[::-1].copy() if spoilt == 3 else weight)
    bias = build.constant("b3", net.dense.bias.detach().numpy())
    build.operator("FULLY_CONNECTED", [pooled, weights, bias], [classes], "FullyConnectedOptions")
    build.ends({"pixels": given}, {"classes": classes})
    return build.build()
