"""The ranges of a TFLite graph's activations, measured on samples: which of them a scale covers.

Knows the engine and arrays; never a weight, or how a file is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.exporters.torch_to_tflite import Engine
from edgekit.formats import tflite

_KEPT = 2048  # values of a tensor that are kept of every sample
_LEVELS = 255  # steps of 8 bits
# Parts of the whole range that are tried: what lies beyond is cut off.
_SHARES = np.linspace(0.3, 1.0, 29)

_PERCENTILE = 99.99

Range = tuple[float, float]


@dataclass(frozen=True)
class Values:
    """Of one tensor over all samples: its bounds, and some of its values."""

    low: float
    high: float
    some: Any


def measure(path: Path, feeds: Sequence[Mapping[str, Any]]) -> dict[str, Values]:
    """The float activations of the graph at ``path``, by the names of their tensors."""
    header = tflite.read(path)
    engine = Engine(path.read_bytes(), experimental_preserve_all_tensors=True)
    wanted = {
        tensor.name: number
        for number, tensor in enumerate(header.main.tensors)
        if tensor.buffer is None and tensor.dtype == "float32"
    }
    bounds: dict[str, list[Range]] = {name: [] for name in wanted}
    some: dict[str, list[Any]] = {name: [] for name in wanted}
    for feed in feeds:
        engine.run(feed)
        for name, number in wanted.items():
            values = engine.interpreter.get_tensor(number).ravel()
            if values.size:
                bounds[name].append((float(values.min()), float(values.max())))
                some[name].append(values[:: max(1, values.size // _KEPT)])
    return {
        name: Values(
            min(low for low, _ in pairs),
            max(high for _, high in pairs),
            np.concatenate(some[name]),
        )
        for name, pairs in bounds.items()
        if pairs
    }


def whole(values: Values) -> Range:
    """From the least to the largest value."""
    return values.low, values.high


def most(values: Values) -> Range:
    """Without the rarest values."""
    low, high = np.percentile(values.some, (100 - _PERCENTILE, _PERCENTILE))
    return float(low), float(high)


def least_error(values: Values) -> Range:
    """The part of the whole range in which rounding and cutting together lose least (mean squared
    error of the values).
    """
    best, found = np.inf, whole(values)
    for share in _SHARES:
        low, high = min(0.0, share * values.low), max(0.0, share * values.high)
        scale = (high - low) / _LEVELS
        if scale <= 0:
            continue
        zero = round(-low / scale)
        steps = np.clip(np.rint(values.some / scale) + zero, 0, _LEVELS) - zero
        error = float(((steps * scale - values.some) ** 2).mean())
        if error < best:
            best, found = error, (low, high)
    return found
