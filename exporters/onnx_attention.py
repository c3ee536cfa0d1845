"""Ranges for the two products inside attention, queries with keys and shares with values.

Knows where they stand in a traced graph, and which form engines keep in 8 bits from the projection
to the softmax: symmetric and signed for what is multiplied, without a sign for shares, which lie
between 0 and 1. Must never decide whether that loses too much: who calls it measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import helper

from edgekit.exporters import ort_quantization
from edgekit.exporters.onnx_graph import Graph

Feeds = Sequence[Mapping[str, Any]]
_TOP, _TOP_SHARE = 127, 255
_BETWEEN = ("Mul", "Div", "Add", "Identity", "Cast")  # the scores and their softmax


def inputs(graph: Graph, *, values: bool) -> dict[str, bool]:
    """Input of such a product -> whether it holds shares; with ``values`` of the second product of
    an attention too.
    """
    found: dict[str, bool] = {}
    for softmax in graph.nodes:
        if softmax.op_type != "Softmax":
            continue
        product = _product(graph, softmax.input[0])
        after = softmax.output[0]
        while through := graph.only_taker(after, "Identity", "Cast"):
            after = through.output[0]
        weighted = graph.only_taker(after, "MatMul")
        if product is None or weighted is None or weighted.input[0] != after:
            continue
        found |= dict.fromkeys(product.input, False)
        if values:
            found |= {after: True, weighted.input[1]: False}
    return {name: shares for name, shares in found.items() if graph.constant(name) is None}


def _product(graph: Graph, name: str) -> Any:
    """The MatMul of two computed values that scores come from, past a scale and a mask."""
    node = graph.maker(name, *_BETWEEN, "MatMul")
    if node is None or node.op_type == "MatMul":
        computed = node is not None and all(graph.constant(each) is None for each in node.input)
        return node if computed else None
    return next((found for each in node.input if (found := _product(graph, each))), None)


def largest(model: Any, samples: Feeds) -> dict[str, float]:
    """The largest value of each input over samples, without its sign."""
    names = list(inputs(Graph(model), values=True))
    if not names:
        return {}
    copy = type(model).FromString(model.SerializeToString())
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    engine = ort_quantization.session(copy)
    found = dict.fromkeys(names, 0.0)
    for sample in samples:
        for name, value in zip(names, engine.run(names, dict(sample)), strict=True):
            found[name] = max(found[name], float(np.abs(value).max()))
    return found


def insert(graph: Graph, ends: Mapping[str, float], *, values: bool) -> int:
    """Put a rounding to 8 bits before these products; how many inputs got one."""
    wanted = inputs(graph, values=values)
    for name, shares in wanted.items():
        top, kind = (_TOP_SHARE, np.uint8) if shares else (_TOP, np.int8)
        step = np.float32(max(1e-12, ends[name]) / top)
        scale = graph.add_constant(f"{name}.scores.scale", np.array(step, np.float32))
        zero = graph.add_constant(f"{name}.scores.zero", np.array(0, kind))
        parts = [f"{name}.scores.int8", f"{name}.scores"]
        rounded = helper.make_node("QuantizeLinear", [name, scale, zero], parts[:1], parts[0])
        again = helper.make_node("DequantizeLinear", [parts[0], scale, zero], parts[1:], parts[1])
        takers = [node for node in graph.takers[name] if node.op_type == "MatMul"]
        graph.replace([takers[0]], [rounded, again, takers[0]])
        for node in takers:
            for i, old in enumerate(node.input):
                if old == name:
                    node.input[i] = parts[1]
    return len(wanted)
