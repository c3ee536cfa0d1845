"""Static int8 of matrix products: ranges for their inputs alone, none where it would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_torch
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import ExportError
from edgekit.exporter import export, no_progress
from edgekit.exporters import onnx_channels, onnx_products
from edgekit.exporters.onnx_graph import Graph

_WIDE = 32


def _model(layers: int = 3, transposed: bool = False) -> Any:
    """relu(x W) again and again; with ``transposed`` the last is a Gemm that turns W round."""
    generator = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for number in range(layers):
        array = generator.standard_normal((_WIDE, _WIDE), np.float32) / _WIDE**0.5
        weights.append(numpy_helper.from_array(array, f"w{number}"))
        gemm = transposed and number == layers - 1
        kind, more = ("Gemm", {"transB": 1}) if gemm else ("MatMul", {})
        ends = [value, f"w{number}"], [f"p{number}"]
        nodes.append(helper.make_node(kind, *ends, f"n{number}", **more))
        nodes.append(helper.make_node("Relu", [f"p{number}"], [f"r{number}"], f"relu{number}"))
        value = f"r{number}"
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", _WIDE])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["rows", _WIDE])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _samples(count: int = 8) -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)
    return [{"x": generator.standard_normal((16, _WIDE), np.float32)} for _ in range(count)]


def _run(model: Any, feed: dict[str, Any]) -> Any:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)[0]


def _kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("transposed", [False, True])
def test_every_input_gets_one_range_and_the_answers_stay(transposed: bool) -> None:
    model, samples = _model(transposed=transposed), _samples()
    wanted = _run(model, samples[-1])
    found, facts = onnx_products.apply(_model(transposed=transposed), samples, set(), no_progress)
    assert (facts["static_inputs"], facts["inputs_without_range"]) == (3, 0)
    assert _kinds(found).count("QuantizeLinear") == 3
    mine = _run(found, samples[-1])
    assert float((mine * wanted).sum() / np.linalg.norm(mine) / np.linalg.norm(wanted)) > 0.999
    assert {t.data_type for t in found.graph.initializer if len(t.dims) == 2} == {TensorProto.INT8}


def test_an_input_that_no_single_range_fits_keeps_float() -> None:
    """Rows a thousand times smaller than others lose everything to one range for all."""
    model, samples = _model(layers=12), _samples(16)
    for number, sample in enumerate(samples):
        sample["x"] = sample["x"] * np.float32(1e-3 if number % 2 else 1)
    found, facts = onnx_products.apply(model, samples, set(), no_progress)
    assert facts["inputs_without_range"] > 0
    assert facts["calibration_loss"] < 0.01
    assert _kinds(found).count("QuantizeLinear") == facts["static_inputs"] < 12


def test_kept_nodes_stay_as_they_are() -> None:
    found, _ = onnx_products.apply(_model(), _samples(), {"n1"}, no_progress)
    kinds = {t.name: t.data_type for t in found.graph.initializer if len(t.dims) == 2}
    assert list(kinds.values()).count(TensorProto.FLOAT) == 1
    node = next(node for node in found.graph.node if node.name == "n1")
    assert node.input[0] == "r0"


def test_no_samples_no_ranges() -> None:
    with pytest.raises(ExportError, match="samples"):
        onnx_products.apply(_model(), [], set(), no_progress)


def test_weights_alone_lose_no_more_than_half_a_step() -> None:
    weights = np.random.default_rng(2).standard_normal((6, 40)).astype(np.float32)
    weights[3] = 0
    for axis in (0, 1):
        quantized, scales = onnx_channels.quantize_channels(weights, axis)
        wide = scales[:, None] if axis == 0 else scales[None, :]
        plain = np.abs(weights).max(axis=1 - axis, keepdims=True) / 127
        rounded = np.rint(weights / np.where(plain, plain, 1)) * plain
        # The searched range is never worse than the whole one.
        assert ((quantized * wide - weights) ** 2).sum() <= ((rounded - weights) ** 2).sum() + 1e-6
        assert quantized.dtype == np.int8 and quantized.shape == weights.shape


def test_a_graph_of_weights_alone_answers_alike() -> None:
    model, feed = _model(transposed=True), _samples()[0]
    wanted = _run(model, feed)
    facts = onnx_channels.apply(Graph(model), set())
    assert facts == {"matrices": 3, "tables": 0}
    mine = _run(model, feed)
    assert float((mine * wanted).sum() / np.linalg.norm(mine) / np.linalg.norm(wanted)) > 0.9995


@pytest.mark.parametrize("kind", ["static_wi8_ai8", "weight_only_wi8_afp32"])
def test_an_encoder_of_texts_is_exported_and_proved(kind: str, tmp_path: Path) -> None:
    """Texts have many lengths, which onnxruntime's own calibration does not take."""
    folder = tiny_torch.bert_folder(tmp_path / "bert")
    artifact = export(folder, "onnx", type=kind, out=tmp_path / "out")
    assert artifact.receipt["agreement"]["cosine"]["value"] > 0.99
    inside = artifact.manifest.details.get("inputs_inside_attention", 0)
    # Fused where it is float: two products of each layer otherwise, in 8 bits.
    assert (inside, artifact.manifest.details["passes"]["attention"]) in ((0, 2), (8, 0))
    assert inside == (8 if kind.startswith("static") else 0)


def test_attention_stays_float_where_8_bits_would_cost_too_much(tmp_path: Path) -> None:
    """Planted: one channel of the queries and of the keys is huge, and all others matter."""
    facts = []
    for huge in (1.0, 3000.0):
        model = _attention(huge)
        _, found = onnx_products.apply(model, _samples(16), set(), no_progress)
        facts.append(found["inputs_inside_attention"])
    assert facts == [2, 0]  # queries and keys; shares would cost more than they save


def _attention(huge: float) -> Any:
    """softmax(q k') v of one head; the first channel of q is ``huge``, and that of k near zero."""
    generator = np.random.default_rng(0)
    names, weights, nodes = ("q", "k", "v"), [], []
    for name in names:
        array = generator.standard_normal((_WIDE, _WIDE), np.float32) / _WIDE**0.5
        array[:, 0] *= {"q": huge, "k": 1e-3 / huge}.get(name, 1)
        weights.append(numpy_helper.from_array(array, f"w{name}"))
        nodes.append(helper.make_node("MatMul", ["x", f"w{name}"], [name], f"n{name}"))
    nodes += [
        helper.make_node("Transpose", ["k"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["q", "turned"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], "softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["y"], "weighted"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", _WIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", _WIDE])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("kept", [set(), {"patches"}])
def test_the_convolution_of_patches_is_rounded_too(kept: set[str]) -> None:
    generator = np.random.default_rng(0)
    kernels = generator.standard_normal((_WIDE, 3, 4, 4), np.float32) / 7
    matrix = generator.standard_normal((_WIDE, _WIDE), np.float32) / _WIDE**0.5
    constants = {"k": kernels, "w": matrix, "flat": np.array([0, _WIDE, -1])}
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], "patches", strides=[4, 4]),
        helper.make_node("Reshape", ["c", "flat"], ["f"]),
        helper.make_node("Transpose", ["f"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "w"], ["y"], "product"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    feeds = [{"x": generator.uniform(-2, 2, (1, 3, 16, 16)).astype(np.float32)} for _ in range(32)]
    wanted = _run(model, feeds[-1])
    found, facts = onnx_products.apply(model, feeds, kept, no_progress)
    assert facts["stems"] == (0 if kept else 1)
    kinds = {t.data_type for t in found.graph.initializer if len(t.dims) == 4}
    assert kinds == {TensorProto.FLOAT if kept else TensorProto.INT8}
    mine = _run(found, feeds[-1])
    assert float((mine * wanted).sum() / np.linalg.norm(mine) / np.linalg.norm(wanted)) > 0.9995
