"""The convolution that cuts an image into patches, in 8 bits: the one of a vision transformer.

Pixels have 256 levels, so that a range from the darkest to the brightest rounds hardly anything; in
float this convolution takes a part of the time that the products behind it no longer take. Must
never touch a convolution whose input is computed: its range is another question (``onnx_static``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import helper

from edgekit.exporters import onnx_channels
from edgekit.exporters.onnx_graph import Graph

Feeds = Sequence[Mapping[str, Any]]
_TOP = 255


def apply(model: Any, samples: Feeds, kept: set[str]) -> int:
    """Give every convolution of an input of the graph int8 weights and a range; how many there are.

    Changes ``model`` in place. ``kept`` are names of nodes that stay float.
    """
    graph = Graph(model)
    given = set(samples[0])
    found = [
        node
        for node in graph.nodes
        if node.op_type == "Conv" and node.input[0] in given and node.name not in kept
        if graph.constant(node.input[1]) is not None
    ]
    for node in found:
        weights = graph.constant(node.input[1])
        name = node.input[0]
        low = min(0.0, min(float(sample[name].min()) for sample in samples))
        high = max(0.0, max(float(sample[name].max()) for sample in samples))
        step = max(1e-12, (high - low) / _TOP)
        rounded, scales = onnx_channels.quantize_channels(weights.reshape(len(weights), -1), 0)
        own = f"{node.name or node.output[0]}.stem"
        parts = {
            "scale": np.array(step, np.float32),
            "zero": np.array(np.clip(round(-low / step), 0, _TOP), np.uint8),
            "int8": rounded.reshape(weights.shape),
            "scales": scales,
            "zeros": np.zeros(scales.shape, np.int8),
        }
        names = {part: graph.add_constant(f"{own}.{part}", array) for part, array in parts.items()}
        ends = [names["scale"], names["zero"]]
        made = [
            helper.make_node("QuantizeLinear", [name, *ends], [f"{own}.pixels"], f"{own}.q"),
            helper.make_node(
                "DequantizeLinear", [f"{own}.pixels", *ends], [f"{own}.ranged"], f"{own}.d"
            ),
            helper.make_node(
                "DequantizeLinear",
                [names["int8"], names["scales"], names["zeros"]],
                [f"{own}.weights"],
                f"{own}.w",
                axis=0,
            ),
        ]
        graph.replace([node], [*made, node])
        node.input[0], node.input[1] = f"{own}.ranged", f"{own}.weights"
    graph.finish()
    return len(found)
