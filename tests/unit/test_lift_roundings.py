"""Rounding moves in front of what only moves values, and not a bit of the answer changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.exporters import passes
from edgekit.exporters.onnx_graph import Graph
from edgekit.exporters.passes import lift_roundings

_SHAPE = [2, 4, 6, 6]


def _rounding(
    value: str, out: str, ends: tuple[str, str] = ("scale", "zero"), **more: Any
) -> list[Any]:
    return [
        helper.make_node("QuantizeLinear", [value, *ends], [f"{out}/int8"], f"q/{out}", **more),
        helper.make_node("DequantizeLinear", [f"{out}/int8", *ends], [out], f"d/{out}", **more),
    ]


def _model(nodes: list[Any], zero: int = 100, outputs: tuple[str, ...] = ("y",)) -> Any:
    constants = {
        "scale": np.float32(0.031),
        "zero": np.uint8(zero),
        "scales": np.float32([0.01, 0.02, 0.03, 0.04]),
        "zeros": np.uint8([100] * 4),
        "coarse": np.float32(0.5),
        "flat": np.array([2, 4, 36]),
        "wide": np.array([2, 4, 6, 6]),
        "axes": np.array([0]),
        "halves": np.float32(0.5),
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, _SHAPE)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _answers(model: Any) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = np.random.default_rng(0).standard_normal(_SHAPE).astype(np.float32) * 5
    found: list[Any] = session.run(None, {"x": feed})
    return found


def _lifted(model: Any) -> tuple[int, list[str]]:
    fired = passes.apply("lifted_roundings", model)
    return fired, [node.op_type for node in model.graph.node]


_NEG = helper.make_node("Neg", ["x"], ["n"], "neg")
_ONE = {
    "Reshape": helper.make_node("Reshape", ["n", "flat"], ["m"]),
    "Flatten": helper.make_node("Flatten", ["n"], ["m"]),
    "Unsqueeze": helper.make_node("Unsqueeze", ["n", "axes"], ["m"]),
    "Transpose": helper.make_node("Transpose", ["n"], ["m"], perm=[0, 2, 3, 1]),
    "MaxPool": helper.make_node(
        "MaxPool", ["n"], ["m"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
    ),
    "Relu": helper.make_node("Relu", ["n"], ["m"]),
}


@pytest.mark.parametrize("zero", [0, 100, 255])
@pytest.mark.parametrize("kind", list(_ONE))
def test_a_pair_stands_before_what_moves_values(kind: str, zero: int) -> None:
    model = _model([_NEG, _ONE[kind], *_rounding("m", "y")], zero)
    wanted = _answers(model)
    assert _lifted(model) == (1, ["Neg", "QuantizeLinear", "DequantizeLinear", kind])
    assert np.array_equal(_answers(model)[0], wanted[0])


def test_it_goes_as_far_as_it_can_and_melts_into_an_equal_pair() -> None:
    """As a value between two int8 kernels, split into heads: one pair is left of two."""
    way = [
        helper.make_node("Reshape", ["r", "flat"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        helper.make_node("Relu", ["b"], ["c"]),
    ]
    model = _model([_NEG, *_rounding("n", "r"), *way, *_rounding("c", "y")])
    wanted = _answers(model)
    fired, kinds = _lifted(model)
    assert fired == 4
    assert kinds == ["Neg", "QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose", "Relu"]
    assert np.array_equal(_answers(model)[0], wanted[0])


def test_of_a_concat_every_input_is_rounded() -> None:
    parts = [
        _NEG,
        helper.make_node("Abs", ["x"], ["p"]),
        helper.make_node("Concat", ["n", "p"], ["m"], axis=1),
    ]
    model = _model([*parts, *_rounding("m", "y")])
    wanted = _answers(model)
    fired, kinds = _lifted(model)
    assert (fired, kinds.count("QuantizeLinear"), kinds[-1]) == (1, 2, "Concat")
    assert np.array_equal(_answers(model)[0], wanted[0])


def test_others_of_the_value_keep_it_in_float() -> None:
    """Another taker of what goes into the operator sees no rounding."""
    model = _model(
        [_NEG, _ONE["Transpose"], *_rounding("m", "y"), helper.make_node("Abs", ["n"], ["z"])],
        outputs=("y", "z"),
    )
    wanted = _answers(model)
    assert _lifted(model)[0] == 1
    for found, before in zip(_answers(model), wanted, strict=True):
        assert np.array_equal(found, before)


@pytest.mark.parametrize(
    "nodes",
    [
        # Rounding moves a sum, and a bound.
        [helper.make_node("Add", ["n", "halves"], ["m"]), *_rounding("m", "y")],
        [helper.make_node("Clip", ["n", "", "halves"], ["m"]), *_rounding("m", "y")],
        # A scale for each channel would go with the channels.
        [_ONE["Transpose"], *_rounding("m", "y", ("scales", "zeros"), axis=3)],
        # The same scale, but another one behind it.
        [*_rounding("n", "m", ("coarse", "zero")), *_rounding("m", "y")],
    ],
)
def test_what_is_not_equal_is_left_alone(nodes: list[Any]) -> None:
    model = _model([_NEG, *nodes])
    before = [node.op_type for node in model.graph.node]
    assert _lifted(model) == (0, before)


def test_somebody_in_between_keeps_the_pair_where_it_is() -> None:
    model = _model(
        [_NEG, _ONE["Relu"], *_rounding("m", "y"), helper.make_node("Abs", ["m"], ["z"])],
        outputs=("y", "z"),
    )
    assert lift_roundings.apply(Graph(model)) == 0
