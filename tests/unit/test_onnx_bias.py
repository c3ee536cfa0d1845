"""Correcting biases takes away what rounding adds on average, and is dropped where it harms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tiny_cnn
from onnx import helper

from edgekit.exporter import no_progress
from edgekit.exporters import onnx_bias, onnx_quantizer, onnx_static, ort_quantization


def _coarse() -> Any:
    """Convolutions whose channels have one large weight each: all others round coarsely, and
    inputs that are mostly positive turn that into a shift.
    """
    generator = np.random.default_rng(5)
    nodes, constants, value = [], [], "x"
    for number, inputs in enumerate((3, 8, 8)):
        weights = generator.uniform(0.01, 0.4, (8, inputs, 3, 3)) / inputs
        weights[:, 0, 1, 1] = -20.0 / inputs
        node, more = tiny_cnn.convolution(f"c{number}", weights, 8 * np.ones(8), value)
        relu = helper.make_node("Relu", [f"c{number}"], [f"r{number}"], f"relu{number}")
        nodes, constants, value = [*nodes, node, relu], [*constants, *more], f"r{number}"
    return tiny_cnn.model(nodes, constants, value)


def _quantized(folder: Path, samples: Any) -> dict[str, Any]:
    onnx.save(_coarse(), str(folder / "m.onnx"))
    return onnx_quantizer.quantize(
        folder / "m.onnx",
        folder / "q.onnx",
        "static_wi8_ai8",
        samples=samples,
        progress=no_progress,
    )


def test_coarse_weights_cost_less_on_inputs_that_nobody_saw(tmp_path: Path) -> None:
    facts = _quantized(tmp_path, tiny_cnn.samples(20))  # too few for a correction
    assert not facts["biases_corrected"]
    changed = onnx_bias.apply(
        *(tmp_path / "m.onnx", tmp_path / "q.onnx", tiny_cnn.samples(16, seed=7)),
        *(tmp_path / "c.onnx", no_progress),
    )
    assert changed >= 2
    fresh = tiny_cnn.samples(16, seed=8)
    wanted, before, after = (
        ort_quantization.answers(tmp_path / name, fresh) for name in ("m.onnx", "q.onnx", "c.onnx")
    )
    loss = ort_quantization.loss
    assert loss(wanted, after) < 0.8 * loss(wanted, before)


def test_a_correction_that_harms_is_not_kept(tmp_path: Path) -> None:
    """Planted: the samples that biases are corrected on are nothing like those of the judgement."""
    usual = tiny_cnn.samples(onnx_static._TRIALS)
    odd = tiny_cnn.samples(onnx_static._CORRECTED, seed=3, mean=-30.0)
    facts = _quantized(tmp_path, [*usual, *odd])
    corrected = {name: loss for name, loss in facts["tried"].items() if "corrected" in name}
    assert len(corrected) == 1 and not facts["biases_corrected"]
    assert min(corrected.values()) > facts["calibration_loss"]


def test_the_best_of_what_was_tried_is_what_is_written(tmp_path: Path) -> None:
    samples = tiny_cnn.samples(onnx_static._TRIALS + onnx_static._CORRECTED)
    facts = _quantized(tmp_path, samples)
    tried = facts["tried"]
    assert {name.split(",")[0] for name in tried} == {"MinMax", "Percentile", "MSE", "Entropy"}
    assert facts["calibration_loss"] <= min(tried.values()) / onnx_static._WORTH
    wanted, found = (
        ort_quantization.answers(tmp_path / name, samples[: onnx_static._TRIALS])
        for name in ("m.onnx", "q.onnx")
    )
    assert abs(ort_quantization.loss(wanted, found) / facts["calibration_loss"] - 1) < 1e-3


def test_a_network_without_biases_is_quantized_all_the_same(tmp_path: Path) -> None:
    """Shifts and 1x1 convolutions have none but in the last layer, which may stay in floats."""
    generator = np.random.default_rng(6)
    weights = generator.normal(0, 0.3, (8, 3, 3, 3))
    node, constants = tiny_cnn.convolution("c", weights, np.zeros(8), "x")
    del node.input[2]
    kept = [each for each in constants if each.name in node.input]
    onnx.save(tiny_cnn.model([node], kept, "c"), str(tmp_path / "m.onnx"))
    facts = onnx_quantizer.quantize(
        *(tmp_path / "m.onnx", tmp_path / "q.onnx", "static_wi8_ai8"),
        samples=tiny_cnn.samples(onnx_static._TRIALS + 4),
        progress=no_progress,
    )
    assert any("corrected" in name for name in facts["tried"]) and not facts["biases_corrected"]
