"""A static int8 that loses classes is warned of and can be kept out, in either format.

The fault is the stock one: ranges that one odd calibration image makes far too wide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tflite
import tiny_torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from tiny_tflite import PIXELS, SIDE

import edgekit
from edgekit import proof_tensors, sample_inputs
from edgekit.errors import GateError
from edgekit.exporter import Claim, no_progress
from edgekit.preprocess import FILE, of_image
from edgekit.receipt import Gates, Receipt

LABELS = list(tiny_torch.LABELS)
SHAPE = (1, 3, SIDE, SIDE)
STEPS = of_image(
    {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "labels": LABELS}, "pixel_values", SHAPE
)
# How many times as bright as the others the odd image is.
SOUND, ODD = 1.0, 24.0


def _weights() -> tuple[Any, Any]:
    """Those of ``tiny_tflite.dense``."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.05, (10, PIXELS)).astype(np.float32)
    return weights, rng.normal(0, 0.1, 10).astype(np.float32)


def _calibration(brightness: float) -> list[Any]:
    """Images to find ranges by, the last one so many times as bright."""
    found = sample_inputs.samples(
        STEPS, [], folder=None, data=None, count=16, part="calibration"
    ).feeds
    images = [feed["pixel_values"] for feed in found]
    return [*images[:-1], images[-1] * np.float32(brightness)]


def _onnx(path: Path) -> None:
    """The classifier in float."""
    weights, bias = _weights()
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", *SHAPE[1:]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def _stock_onnx(source: Path, path: Path, brightness: float) -> None:
    """onnxruntime's own static int8, with its defaults."""

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(_calibration(brightness))

        def get_next(self) -> Any:
            image = next(self._left, None)
            return None if image is None else {"pixel_values": image}

    quantize_static(source, path, Images(), quant_format=QuantFormat.QDQ)


def _stock_tflite(path: Path, brightness: float) -> None:
    """Both ends and the product in int8, by the least and the largest value seen."""
    weights, bias = _weights()
    images = np.concatenate(_calibration(brightness)).reshape(-1, PIXELS)
    grids = _grid(images), _grid(images @ weights.T + bias)
    path.write_bytes(tiny_tflite.static(weights, bias, *grids))


def _grid(values: Any) -> tuple[float, int]:
    """Scale and zero point of int8 over a range."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = (high - low) / 255
    return scale, round(-128 - low / scale)


def _proved(folder: Path, format: str, brightness: float) -> Receipt:
    made = {name: folder / name / f"model.{format}" for name in ("float", "int8")}
    for path in made.values():
        path.parent.mkdir()
        (path.parent / FILE).write_bytes(STEPS.to_bytes())
    origin = made["float"].with_suffix(".onnx")
    _onnx(origin)
    if format == "onnx":
        _stock_onnx(origin, made["int8"], brightness)
    else:
        made["float"].write_bytes(tiny_tflite.dense("pixel_values", "logits"))
        _stock_tflite(made["int8"], brightness)
    claim = Claim(edgekit.source(origin), made["int8"], (), made["float"], 0)
    return proof_tensors.prove(claim, no_progress)


@pytest.mark.parametrize("format", ["onnx", "tflite"])
def test_a_static_int8_that_loses_classes_is_warned_of_and_stopped(
    format: str, tmp_path: Path
) -> None:
    found = _proved(tmp_path, format, ODD)
    assert found.status == "proven"  # its cosine is what 8 bits may cost: no other figure tells
    assert found.agreement and found.agreement.top1
    share = found.agreement.top1.value
    assert 0.3 < share < 0.9
    assert f"only {share:.0%} of the inputs keep their class" in found.warnings
    with pytest.raises(GateError, match=r"same top-1 .* below --min-top1 0\.9"):
        Gates(min_top1=0.9).check(found, 1)


@pytest.mark.parametrize("format", ["onnx", "tflite"])
def test_one_that_keeps_them_passes_without_a_word(format: str, tmp_path: Path) -> None:
    found = _proved(tmp_path, format, SOUND)
    assert not [text for text in found.warnings if "class" in text]
    Gates(min_top1=0.9).check(found, 1)
