"""Static int8 for models of matrix products: ranges for the inputs of those, and of nothing else.

All else stays float, which engines fuse around int8 products. Outliers are smoothed first
(``onnx_smoothing``), each range is searched for the product that loses least, and the products that
lose most get no range: there an engine rounds in every run, or not at all. The products inside
attention (``onnx_attention``) are in 8 bits as far as the answers allow. Decides by samples; never
writes a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper

from edgekit.errors import ExportError
from edgekit.exporter import Progress
from edgekit.exporters import onnx_attention, onnx_channels, onnx_smoothing
from edgekit.exporters.onnx_graph import Graph, attribute

Feeds = Sequence[Mapping[str, Any]]
_TOP = 255
_WEIGHT_BITS = 8
_ROWS = 512  # of an input, that its range is searched on
_SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # parts of the whole range that are tried
_TRIALS = 16  # samples that the whole model is judged on
# Parts of all products that are left without a range, the fewest first.
_LEFT_OUT = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5)
# 1 - cosine of the answers: so much may static ranges cost, or this much beyond the weights' own.
_MAY_COST, _MAY_ADD = 0.0025, 0.001


@dataclass(frozen=True)
class _Range:
    """Of one input: w = scale (q - zero) without a sign; ``loss`` is what rounding to it costs its
    products, as a share of their squares.
    """

    scale: float
    zero: int
    loss: float


def apply(
    model: Any, samples: Feeds, kept: set[str], progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """The quantized model, and facts for the manifest. ``kept`` are names of nodes that stay float.

    Raises ExportError without samples.
    """
    if not samples:
        raise ExportError("static quantization needs samples")
    trials = list(samples[:_TRIALS])
    wanted = _answers(model, trials)
    steps = len(_LEFT_OUT) + 2
    progress("calibrate", 0, steps)
    smoothed = onnx_smoothing.apply(model, samples, kept, _WEIGHT_BITS, one_range=True)
    progress("calibrate", 1, steps)
    ranges = _ranges(model, samples, kept)
    ends = onnx_attention.largest(model, samples)
    found = weights_alone = _quantized(model, {}, kept)
    floor = _loss(wanted, _answers(weights_alone, trials))
    loss, chosen = floor, dict[str, _Range]()
    limit = max(_MAY_COST, floor + _MAY_ADD)
    worst = sorted(ranges, key=lambda name: -ranges[name].loss)
    for number, share in enumerate(_LEFT_OUT):
        progress("calibrate", number + 2, steps)
        some = {name: ranges[name] for name in worst[round(share * len(worst)) :]}
        tried = _quantized(model, some, kept)
        cost = _loss(wanted, _answers(tried, trials))
        if cost <= limit:
            found, loss, chosen = tried, cost, some
            break
    inside = 0
    for values in (True, False) if ends else ():
        tried = _quantized(model, chosen, kept)
        graph = Graph(tried)
        count = onnx_attention.insert(graph, ends, values=values)
        graph.finish()
        cost = _loss(wanted, _answers(tried, trials))
        if cost <= limit:
            found, loss, inside = tried, cost, count
            break
    progress("calibrate", steps, steps)
    return found, {
        "smoothed": smoothed,
        "static_inputs": len(chosen),
        "inputs_without_range": len(ranges) - len(chosen),
        "inputs_inside_attention": inside,
        "calibration_loss": float(f"{loss:.6g}"),
    }


def _ranges(model: Any, samples: Feeds, kept: set[str]) -> dict[str, _Range]:
    """Input of a product -> its best range."""
    graph = Graph(model)
    takers: dict[str, list[Any]] = {}
    for node in onnx_channels.products(graph, kept):
        if not attribute(node, "transA", 0) and graph.constant(node.input[0]) is None:
            takers.setdefault(node.input[0], []).append(node)
    if not takers:
        return {}
    rows, _ = onnx_smoothing.watched(model, samples, list(takers))
    found = {}
    for name, nodes in takers.items():
        seen = np.concatenate(rows[name])
        weights = []
        for node in nodes:
            weight = graph.constant(node.input[1])
            weights.append(weight.T if attribute(node, "transB", 0) else weight)
        found[name] = _best(seen, np.concatenate(weights, axis=1))
    return found


def _best(seen: Any, weights: Any) -> _Range:
    """``seen`` float32 [rows, inputs], ``weights`` float32 [inputs, outputs]."""
    low, high = min(0.0, float(seen.min())), max(0.0, float(seen.max()))
    rows = seen[:: -(-len(seen) // _ROWS)]
    # |E W|^2 for an error E of the inputs, without multiplying by all outputs each time.
    gram = weights @ weights.T
    total = max(1e-30, float(np.einsum("ri,ij,rj->", rows, gram, rows, optimize=True)))
    best = None
    for shrink in _SHRINKS:
        scale = max(1e-12, (high - low) * shrink / _TOP)
        zero = int(np.clip(round(-low * shrink / scale), 0, _TOP))
        rounded = (np.clip(np.rint(rows / scale) + zero, 0, _TOP) - zero) * scale
        error = (rounded - rows).astype(np.float32)
        loss = float(np.einsum("ri,ij,rj->", error, gram, error, optimize=True)) / total
        if best is None or loss < best.loss:
            best = _Range(scale, zero, loss)
    assert best is not None
    return best


def _quantized(model: Any, ranges: Mapping[str, _Range], kept: set[str]) -> Any:
    """A copy with int8 weights everywhere, and ranges where there are some."""
    copy = type(model).FromString(model.SerializeToString())
    graph = Graph(copy)
    nodes = onnx_channels.products(graph, kept)
    names = {node.name for node in nodes if node.input[0] in ranges}
    for name, chosen in ranges.items():
        first = next(node for node in graph.nodes if node.name in names and node.input[0] == name)
        scale = graph.add_constant(f"{name}.scale", np.array(chosen.scale, np.float32))
        zero = graph.add_constant(f"{name}.zero", np.array(chosen.zero, np.uint8))
        ends = [name, f"{name}.int8", f"{name}.ranged"]
        pair = [
            helper.make_node(kind, [source, scale, zero], [target], f"{name}.{kind}")
            for kind, source, target in (
                ("QuantizeLinear", ends[0], ends[1]),
                ("DequantizeLinear", ends[1], ends[2]),
            )
        ]
        graph.replace([first], [*pair, first])
        for node in graph.nodes:
            if node.name in names and node.input[0] == name:
                node.input[0] = ends[2]
    onnx_channels.apply(graph, kept)
    return copy


def _answers(model: Any, feeds: Feeds) -> list[Any]:
    """The first output of every sample, flat."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [session.run(None, dict(feed))[0].astype(np.float64).ravel() for feed in feeds]


def _loss(wanted: list[Any], found: list[Any]) -> float:
    """1 less the mean cosine."""
    cosines = [
        float(a @ b) / max(1e-30, float(np.linalg.norm(a) * np.linalg.norm(b)))
        for a, b in zip(wanted, found, strict=True)
    ]
    return 1 - sum(cosines) / len(cosines)
