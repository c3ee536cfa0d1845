"""The bounded reader sees in an ONNX file what the package onnx sees; broken files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import CorruptArtifactError, EdgekitError, SourceError, VersionError
from edgekit.formats.onnx import read


def _model(**changed: Any) -> Any:
    """A product with a bias: weights raw, typed, and in a Constant node."""
    weights = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "weights")
    typed = helper.make_tensor("typed", TensorProto.INT64, [2], [-1, 1 << 40])
    nodes = [
        helper.make_node("MatMul", ["x", "weights"], ["product"], name="first"),
        helper.make_node("Clip", ["product"], ["y"], name="second"),
        helper.make_node("Constant", [], ["z"], value=weights),
        helper.make_node("Conv", ["y", "z"], ["c"], pads=[1, -1], auto_pad="VALID", alpha=0.5),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])],
        [weights, typed],
    )
    options = {"opset_imports": [helper.make_opsetid("", 17)], "ir_version": 9} | changed
    return helper.make_model(graph, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def test_the_graph_is_what_the_package_onnx_reads(path: Path) -> None:
    onnx.save(_model(), str(path))
    found, known = read(path), onnx.load(str(path))
    assert [(n.op_type, n.name, list(n.inputs), list(n.outputs)) for n in found.nodes] == [
        (n.op_type, n.name, list(n.input), list(n.output)) for n in known.graph.node
    ]
    assert [(t.name, t.shape, t.size_bytes) for t in found.initializers] == [
        (t.name, tuple(t.dims), numpy_helper.to_array(t).nbytes) for t in known.graph.initializer
    ]
    assert found.inputs[0].shape == ("batch", 4)
    assert found.outputs[0].shape == (None, 3)
    attributes = found.nodes[3].attributes
    assert (attributes["pads"], attributes["auto_pad"], attributes["alpha"]) == (
        (1, -1),
        "VALID",
        0.5,
    )
    assert (found.opsets, found.parameters) == ({"": 17}, 14)


def test_every_beginning_of_a_file_is_refused_or_a_whole_model(path: Path) -> None:
    raw = _model().SerializeToString()
    refused = 0
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        try:
            read(path)
        except EdgekitError:
            refused += 1
    assert refused > 0.8 * len(raw)  # the rest ends between two fields, with the graph in it


@pytest.mark.parametrize(
    ("changed", "error"),
    [({"ir_version": 99}, VersionError), ({"opset_imports": []}, VersionError)],
)
def test_versions_that_the_engine_does_not_know(
    path: Path, changed: dict[str, Any], error: type[Exception]
) -> None:
    onnx.save(_model(**changed), str(path))
    with pytest.raises(error):
        read(path)


def test_a_size_that_is_not_that_of_the_shape_is_refused(path: Path) -> None:
    model = _model()
    model.graph.initializer[0].dims[0] = 5
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptArtifactError, match="size of its shape"):
        read(path)


def test_two_weights_of_one_name_are_refused(path: Path) -> None:
    model = _model()
    model.graph.initializer[1].name = "weights"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptArtifactError, match="one name"):
        read(path)


def test_graphs_in_graphs_have_an_end(path: Path) -> None:
    model = _model()
    inner = model.graph
    for _ in range(20):
        node = helper.make_node("If", ["x"], ["q"], then_branch=inner)
        inner = helper.make_graph([node], "deep", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["q"], then_branch=inner))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptArtifactError, match="inside graphs"):
        read(path)


@pytest.mark.parametrize("raw", [b"", b"\0", b"GGUF", b"\xff" * 64, b"{}", b"\x3a\xff\xff\xff\x7f"])
def test_what_is_no_model_is_refused(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    with pytest.raises(CorruptArtifactError):
        read(path)
    with pytest.raises(SourceError):
        read(path.with_name("absent.onnx"))
