"""Equalization changes no answer, makes 8 bits cost less, and leaves what bounds a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_cnn
from onnx import helper, numpy_helper

from edgekit.exporter import no_progress
from edgekit.exporters import onnx_equalization, onnx_moved, onnx_quantizer

_SCALES = np.logspace(-2, 2, tiny_cnn.CHANNELS).astype(np.float32)
_RELU, _LEAKY = ("Relu", {}), ("LeakyRelu", {"alpha": 0.1})
_POOL = ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]})


@pytest.mark.parametrize("between", [(), (_RELU,), (_LEAKY,), (_RELU, _POOL)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_the_function_stays_the_same(between: tuple[Any, ...], depthwise: bool) -> None:
    plain, equal = (tiny_cnn.chain(*between, scales=_SCALES, depthwise=depthwise) for _ in range(2))
    assert onnx_equalization.apply(equal) == 1
    for feed in tiny_cnn.samples(3):
        wanted = tiny_cnn.run(plain, feed)
        np.testing.assert_allclose(tiny_cnn.run(equal, feed), wanted, rtol=1e-3, atol=1e-3)
    ranges = [np.abs(each).max((1, 2, 3)) for each in (_weights(plain), _weights(equal))]
    spread = [each.max() / each.min() for each in ranges]
    assert spread[1] < 0.1 * spread[0]


@pytest.mark.parametrize("between", [(), (_RELU, _POOL)])
def test_scaled_values_have_names_of_their_own(between: tuple[Any, ...]) -> None:
    """Or explaining a loss compares them with what they were, and calls the factors one."""
    plain, equal = (tiny_cnn.chain(*between, scales=_SCALES) for _ in range(2))
    onnx_equalization.apply(equal)
    (feed,) = tiny_cnn.samples(1)
    assert onnx_moved.between(plain, equal, feed) == set()
    moved = [n for node in equal.graph.node for n in node.output if n.endswith(".moved")]
    assert len(moved) == 1 + len(between)
    assert [each.name for each in equal.graph.output] == [each.name for each in plain.graph.output]


def _weights(model: Any) -> Any:
    """Of the first convolution."""
    (node,) = (each for each in model.graph.node if each.name == "one")
    (found,) = (each for each in model.graph.initializer if each.name == node.input[1])
    return numpy_helper.to_array(found)


def test_channels_of_unlike_ranges_cost_less_in_8_bits(tmp_path: Path) -> None:
    onnx.save(tiny_cnn.chain(_RELU, scales=_SCALES), str(tmp_path / "m.onnx"))
    facts = onnx_quantizer.quantize(
        tmp_path / "m.onnx",
        tmp_path / "q.onnx",
        "static_wi8_ai8",
        samples=tiny_cnn.samples(24),
        progress=no_progress,
    )
    assert facts["equalized"]
    without = min(loss for name, loss in facts["tried"].items() if "equalized" not in name)
    assert facts["calibration_loss"] < 0.2 * without


@pytest.mark.parametrize(
    "between",
    [[("Clip", {})], [("Sigmoid", {})], [("Relu", {}), ("Softmax", {"axis": 1})]],
    ids=["bounded", "bent", "across channels"],
)
def test_what_lets_no_factor_through_stays(between: list[Any]) -> None:
    model = tiny_cnn.chain(*between, scales=_SCALES)
    if between[0][0] == "Clip":
        for name, value in (("low", 0.0), ("high", 6.0)):
            array = np.array(value, np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, name))
            model.graph.node[1].input.append(name)
    before = model.SerializeToString()
    assert onnx_equalization.apply(model) == 0 and model.SerializeToString() == before


def test_a_value_that_others_read_stays() -> None:
    model = tiny_cnn.chain(_RELU, scales=_SCALES)
    model.graph.node.append(helper.make_node("Neg", ["between0"], ["seen"]))
    model.graph.output.append(helper.make_empty_tensor_value_info("seen"))
    assert onnx_equalization.apply(model) == 0
    shared = tiny_cnn.chain(_RELU, scales=_SCALES)
    shared.graph.output.append(helper.make_empty_tensor_value_info("between0"))
    assert onnx_equalization.apply(shared) == 0


def test_a_dead_channel_is_left_as_it_is() -> None:
    scales = _SCALES.copy()
    plain = tiny_cnn.chain(_RELU, scales=scales)
    for tensor in plain.graph.initializer:
        if tensor.name == "one.w":
            array = numpy_helper.to_array(tensor).copy()
            array[3] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, "one.w"))
    equal = type(plain).FromString(plain.SerializeToString())
    assert onnx_equalization.apply(equal) == 1
    feed = tiny_cnn.samples(1)[0]
    found = tiny_cnn.run(equal, feed)
    np.testing.assert_allclose(found, tiny_cnn.run(plain, feed), rtol=1e-3, atol=1e-3)
