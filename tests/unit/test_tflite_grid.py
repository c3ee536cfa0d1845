"""Levels and steps that training left reach a TFLite file as they are, and LiteRT reads them so."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
import tiny_tflite
from tiny_tflite import flatbuffers, schema

import edgekit
from edgekit.errors import ExportError, RecipeError
from edgekit.exporters import tflite_grid

PIXELS = tiny_tflite.PIXELS


def on_grid() -> Any:
    """float32 [10, pixels]: rows of all sixteen levels, of some far from each other, of one level,
    of none, and of steps so small that their differences are nearly nothing.
    """
    rng = np.random.default_rng(3)
    levels = rng.integers(-8, 8, (10, PIXELS))
    levels[1] = rng.choice([-8, 0, 2, 5], PIXELS)
    levels[2] = 3
    levels[3] = 0
    steps = np.exp(rng.normal(-4, 1, (10, 1)))
    steps[4] = 1e-7
    return (levels * steps).astype(np.float32)


def changed(raw: bytes, weights: Any, *, four_bits: bool) -> bytes:
    """The file with these weights, or with room for 4 bits of them that nobody filled."""
    model = schema.ModelT.InitFromPackedBuf(raw, 0)
    (tensor,) = [t for t in model.subgraphs[0].tensors if t.name == b"weights"]
    buffer = model.buffers[tensor.buffer]
    buffer.data = np.frombuffer(weights.tobytes(), np.uint8)
    if four_bits:
        tensor.type = schema.TensorType.INT4
        buffer.data = np.zeros(weights.size // 2, np.uint8)
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale = np.ones(len(weights), np.float32)
        tensor.quantization.zeroPoint = np.zeros(len(weights), np.int64)
        tensor.quantization.quantizedDimension = 0
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def answers(raw: bytes, folder: Path, image: Any) -> Any:
    path = folder / "model.tflite"
    path.write_bytes(raw)
    with edgekit.load(path, n_threads=1) as session:
        return session.run({"input": image})["output"]


def test_the_engine_multiplies_by_the_very_weights_that_lay_on_the_grid(tmp_path: Path) -> None:
    weights = on_grid()
    source = tmp_path / "float.tflite"
    source.write_bytes(changed(tiny_tflite.dense(), weights, four_bits=False))
    asked: list[Set[str]] = []

    def quantized(floats: Set[str]) -> bytes:
        asked.append(floats)
        return changed(tiny_tflite.dense(), weights, four_bits=True)

    made, facts = tflite_grid.write(source, set(), quantized)
    assert facts == {"matrices": 1, "kept_float": []} and asked == [set()]
    # The kernel has 255 steps from the least to the largest input: both ends lose nothing.
    image = np.random.default_rng(0).choice([0.0, 1.0], (1, 3, tiny_tflite.SIDE, tiny_tflite.SIDE))
    wanted = answers(source.read_bytes(), tmp_path, image.astype(np.float32))
    found = answers(made, tmp_path, image.astype(np.float32))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_lies_between_the_levels_stays_float(tmp_path: Path) -> None:
    weights = on_grid()
    weights[7, :9] *= 1.01
    source = tmp_path / "float.tflite"
    source.write_bytes(changed(tiny_tflite.dense(), weights, four_bits=False))
    with pytest.raises(RecipeError, match=r"no matrix .* grid"):
        tflite_grid.write(source, set(), lambda floats: b"")


def test_another_form_than_asked_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "float.tflite"
    raw = changed(tiny_tflite.dense(), on_grid(), four_bits=False)
    source.write_bytes(raw)
    with pytest.raises(ExportError, match="no 4 bits for weights"):
        tflite_grid.write(source, set(), lambda floats: raw)
