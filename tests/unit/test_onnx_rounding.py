"""Rounding that knows its inputs keeps products better than rounding to the nearest."""

from __future__ import annotations

import numpy as np

from edgekit.exporters import onnx_channels, onnx_rounding

_INPUTS, _OUTPUTS = 96, 40


def test_products_keep_more_where_some_inputs_are_large() -> None:
    generator = np.random.default_rng(0)
    mixed = generator.standard_normal((_INPUTS, _INPUTS)).astype(np.float32) / 4
    mixed += np.eye(_INPUTS, dtype=np.float32)
    spread = np.exp(1.5 * generator.standard_normal(_INPUTS)).astype(np.float32)
    rows = (generator.standard_normal((600, _INPUTS)).astype(np.float32) @ mixed) * spread
    weights = generator.standard_normal((_INPUTS, _OUTPUTS)).astype(np.float32)
    fitted, others = rows[:500], rows[500:]
    errors = []
    for quantized, scales in (
        onnx_channels.quantize_channels(weights, 1),
        onnx_rounding.fit(weights, fitted),
    ):
        assert quantized.dtype == np.int8 and quantized.shape == weights.shape
        assert scales.dtype == np.float32 and scales.shape == (_OUTPUTS,)
        errors.append(float(((others @ (quantized * scales - weights)) ** 2).sum()))
    assert errors[1] < 0.75 * errors[0]


def test_a_column_of_nothing_and_inputs_that_never_come_are_taken() -> None:
    weights = np.random.default_rng(1).standard_normal((_INPUTS, _OUTPUTS)).astype(np.float32)
    weights[:, 3] = 0
    rows = np.zeros((4, _INPUTS), np.float32)
    rows[:, :5] = 1
    for given in (rows, np.zeros_like(rows)):
        quantized, scales = onnx_rounding.fit(weights, given)
        assert not quantized[:, 3].any() and (scales > 0).all()
        off = given @ (quantized * scales - weights)
        assert np.abs(off).max() < 0.02 * np.abs(weights).max()
