"""GELU written out, x (1 + erf(x / sqrt 2)) / 2, as one operator (https://arxiv.org/abs/1606.08415).

Knows the forms that exporters write; never what the graph is for. Where an engine has no erf it
would compute the parts one by one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import helper

from edgekit.exporters.onnx_graph import Graph

_CLOSE = 1e-3  # of a constant: some exporters write few digits


def apply(model: Any) -> int:
    """Change ``model`` in place; how many there were."""
    graph = Graph(model)
    count = 0
    for erf in [node for node in graph.nodes if node.op_type == "Erf"]:
        found = _whole(graph, erf)
        if found is None:
            continue
        value, parts = found
        out = parts[-1].output[0]
        graph.replace(parts, [helper.make_node("Gelu", [value], [out], name=f"{erf.name}.gelu")])
        count += 1
    if count:
        graph.finish()
    return count


def _whole(graph: Graph, erf: Any) -> tuple[str, list[Any]] | None:
    """What goes in, and the operators in their order."""
    scaled = graph.maker(erf.input[0], "Div", "Mul")
    more = graph.only_taker(erf.output[0], "Add")
    if scaled is None or graph.only_taker(scaled.output[0], "Erf") is None:
        return None
    if more is None or not _with(graph, more, erf.output[0], 1.0):
        return None
    value = scaled.input[0]
    wanted = math.sqrt(2) if scaled.op_type == "Div" else math.sqrt(0.5)
    if not _with(graph, scaled, value, wanted):
        return None
    first = graph.only_taker(more.output[0], "Mul")
    if first is None:
        return None
    other = _beside(first, more.output[0])
    if (half := graph.maker(other, "Mul")) is not None and value in half.input:
        # x / 2, times the rest; others may take x / 2 too
        return (value, [scaled, erf, more, first]) if _with(graph, half, value, 0.5) else None
    last = graph.only_taker(first.output[0], "Mul", "Div")
    if last is None:
        return None
    rest = _beside(last, first.output[0])
    halved = 2.0 if last.op_type == "Div" else 0.5
    if other == value and _with(graph, last, first.output[0], halved):
        return value, [scaled, erf, more, first, last]
    if rest == value and last.op_type == "Mul" and _with(graph, first, more.output[0], 0.5):
        return value, [scaled, erf, more, first, last]
    return None


def _beside(node: Any, name: str) -> str:
    """The other of a node's two inputs."""
    found: str = node.input[1] if node.input[0] == name else node.input[0]
    return found


def _with(graph: Graph, node: Any, name: str, number: float) -> bool:
    """Whether the node takes ``name`` and one number; a Div takes that last."""
    if node.op_type == "Div" and node.input[0] != name:
        return False
    found = graph.constant(_beside(node, name))
    return (
        found is not None
        and found.size == 1
        and bool(np.isclose(float(found.reshape(-1)[0]), number, rtol=_CLOSE))
    )
