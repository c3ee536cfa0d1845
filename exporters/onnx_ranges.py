"""Ranges of activations from what samples show: the whole, without the rarest, or the part whose
rounding loses least.

Knows histograms and four ways to cut them; never which operators will use a range, and no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from edgekit.exporters import onnx_graph, ort_quantization

Feeds = Sequence[Mapping[str, Any]]
Range = tuple[float, float]
_BINS = 2048
_LEVELS = 256
_VALUES = 1 << 14  # of a tensor and sample that are counted
_RARE = 1e-4  # of all values, half of them at either end
_SHRINKS = np.linspace(1.0, 0.2, 41)  # parts of an end that are tried


@dataclass(frozen=True)
class Histogram:
    """How often values were seen between ``low`` and ``high``, in bins of one width; 0 lies within
    these ends.
    """

    low: float
    high: float
    counts: Any

    @property
    def centres(self) -> Any:
        width = (self.high - self.low) / len(self.counts)
        return self.low + width * (np.arange(len(self.counts)) + 0.5)


def watch(path: Path, samples: Feeds) -> dict[str, Histogram]:
    """Name -> what was seen of every float32 value of the graph that is computed.

    The ends are those of all values, the counts those of some thousand of each sample. Shapes must
    stand in the file. Raises what the engine raises.
    """
    model = onnx_graph.load(path)
    names = _computed(model)
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in names if name not in known
    )
    inputs = {value.name for value in model.graph.input}
    made = [name for name in names if name not in inputs]
    engine = ort_quantization.session(model)

    def values(sample: Mapping[str, Any]) -> Mapping[str, Any]:
        found = dict(zip(made, engine.run(made, dict(sample)), strict=True))
        return found | {name: sample[name] for name in names if name in inputs}

    ends: dict[str, Range] = {}
    for sample in samples:
        for name, value in values(sample).items():
            if value.size:
                low, high = ends.get(name, (0.0, 0.0))
                ends[name] = min(low, float(value.min())), max(high, float(value.max()))
    counts = {name: np.zeros(_BINS, np.int64) for name in ends}
    for sample in samples:
        for name, value in values(sample).items():
            if value.size:
                counts[name] += _counted(value, *ends[name])
    return {name: Histogram(*ends[name], counts[name]) for name in ends}


def _computed(model: Any) -> list[str]:
    """Inputs and values of float32."""
    graph = model.graph
    constant = {tensor.name for tensor in graph.initializer}
    values = [*graph.input, *graph.value_info, *graph.output]
    floats = {
        value.name: None
        for value in values
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name not in constant
    }
    made = {name for node in graph.node if node.op_type != "Constant" for name in node.output}
    made |= {value.name for value in graph.input}
    return [name for name in floats if name in made]


def _counted(value: Any, low: float, high: float) -> Any:
    flat = value.ravel()
    # An odd step meets every channel, whichever axis is theirs.
    some = flat[:: -(-flat.size // _VALUES) | 1]
    if high <= low:
        return np.bincount([0], [some.size], _BINS).astype(np.int64)
    bins = ((some.astype(np.float64) - low) * (_BINS / (high - low))).astype(np.int64)
    return np.bincount(np.clip(bins, 0, _BINS - 1), minlength=_BINS)


def whole(seen: Histogram) -> Range:
    """From the least value to the largest."""
    return seen.low, seen.high


def without_rare(seen: Histogram) -> Range:
    """Without one value of 20,000 at either end."""
    shares = np.cumsum(seen.counts) / max(1, seen.counts.sum())
    width = (seen.high - seen.low) / _BINS
    first = int(np.searchsorted(shares, _RARE / 2, side="right"))
    last = int(np.searchsorted(shares, 1 - _RARE / 2))
    low, high = seen.low + first * width, seen.low + (min(last, _BINS - 1) + 1) * width
    return min(0.0, low), max(0.0, high)


def least_error(seen: Histogram) -> Range:
    """The least mean squared error of rounding to 8 bits; values beyond an end become that end."""
    return _searched(seen, _squared_error)


def least_divergence(seen: Histogram) -> Range:
    """The least KL divergence between what was seen and the same on 256 levels: S. Migacz, 8-bit
    inference with TensorRT, 2017; here with both ends free.
    """
    return _searched(seen, _divergence)


# The names that manifests use -> the method.
METHODS: dict[str, Callable[[Histogram], Range]] = {
    "MinMax": whole,
    "Percentile": without_rare,
    "MSE": least_error,
    "Entropy": least_divergence,
}


def _searched(seen: Histogram, cost: Callable[[Histogram, float, float], float]) -> Range:
    """Both ends drawn in alike, then each by itself."""
    if seen.high <= seen.low:
        return whole(seen)
    both = [(seen.low * part, seen.high * part) for part in _SHRINKS]
    best = min(both, key=lambda ends: cost(seen, *ends))
    if seen.low < 0 < seen.high:
        best = min(
            [(seen.low * part, best[1]) for part in _SHRINKS], key=lambda ends: cost(seen, *ends)
        )
        best = min(
            [(best[0], seen.high * part) for part in _SHRINKS], key=lambda ends: cost(seen, *ends)
        )
    return best


def _squared_error(seen: Histogram, low: float, high: float) -> float:
    step = max(1e-30, (high - low) / (_LEVELS - 1))
    zero = np.rint(-low / step)
    rounded = (np.clip(np.rint(seen.centres / step) + zero, 0, _LEVELS - 1) - zero) * step
    return float(seen.counts @ (rounded - seen.centres) ** 2)


def _divergence(seen: Histogram, low: float, high: float) -> float:
    """KL of the counts, those beyond an end added to its bin, from the same counts spread evenly
    over those bins of each level that hold any.
    """
    step = max(1e-30, (high - low) / (_LEVELS - 1))
    levels = np.clip(np.rint((seen.centres - low) / step), 0, _LEVELS - 1).astype(np.int64)
    inside = (seen.centres >= low) & (seen.centres <= high)
    if not inside.any():
        return float("inf")
    first, last = np.flatnonzero(inside)[[0, -1]]
    kept = np.where(inside, seen.counts, 0).astype(np.float64)
    clipped = kept.copy()
    clipped[first] += seen.counts[:first].sum()
    clipped[last] += seen.counts[last + 1 :].sum()
    filled = kept > 0
    sums = np.bincount(levels, kept, _LEVELS)
    places = np.bincount(levels, filled, _LEVELS)
    spread = np.where(filled, (sums / np.maximum(1, places))[levels], 0)
    # A bin that only what was cut off fills is one that the levels know nothing of.
    share, other = clipped / max(1.0, clipped.sum()), spread / max(1.0, spread.sum())
    some = share > 0
    return float((share[some] * np.log(share[some] / np.maximum(1e-9, other[some]))).sum())
