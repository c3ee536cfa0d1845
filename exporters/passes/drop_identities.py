"""Operators that change nothing: Identity, and Cast to the type that a value has already.

The tracing exporter writes an Identity for every weight that equals another one, and a Cast where a
model names the type that it computes in. Either gives out what comes in, so who takes its output
may as well take its input. They hide constants and neighbours from the passes after this one.
"""

from __future__ import annotations

from typing import Any

import onnx

from edgekit.exporters.onnx_graph import Graph, attribute


def apply(graph: Graph) -> int:
    """Drop them all, but those that make an output of the graph; how many there were."""
    if graph.nested:
        return 0
    types = _types(graph.model)
    outputs = {value.name for value in graph.model.graph.output}
    instead: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        same = node.op_type == "Identity" or (
            node.op_type == "Cast" and types.get(node.input[0]) == attribute(node, "to")
        )
        if same and node.output[0] not in outputs:
            instead[node.output[0]] = instead.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    for node in kept:
        for i, name in enumerate(node.input):
            if name in instead:
                node.input[i] = instead[name]
    graph.keep(kept)
    return len(instead)


def _types(model: Any) -> dict[str, int]:
    """The type of every value of the main graph, as far as it can be known."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False)
    except Exception:  # of more than 2 GiB, or with operators of a stranger
        return {}
    graph = inferred.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    known = {value.name: value.type.tensor_type.elem_type for value in values}
    return known | {tensor.name: tensor.data_type for tensor in graph.initializer}
