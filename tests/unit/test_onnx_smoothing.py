"""Smoothing changes no float product, and lessens what 8 bits cost where a channel stands out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.exporters import onnx_quantizer, onnx_smoothing

_CHANNELS = 32


def _model(*names: str, residual: bool = False, flat: bool = False) -> Any:
    """y = x W for every weight; with ``residual`` x has another taker. ``flat``: +1 and -1 only."""
    generator = np.random.default_rng(3)
    arrays = [generator.standard_normal((_CHANNELS, 16), np.float32) for _ in dict.fromkeys(names)]
    weights = [
        numpy_helper.from_array(np.sign(array) if flat else array, name)
        for array, name in zip(arrays, dict.fromkeys(names), strict=True)
    ]
    nodes = [
        helper.make_node("MatMul", ["x", name], [f"y{i}"], name=f"product{i}")
        for i, name in enumerate(names)
    ]
    outputs = [f"y{i}" for i in range(len(names))]
    if residual:
        nodes.append(helper.make_node("Relu", ["x"], ["r"]))
        outputs.append("r")
    graph = helper.make_graph(
        [helper.make_node("Neg", ["input"], ["x"]), *nodes],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["rows", _CHANNELS])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _samples(outlier: float) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    scale = np.ones(_CHANNELS, np.float32)
    scale[5] = outlier
    values = [generator.standard_normal((9, _CHANNELS), np.float32) for _ in range(6)]
    if outlier == 1:  # not even by chance
        values = [np.sign(each) for each in values]
    return [{"input": each * scale} for each in values]


def _run(model: Any, feed: dict[str, Any]) -> list[Any]:
    found: list[Any] = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    ).run(None, feed)
    return found


def test_the_function_stays_the_same() -> None:
    plain, smooth = (_model("a", "b", residual=True) for _ in range(2))
    samples = _samples(200.0)
    assert onnx_smoothing.apply(smooth, samples, set(), 7) == 1  # one input, two products
    assert sum(node.op_type == "Mul" for node in smooth.graph.node) == 1
    for wanted, found in zip(_run(plain, samples[0]), _run(smooth, samples[0]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_an_outlier_costs_less_in_8_bits(tmp_path: Path) -> None:
    onnx.save(_model("a"), str(tmp_path / "m.onnx"))
    samples = _samples(200.0)
    errors = []
    for given in ((), samples):
        out = tmp_path / f"q{len(given)}.onnx"
        facts = onnx_quantizer.quantize(
            tmp_path / "m.onnx",
            out,
            "dynamic_wi8_afp32",
            samples=given,
            progress=lambda *_: None,
        )
        assert facts["smoothed"] == (1 if given else 0)
        wanted, found = (_run(onnx.load(str(p)), samples[0])[0] for p in (tmp_path / "m.onnx", out))
        errors.append(float(np.abs(wanted - found).mean()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize(
    ("names", "outlier", "kept"),
    [
        (("a", "a"), 200.0, set()),  # another product reads the same weights
        (("a",), 1.0, set()),  # nothing stands out
        (("a",), 200.0, {"product0"}),  # stays float
    ],
)
def test_what_is_left_alone(names: tuple[str, ...], outlier: float, kept: set[str]) -> None:
    model = _model(*names, flat=outlier == 1)
    before = model.SerializeToString()
    assert onnx_smoothing.apply(model, _samples(outlier), kept, 7) == 0
    assert [n.op_type for n in model.graph.node] == [
        n.op_type for n in onnx.ModelProto.FromString(before).graph.node
    ]
    assert onnx_smoothing.apply(_model("a"), [], set(), 7) == 0
