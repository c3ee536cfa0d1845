"""The cost of an ONNX graph from its header: shapes as the package onnx has them, sums by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_torch
from onnx import TensorProto, helper, numpy_helper, shape_inference

from edgekit import onnx_cost, vision_cost
from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters import torch_model, torch_to_onnx
from edgekit.formats import json_file
from edgekit.formats.onnx import OnnxHeader, read
from edgekit.onnx_shapes import Shapes
from edgekit.plan import plan
from edgekit.planned_model import planned


def _weights(name: str, *shape: int) -> Any:
    return numpy_helper.from_array(np.zeros(shape, np.float32), name)


def _header(tmp_path: Path, nodes: list[Any], weights: list[Any], *shape: Any) -> OnnxHeader:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "model.onnx"))
    return read(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("attributes", "side"),
    [
        ({"pads": [1, 1, 1, 1]}, 32),
        ({"strides": [2, 2], "pads": [1, 1, 1, 1]}, 16),
        ({"strides": [2, 2], "auto_pad": "SAME_UPPER"}, 16),
        ({"dilations": [2, 2]}, 28),
        ({"auto_pad": "VALID"}, 30),
    ],
)
def test_a_convolution_by_hand(tmp_path: Path, attributes: dict[str, Any], side: int) -> None:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    found = onnx_cost.cost(
        _header(tmp_path, [node], [_weights("w", 8, 3, 3, 3), _weights("b", 8)], 1, 3, 32, 32)
    )
    assert found.cost.flops == 2 * side**2 * 8 * 27
    assert found.cost.activations == side**2 * 8
    assert found.weight_bytes == {"float32": 4 * (8 * 27 + 8)}
    assert not found.is_int8


def test_open_sizes_are_told(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    header = _header(tmp_path, [node], [_weights("w", 8, 3, 1, 1)], "batch", 3, "height", None)
    found = onnx_cost.cost(header)
    assert found.assumed == ("'batch' 1", "'height' 224", "axis 3 of 'x' 224")
    assert found.cost.flops == 2 * 224**2 * 8 * 3


def test_a_shape_that_the_graph_computes_is_followed(tmp_path: Path) -> None:
    """Reshape to (batch, -1), the batch taken from the input's shape."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n", "axes"], ["rows"]),
        helper.make_node("Concat", ["rows", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(np.array(0, np.int64), "zero"),
        numpy_helper.from_array(np.array([0], np.int64), "axes"),
        helper.make_tensor("rest", TensorProto.INT64, [1], [-1]),
        _weights("w", 48, 10),
    ]
    found = onnx_cost.cost(_header(tmp_path, nodes, weights, "batch", 3, 4, 4))
    assert found.cost.flops == 2 * 48 * 10


def test_an_operator_that_nobody_knows_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Mystery", ["x"], ["y"], name="who", domain="net.example")
    header = _header(tmp_path, [node], [], 1, 3)
    with pytest.raises(UnsupportedModelError, match=r"Mystery.*who"):
        onnx_cost.cost(header)


def test_an_absurd_graph_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Concat", ["x"] * 64, ["0"], axis=0)]
    nodes += [helper.make_node("Concat", [str(i)] * 64, [str(i + 1)], axis=0) for i in range(7)]
    with pytest.raises(SourceError, match="absurd"):
        onnx_cost.cost(_header(tmp_path, nodes, [], 1 << 20, 1))
    with pytest.raises(SourceError, match="has no input"):
        onnx_cost.cost(_header(tmp_path, [helper.make_node("Relu", ["?"], ["y"])], [], 1, 3))


def test_numbers_that_would_never_end(tmp_path: Path) -> None:
    """Squares of squares, and a range of all whole numbers."""
    nodes = [helper.make_node("Mul", [str(i), str(i)], [str(i + 1)]) for i in range(100)]
    nodes.append(helper.make_node("Range", ["low", "high", "one"], ["r"]))
    weights = [
        helper.make_tensor("0", TensorProto.INT64, [1], [1 << 40]),
        helper.make_tensor("low", TensorProto.INT64, [], [-(1 << 63)]),
        helper.make_tensor("high", TensorProto.INT64, [], [(1 << 63) - 1]),
        helper.make_tensor("one", TensorProto.INT64, [], [1]),
    ]
    with pytest.raises(UnsupportedModelError, match="Range"):
        onnx_cost.cost(_header(tmp_path, nodes, weights, 1, 3))


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("MatMulNBits", ["x"], ["y"], N="wide"),
        helper.make_node("Shape", ["x"], ["y"], start="late"),
        helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[0, 0], strides=[0, 0]),
        helper.make_node("Transpose", ["x"], ["y"], perm=[7, 8]),
        helper.make_node("Constant", [], [], value_int=3),
        helper.make_node("Gemm", ["x", "x"], ["y"]),
    ],
)
def test_a_graph_that_contradicts_itself_is_refused(tmp_path: Path, node: Any) -> None:
    header = _header(tmp_path, [node], [], 1, 3, 4, 4)
    with pytest.raises((UnsupportedModelError, SourceError)):
        onnx_cost.cost(header)


@pytest.fixture(scope="module", params=["vit", "resnet", "bert"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, and beside its config.json the graph that torch's exporter writes."""
    folder = tmp_path_factory.mktemp(request.param)
    getattr(tiny_torch, f"{request.param}_folder")(folder)
    torch_to_onnx.write(_traced(folder), folder / "model.onnx")
    return folder


def _traced(folder: Path) -> Any:
    from edgekit.source import source

    return torch_model.build(source(folder))


def test_shapes_are_those_of_the_package_onnx(exported: Path) -> None:
    model = onnx.load(str(exported / "model.onnx"))
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = 1 if dim.dim_param == "batch" else 32
    known = shape_inference.infer_shapes(model, data_prop=True, strict_mode=True)
    header = read(exported / "model.onnx")
    inputs, _ = onnx_cost.inputs(header, 32)
    walk = Shapes(header, inputs)
    compared = 0
    for value in known.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            assert walk.shapes[value.name] == tuple(dim.dim_value for dim in dims), value.name
            compared += 1
    assert compared > 0.5 * len(known.graph.value_info)  # the rest the package cannot tell


@pytest.mark.parametrize("exported", ["vit", "resnet"], indirect=True)
def test_the_graph_costs_what_the_config_says(exported: Path) -> None:
    body = json_file.read(exported / "config.json", 1 << 20)
    config = vision_cost.cost({"image_size": tiny_torch.SIDE} | body)
    assert config is not None
    found = onnx_cost.cost(read(exported / "model.onnx")).cost
    assert found.flops == pytest.approx(config.flops, rel=0.02)
    assert found.weights == pytest.approx(config.weights, rel=0.1)


def test_a_plan_takes_the_file(exported: Path) -> None:
    path = exported / "model.onnx"
    found = plan(path, "rpi5")
    assert found.latency_ms is not None and found.latency_ms.mid > 0
    assert found.memory.weights == pytest.approx(path.stat().st_size, rel=0.2)
    smaller = planned(path, bits=8)
    assert smaller.type == "int8" and smaller.stored is None
