"""Values that were changed on purpose get names of their own; all others keep theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgekit.exporters import onnx_moved


def _model(centre: float) -> Any:
    """(x - centre) + centre, squared: the first value depends on the centre alone."""
    nodes = [
        helper.make_node("Sub", ["x", "centre"], ["less"], "less"),
        helper.make_node("Add", ["less", "centre"], ["same"], "same"),
        helper.make_node("Mul", ["same", "same"], ["y"], "square"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    constant = numpy_helper.from_array(np.float32(centre), "centre")
    graph = helper.make_graph(nodes, "model", ends[:1], ends[1:], [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_differs_is_found_and_renamed_and_the_model_stays_what_it_was() -> None:
    before, after = _model(0.0), _model(3.0)
    feed = {"x": np.array([1.0, -2.0, 0.5, 7.0], np.float32)}
    moved = onnx_moved.between(before, after, feed)
    assert moved == {"less"}
    onnx_moved.mark(after, moved)
    made = [node.output[0] for node in after.graph.node]
    assert made == ["less.moved", "same", "y"]
    assert onnx_moved.between(before, after, feed) == set()


def test_equal_models_have_nothing_moved() -> None:
    model = _model(1.0)
    assert onnx_moved.between(model, model, {"x": np.ones(4, np.float32)}) == set()
