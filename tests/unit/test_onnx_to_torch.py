"""An ONNX graph of one size in torch gives what ONNX Runtime gives, or names what it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_torch
import torch
from onnx import TensorProto, helper, numpy_helper, save

from edgekit.errors import ParityError, UnsupportedModelError
from edgekit.exporter import export
from edgekit.exporters import onnx_graph, onnx_to_torch, onnx_windows, torch_to_onnx
from edgekit.preprocess import Preprocessing

TENSORS = Preprocessing("tensors")
IMAGE = ["batch", 4, 9, 10]
F = np.float32


def graph(
    path: Path,
    kind: str,
    constants: dict[str, Any],
    *,
    shape: list[Any] = IMAGE,
    outputs: int = 1,
    opset: int = 18,
    before: str = "Tanh",
    domain: str = "",
    **attributes: Any,
) -> Path:
    """``x`` through ``before``, then through the one node, which takes the constants too. The name
    "" leaves an input out.
    """
    names = [f"y{number}" for number in range(outputs)]
    nodes = [
        helper.make_node(before, ["x"], ["t"]),
        helper.make_node(kind, ["t", *constants], names, "it", domain=domain, **attributes),
    ]
    weights = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items() if n]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info(name) for name in names],
        weights,
    )
    kinds = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    save(helper.make_model(made, opset_imports=kinds, ir_version=8), path)
    return path


def weights(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(F)


def whole(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "conv": ("Conv", {"w": weights(6, 4, 3, 3), "b": weights(6)}, {"strides": [2, 1]}),
    "conv, one side": ("Conv", {"w": weights(6, 4, 3, 3)}, {"pads": [0, 1, 1, 0]}),
    "conv, same upper": (
        *("Conv", {"w": weights(6, 4, 3, 3)}),
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    ),
    "conv, same lower": (
        *("Conv", {"w": weights(4, 1, 4, 4)}),
        {"auto_pad": "SAME_LOWER", "strides": [2, 2], "group": 4},
    ),
    "conv, spread": ("Conv", {"w": weights(2, 4, 3, 3)}, {"dilations": [2, 2], "pads": [2] * 4}),
    "transposed": (
        *("ConvTranspose", {"w": weights(4, 2, 3, 3)}),
        {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]},
    ),
    "max pool": ("MaxPool", {}, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}),
    "max pool, one side": ("MaxPool", {}, {"kernel_shape": [3, 3], "pads": [0, 0, 1, 2]}),
    "max pool, up": ("MaxPool", {}, {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "mean pool": ("AveragePool", {}, {"kernel_shape": [3, 3], "pads": [1] * 4}),
    "mean pool, one side": ("AveragePool", {}, {"kernel_shape": [3, 2], "pads": [0, 1, 1, 0]}),
    "mean pool, all": (
        *("AveragePool", {}),
        {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1},
    ),
    "twice as large": (
        *("Resize", {"": None, "s": np.array([1, 1, 2, 2], F)}),
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"},
    ),
    "bilinear": (
        *("Resize", {"": None, "s": np.array([1, 1, 2, 1.5], F)}),
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    ),
    "corners": (
        *("Resize", {"": None, "s": np.array([1, 1, 2, 2], F)}),
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    "batch norm": (
        "BatchNormalization",
        {"s": weights(4), "b": weights(4), "m": weights(4), "v": np.abs(weights(4)) + 1},
        {},
    ),
    "instance norm": ("InstanceNormalization", {"s": weights(4), "b": weights(4)}, {}),
    "layer norm": ("LayerNormalization", {"s": weights(10), "b": weights(10)}, {}),
    "two axes": ("LayerNormalization", {"s": weights(9, 10)}, {"axis": -2}),
    "softmax": ("Softmax", {}, {"axis": 1}),
    "softmax of old": ("Softmax", {}, {"axis": 1, "opset": 11}),
    "mean": ("ReduceMean", {"a": whole(2, 3)}, {"keepdims": 0}),
    "mean of old": ("ReduceMean", {}, {"axes": [1], "opset": 17}),
    "length": ("ReduceL2", {"a": whole(-1)}, {}),
    "likeliest": ("ArgMax", {}, {"axis": 1, "keepdims": 0}),
    "clip": ("Clip", {"low": F(-0.2), "high": F(0.3)}, {}),
    "power": ("Pow", {"e": whole(2).reshape(())}, {}),
    "product": ("MatMul", {"w": weights(10, 7)}, {}),
    "product of a row": ("MatMul", {"w": weights(10)}, {}),
    "hard sigmoid": ("HardSigmoid", {}, {"alpha": 0.3}),
    "leaky": ("LeakyRelu", {}, {}),
    "slopes": ("PRelu", {"s": weights(4, 1, 1)}, {}),
    "gelu": ("Gelu", {}, {"approximate": "tanh", "opset": 20}),
    "reshape": ("Reshape", {"s": whole(0, 2, -1, 10)}, {}),
    "flatten": ("Flatten", {}, {"axis": 2}),
    "transpose": ("Transpose", {}, {"perm": [0, 2, 3, 1]}),
    "slice": (
        *("Slice", {"s": whole(1, 7), "e": whole(9, -100), "a": whole(3, 2), "d": whole(3, -2)}),
        {},
    ),
    "slice to the end": ("Slice", {"s": whole(-3), "e": whole(2**63 - 1), "a": whole(1)}, {}),
    "gather": ("Gather", {"i": whole(0, -1, 3)}, {"axis": 1}),
    "gather one": ("Gather", {"i": whole(-2).reshape(())}, {"axis": 3}),
    "gather a run": ("Gather", {"i": whole(2, 3, 4, 5).reshape(2, 2)}, {"axis": 2}),
    "split": ("Split", {"s": whole(1, 3)}, {"axis": 1, "outputs": 2}),
    "halves": ("Split", {}, {"axis": 1, "outputs": 2, "opset": 13}),
    "pad": ("Pad", {"p": whole(0, 0, 1, 2, 0, 0, 3, 0), "v": F(0.5)}, {}),
    "pad by mirrors": ("Pad", {"p": whole(0, 0, 1, 2, 0, 0, 3, 0)}, {"mode": "reflect"}),
    "pad of old": ("Pad", {}, {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 0.25, "opset": 9}),
    "tile": ("Tile", {"n": whole(1, 2, 1, 2)}, {}),
    "expand": ("Expand", {"s": whole(3, 4, 9, 10)}, {}),
    "squeeze": ("Squeeze", {"a": whole(0)}, {}),
    "unsqueeze": ("Unsqueeze", {"a": whole(0, -1)}, {}),
    "sizes": ("Shape", {}, {}),
    "lower half": ("Trilu", {"k": whole(1).reshape(())}, {"upper": 0}),
    "sum so far": ("CumSum", {"a": whole(2).reshape(())}, {}),
    "least": ("Min", {"a": weights(10), "b": weights(9, 1)}, {}),
    "no floats": ("Cast", {}, {"to": TensorProto.INT32, "before": "Exp"}),
}


@pytest.mark.parametrize(("kind", "constants", "more"), CASES.values(), ids=list(CASES))
def test_an_operator_computes_what_onnx_runtime_computes(
    kind: str, constants: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    path = graph(tmp_path / "one.onnx", kind, constants, **more)
    built = onnx_to_torch.build(path, TENSORS, 0)
    assert built.example_inputs[0].shape == (1, 4, 9, 10)
    assert torch_to_onnx.check(built, path) < 1e-5


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_blocks_of_channels_become_pixels_and_back(mode: str, tmp_path: Path) -> None:
    shape = [1, 8, 2, 4]
    path = graph(tmp_path / "a.onnx", "DepthToSpace", {}, shape=shape, blocksize=2, mode=mode)
    assert torch_to_onnx.check(onnx_to_torch.build(path, TENSORS, 0), path) < 1e-6
    path = graph(tmp_path / "b.onnx", "SpaceToDepth", {}, shape=shape, blocksize=2)
    assert torch_to_onnx.check(onnx_to_torch.build(path, TENSORS, 0), path) < 1e-6


def test_a_wrong_operator_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph(tmp_path / "one.onnx", "Conv", {"w": weights(6, 4, 3, 3)}, auto_pad="SAME_LOWER")
    monkeypatch.setattr(onnx_windows, "_pads", lambda *_: ([2, 2], [0, 0]))
    with pytest.raises(ParityError, match="off by"):
        torch_to_onnx.check(onnx_to_torch.build(path, TENSORS, 0), path)


def test_what_is_unknown_is_named_before_any_work(tmp_path: Path) -> None:
    lstm = {"w": weights(1, 8, 10), "r": weights(1, 8, 2)}
    path = graph(tmp_path / "a.onnx", "LSTM", lstm, shape=[3, 1, 10], hidden_size=2)
    with pytest.raises(UnsupportedModelError, match=r"a\.onnx has operators.*'LSTM' \(1\)"):
        onnx_to_torch.check(path)
    path = graph(tmp_path / "b.onnx", "FusedMatMul", {"w": weights(10, 2)}, domain="com.microsoft")
    with pytest.raises(UnsupportedModelError, match=r"com\.microsoft\.FusedMatMul"):
        onnx_to_torch.check(path)
    path = graph(tmp_path / "c.onnx", "MatMul", {"w": weights(10, 2).astype(np.float16)})
    with pytest.raises(UnsupportedModelError, match="float16"):
        onnx_to_torch.check(path)
    path = graph(tmp_path / "d.onnx", "Relu", {}, opset=8)
    with pytest.raises(UnsupportedModelError, match="opset 8"):
        onnx_to_torch.check(path)


def test_an_axis_of_any_size_is_named(tmp_path: Path) -> None:
    path = graph(tmp_path / "a.onnx", "Relu", {}, shape=["batch", 3, "height", 8])
    with pytest.raises(UnsupportedModelError, match=r"axis 2 of 'x' .*\(height\)"):
        onnx_to_torch.pinned(path, TENSORS, 0)
    path = graph(tmp_path / "b.onnx", "Relu", {}, shape=[None, 3])
    assert onnx_to_torch.pinned(path, TENSORS, 0) == ({"x": (1, 3)}, {"axis 0 of 'x'": 1})


def test_forms_that_only_a_run_tells_are_refused(tmp_path: Path) -> None:
    resized = {"": None, "s": np.array([1, 1, 2, 2], F)}
    path = graph(tmp_path / "a.onnx", "Resize", resized, mode="cubic")
    with pytest.raises(UnsupportedModelError, match=r"Resize .*cubic"):
        onnx_to_torch.build(path, TENSORS, 0)
    resized["s"][2] = 1.5
    path = graph(tmp_path / "c.onnx", "Resize", resized, mode="linear")
    with pytest.raises(UnsupportedModelError, match="no whole sizes"):
        onnx_to_torch.build(path, TENSORS, 0)
    path = graph(tmp_path / "b.onnx", "Dropout", {}, outputs=2)
    with pytest.raises(UnsupportedModelError, match="2 values"):
        onnx_to_torch.build(path, TENSORS, 0)


def test_gelu_is_one_operator_again_and_sizes_are_constants(tmp_path: Path) -> None:
    vit = tiny_torch.vit_folder(tmp_path / "vit")
    made = export(vit, "onnx", bits=32, fusion="none", receipt=False, out=tmp_path / "onnx")
    kinds = [node.op_type for node in onnx_graph.load(made.model_path).graph.node]
    assert kinds.count("Erf") == 2 and "Shape" in kinds
    built = onnx_to_torch.build(made.model_path, TENSORS, 0)
    left = [node.op for node, _, _ in built.module._steps]
    assert left.count("Gelu") == 2 and not {"Erf", "Shape", "ConstantOfShape"} & set(left)
    assert torch_to_onnx.check(built, made.model_path) < 1e-5
    with torch.no_grad():
        (found,) = built.module(torch.ones_like(built.example_inputs[0]))
    assert found.shape == (1, len(tiny_torch.LABELS))
