"""Each way to find a range keeps what it promises, and helps where the whole range hurts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_cnn
from onnx import shape_inference

from edgekit.exporters import onnx_ranges
from edgekit.exporters.onnx_ranges import METHODS, Histogram


def _histogram(values: Any) -> Histogram:
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    counts, _ = np.histogram(values, 2048, (low, high))
    return Histogram(low, high, counts)


def _rounded(values: Any, low: float, high: float) -> Any:
    step = (high - low) / 255
    zero = np.rint(-low / step)
    return (np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step


def _error(values: Any, ends: tuple[float, float]) -> float:
    return float(((_rounded(values, *ends) - values) ** 2).mean())


@pytest.fixture
def outliers() -> Any:
    """A bell, and one value of 50,000 far outside."""
    values = np.random.default_rng(0).standard_normal(200_000)
    values[::50_000] = 20.0
    return values


@pytest.mark.parametrize("method", ["Percentile", "Entropy"])
def test_outliers_do_not_spoil_the_rest(outliers: Any, method: str) -> None:
    low, high = METHODS[method](_histogram(outliers))
    assert -6 < low < -2 and 2 < high < 12
    most = np.abs(outliers) < 6
    whole = METHODS["MinMax"](_histogram(outliers))
    assert _error(outliers[most], (low, high)) < 0.5 * _error(outliers[most], whole)


def test_the_least_error_is_no_larger_than_any_others(outliers: Any) -> None:
    tails = np.random.default_rng(0).laplace(size=100_000)
    for values in (outliers, np.maximum(outliers, 0), outliers[outliers < 19] + 2, tails):
        seen = _histogram(values)
        errors = {name: _error(values, method(seen)) for name, method in METHODS.items()}
        assert errors["MSE"] <= 1.02 * min(errors.values()), errors
    assert errors["MSE"] < 0.9 * errors["MinMax"]  # of long tails


@pytest.mark.parametrize("method", METHODS)
def test_an_even_spread_keeps_nearly_all_of_its_range(method: str) -> None:
    values = np.random.default_rng(0).uniform(-1, 3, 100_000)
    low, high = METHODS[method](_histogram(values))
    assert -1 <= low < -0.9 and 2.8 < high <= 3.001


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [[0.0], [2.0], [-3.0, -2.0], [0.0, 1e-12], [1e30, 1.0]])
def test_odd_values_have_a_range_with_0_in_it(method: str, values: list[float]) -> None:
    low, high = METHODS[method](_histogram(np.array(values)))
    assert low <= 0 <= high and np.isfinite([low, high]).all()


def test_every_computed_value_is_watched(tmp_path: Path) -> None:
    model = shape_inference.infer_shapes(tiny_cnn.chain(("Relu", {})))
    onnx.save(model, str(tmp_path / "m.onnx"))
    samples = tiny_cnn.samples(3)
    seen = onnx_ranges.watch(tmp_path / "m.onnx", samples)
    assert set(seen) == {"x", "one", "between0", "two"}
    values = np.concatenate([feed["x"].ravel() for feed in samples])
    assert seen["x"].low == values.min() and seen["x"].high == values.max()
    assert seen["between0"].low == 0 and seen["one"].low < 0
    counted = seen["x"].counts / seen["x"].counts.sum()
    exact, _ = np.histogram(values, 2048, (values.min(), values.max()))
    assert np.abs(np.cumsum(counted) - np.cumsum(exact / exact.sum())).max() < 0.01
