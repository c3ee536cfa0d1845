"""Weights alone in 8 bits, with a scale for each output channel, in the plain operators of ONNX.

Must never look at an activation: an engine may round those itself, for each token and in small
groups, while it multiplies. OpenVINO does where it has int8 kernels, so that a file without any
measured range runs as fast as an int8 one and keeps what outliers would cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import helper

from edgekit.exporters import onnx_blocks
from edgekit.exporters.onnx_graph import Graph, attribute

_TOP = 127
_SHRINKS = np.linspace(1.0, 0.85, 7)  # parts of a channel's range that are tried


def apply(
    graph: Graph, kept: set[str], fitted: Mapping[str, tuple[Any, Any]] | None = None
) -> dict[str, Any]:
    """Rewrite every matrix product with constant weights, and every table; how many of each.

    ``fitted`` has the int8 weights and the scales of some products, by the name of the node.
    """
    count = 0
    for node in products(graph, kept):
        weights = graph.constant(node.input[1])
        # The axis of outputs: the last, but where a Gemm turns its weights round.
        axis = 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1
        quantized, scales = (fitted or {}).get(node.name) or quantize_channels(weights, axis)
        name = f"{node.input[1]}.{node.name}"
        parts = {"int8": quantized, "scales": scales, "zeros": np.zeros(scales.shape, np.int8)}
        names = [graph.add_constant(f"{name}.{part}", array) for part, array in parts.items()]
        float_name = f"{name}.float"
        float_again = helper.make_node(
            "DequantizeLinear", names, [float_name], f"{node.name}.weights", axis=axis
        )
        graph.replace([node], [float_again, node])
        node.input[1] = float_name
        count += 1
    tables = onnx_blocks.quantize_tables(graph, kept)
    graph.finish()
    return {"matrices": count, "tables": tables}


def products(graph: Graph, kept: set[str]) -> list[Any]:
    """The matrix products with constant float32 weights, but for ``kept``, by name."""
    found = []
    for node in graph.nodes:
        if node.op_type in ("MatMul", "Gemm") and node.name not in kept:
            weights = graph.constant(node.input[1])
            if weights is not None and weights.ndim == 2 and weights.dtype == np.float32:
                found.append(node)
    return found


def add_to_bias(graph: Graph, node: Any, moved: Any) -> None:
    """Add [outputs] to what a MatMul makes, in the constant behind it where there is one."""
    made = node.output[0]
    added = graph.only_taker(made, "Add")
    side = 1 - list(added.input).index(made) if added else 0
    bias = graph.constant(added.input[side]) if added else None
    if bias is not None and bias.shape == moved.shape:
        added.input[side] = graph.add_float(f"{made}/moved", bias + moved)
        graph.keep(graph.nodes)
        return
    node.output[0] = f"{made}/before"
    constant = graph.add_float(f"{made}/moved", moved)
    add = helper.make_node("Add", [node.output[0], constant], [made], f"{node.name}/moved")
    graph.replace([node], [node, add])


def quantize_channels(weights: Any, axis: int) -> tuple[Any, Any]:
    """float32 [a, b] -> int8 [a, b] and float32 scales along ``axis``: w = scale q, with the range
    of each channel that leaves the least squared error.
    """
    values = weights if axis == 0 else weights.T
    largest = np.abs(values).max(axis=1, keepdims=True).astype(np.float32)
    least = np.full_like(largest, np.inf)
    scales = np.ones_like(largest)
    for shrink in _SHRINKS:
        scale = largest * np.float32(shrink) / _TOP
        scale[scale == 0] = 1
        error = (np.clip(np.rint(values / scale), -_TOP, _TOP) * scale - values) ** 2
        total = error.sum(axis=1, keepdims=True)
        scales = np.where(total < least, scale, scales)
        least = np.minimum(total, least)
    quantized = np.clip(np.rint(values / scales), -_TOP, _TOP).astype(np.int8)
    return (quantized if axis == 0 else quantized.T), scales.reshape(-1)
