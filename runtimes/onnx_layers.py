"""What each operator of an ONNX file makes, and how much another file of the model loses of it.

Knows the engine and the names of values; never how a file was made, and it writes none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgekit.errors import InferenceError, UsageError
from edgekit.exporter import Progress
from edgekit.formats import onnx
from edgekit.tensor_figures import LayerLoss, LayerLosses

# Protobuf tags of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto: a model's graph, a
# graph's output, a value's name.
_GRAPH, _OUTPUT, _NAME = b"\x3a", b"\x62", b"\x0a"
_EQUAL_DB = 150.0  # beyond what float32 can tell
_ROUNDING_DB = 100.0  # other kernels add up in another order
_SOUND_DB = 30.0  # of a value before any loss: what 8 bits cost at most in sound layers
BREAK_DB = 6.0  # lost in one layer: twice the error's amplitude


def losses(
    product: Path, reference: Path, feeds: Sequence[Mapping[str, Any]], progress: Progress
) -> LayerLosses:
    """Compare every value that both graphs make, on ``feeds``.

    Raises UsageError where they share none but their outputs, InferenceError when the engine fails.
    """
    mine, theirs = onnx.read(product), onnx.read(reference)
    makers = {name: node for node in theirs.nodes for name in node.outputs if name}
    order = [name for node in mine.nodes for name in node.outputs if name in makers]
    if not order:
        raise UsageError(f"{product.name} and {reference.name} share no value inside")
    powers = dict.fromkeys(order, 0.0)
    errors = dict.fromkeys(order, 0.0)
    sides = [Opened(path, header, order) for path, header in ((product, mine), (reference, theirs))]
    for number, feed in enumerate(feeds):
        progress("compare layers", number, len(feeds))
        ours, truths = (side.run(feed) for side in sides)
        for name, own, truth in zip(order, ours, truths, strict=True):
            if not _comparable(own, truth):
                powers.pop(name, None)
                continue
            if name in powers:
                wanted = truth.astype(np.float64)
                powers[name] += float((wanted**2).sum())
                errors[name] += float(((own - wanted) ** 2).sum())
    progress("compare layers", len(feeds), len(feeds))
    found = told(mine, makers, {name: ratio_db(powers[name], errors[name]) for name in powers})
    worst = max(found, key=lambda each: each.drop_db, default=None)
    return LayerLosses(
        samples=len(feeds),
        shared=len(found),
        whole=len(makers),
        first=worst if worst and worst.drop_db >= BREAK_DB else None,
        layers=tuple(found),
    )


def _comparable(own: Any, truth: Any) -> bool:
    arrays = isinstance(own, np.ndarray) and isinstance(truth, np.ndarray)
    return arrays and own.dtype.kind == truth.dtype.kind == "f" and own.shape == truth.shape


def ratio_db(power: float, error: float) -> float:
    """10 log10 of both sums of squares, bounded to what float32 can tell."""
    if not math.isfinite(error):
        return -_EQUAL_DB
    if error <= 0 or power <= 0:
        return _EQUAL_DB if error <= 0 else -_EQUAL_DB
    return max(-_EQUAL_DB, min(_EQUAL_DB, 10 * math.log10(power / error)))


def told(
    graph: onnx.OnnxHeader, makers: Mapping[str, onnx.OnnxNode], snr_db: Mapping[str, float]
) -> list[LayerLoss]:
    """Every value with its drop: below the worst of the values that it is made of, of which none
    counts as better than the best that anything in this graph comes to.
    """
    lossy = [value for value in snr_db.values() if value < _ROUNDING_DB]
    best = max([_SOUND_DB, *lossy])
    sources = _sources(graph, snr_db)
    found = []
    for node in graph.nodes:
        for name in node.outputs:
            if name not in snr_db:
                continue
            before = min((snr_db[each] for each in sources[name]), default=best)
            maker = makers[name]
            found.append(
                LayerLoss(
                    layer=maker.name or name,
                    op=maker.op_type,
                    tensor=name,
                    snr_db=round(snr_db[name], 2),
                    drop_db=round(max(0.0, min(before, best) - snr_db[name]), 2),
                )
            )
    return found


def _sources(graph: onnx.OnnxHeader, known: Mapping[str, float]) -> dict[str, set[str]]:
    """For every value the nearest known ones that it is made of."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:  # in an order in which each comes after what it takes
        made_of: set[str] = set()
        for name in node.inputs:
            made_of |= {name} if name in known else found.get(name, set())
        for name in node.outputs:
            found[name] = made_of
    return found


class Opened:
    """A session that gives out values from inside: the engine's own fusion is off. ``folded``: it
    computes constants when it loads the file, which some of its kernels rely on.
    """

    def __init__(
        self, path: Path, header: onnx.OnnxHeader, names: Sequence[str], *, folded: bool = False
    ) -> None:
        self._names = list(names)
        shown = {value.name for value in header.outputs}
        # Messages that follow one another are merged: the file gets further outputs.
        more = b"".join(
            _field(_OUTPUT, _field(_NAME, name.encode())) for name in names if name not in shown
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_BASIC if folded else levels.ORT_DISABLE_ALL
        )
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent.absolute())
        )
        try:
            self._session = onnxruntime.InferenceSession(
                path.read_bytes() + _field(_GRAPH, more),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,
            )
        except Exception as error:  # the engine's own kinds, which have no common base
            raise InferenceError(
                _words(f"the layers of {path.name} cannot be seen", error)
            ) from None

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        try:
            found: list[Any] = self._session.run(self._names, dict(feed))
        except Exception as error:
            raise InferenceError(_words("ONNX Runtime failed", error)) from None
        return found


def _words(what: str, error: Exception) -> str:
    return f"{what}: {' '.join(str(error).split())[:300] or type(error).__name__}"


def _field(tag: bytes, body: bytes) -> bytes:
    """A length-delimited field of protobuf."""
    size, length = len(body), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return tag + bytes([*length, size]) + body
