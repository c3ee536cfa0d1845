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
from edgekit.exporters import (
    onnx_attention,
    onnx_centring,
    onnx_channels,
    onnx_moved,
    onnx_rounding,
    onnx_smoothing,
    onnx_stem,
    ort_quantization,
    passes,
)
from edgekit.exporters.onnx_graph import Graph, attribute

Feeds = Sequence[Mapping[str, Any]]
_TOP = 255
_ROWS = 512  # of an input, that its range is searched on
# Parts of the whole range that are tried, on values that it was not found by.
_PARTS = (1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_TRIALS = 16  # samples that the whole model is judged on
# So much of the loss must correcting biases leave at most: a smaller gain is chance.
_WORTH = 0.98
# Parts of all products that are left without a range, the fewest first.
_LEFT_OUT = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5)
# 1 - cosine of the answers: so much may static ranges cost, or this much beyond the weights' own.
_MAY_COST, _MAY_ADD = 0.0025, 0.001
# So much may rounding queries and keys, or patches, add, and so much shares and values: those
# cost 2 of 100 neighbours of all-MiniLM-L6-v2, and hardly save time; a ViT loses less, and gains.
_MAY_ADD_INSIDE, _MAY_ADD_SHARES = 0.001, 0.0001


@dataclass(frozen=True)
class _Range:
    """Of one input: w = scale (q - zero) without a sign; ``loss`` is what rounding to it costs its
    products, as a share of their squares; ``moved``, float32 [outputs of all of them], how far
    that and rounded weights move their means.
    """

    scale: float
    zero: int
    loss: float
    moved: Any


def apply(
    model: Any, samples: Feeds, kept: set[str], progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """The quantized model, and facts for the manifest. ``kept`` are names of nodes that stay float.

    Raises ExportError without samples.
    """
    if not samples:
        raise ExportError("static quantization needs samples")
    # Nothing is fitted to these, where there are others.
    trials = list(samples[-_TRIALS:])
    samples = list(samples[:-_TRIALS]) or trials
    wanted = _answers(model, trials)
    steps = len(_LEFT_OUT) + 2
    progress("calibrate", 0, steps)
    passes.apply("identities", model)  # they hide neighbours
    before = type(model).FromString(model.SerializeToString())
    centred = onnx_centring.apply(model, samples, kept)
    onnx_attention.balance(model, samples)
    moved = onnx_moved.between(before, model, trials[0])
    progress("calibrate", 1, steps)
    ranges, fitted = _ranges(model, samples, kept)
    ends = onnx_attention.largest(model, samples)
    found = weights_alone = _quantized(model, {}, fitted, kept)
    floor = _loss(wanted, _answers(weights_alone, trials))
    loss, chosen = floor, dict[str, _Range]()
    limit = max(_MAY_COST, floor + _MAY_ADD)
    worst = sorted(ranges, key=lambda name: -ranges[name].loss)
    for number, share in enumerate(_LEFT_OUT):
        progress("calibrate", number + 2, steps)
        some = {name: ranges[name] for name in worst[round(share * len(worst)) :]}
        tried = _quantized(model, some, fitted, kept)
        cost = _loss(wanted, _answers(tried, trials))
        if cost <= limit:
            found, loss, chosen = tried, cost, some
            break
    tried = _quantized(model, chosen, fitted, kept, corrected=True)
    cost = _loss(wanted, _answers(tried, trials))
    if corrected := bool(chosen) and cost < loss * _WORTH:
        found, loss = tried, cost
    inside, outside = 0, loss
    for values in (True, False) if ends else ():
        tried = _quantized(model, chosen, fitted, kept, corrected=corrected)
        graph = Graph(tried)
        count = onnx_attention.insert(graph, ends, values=values)
        graph.finish()
        cost = _loss(wanted, _answers(tried, trials))
        more = _MAY_ADD_SHARES if values else _MAY_ADD_INSIDE
        if cost <= min(limit, outside + more):
            found, loss, inside = tried, cost, count
            break
    tried = type(found).FromString(found.SerializeToString())
    stems = onnx_stem.apply(tried, samples, kept)
    cost = _loss(wanted, _answers(tried, trials)) if stems else loss
    if stems and cost <= min(limit, loss + _MAY_ADD_INSIDE):
        found, loss = tried, cost
    else:
        stems = 0
    onnx_moved.mark(found, moved)
    progress("calibrate", steps, steps)
    return found, {
        "centred": centred,
        "static_inputs": len(chosen),
        "inputs_without_range": len(ranges) - len(chosen),
        "biases_corrected": corrected,
        "inputs_inside_attention": inside,
        "stems": stems,
        "calibration_loss": float(f"{loss:.6g}"),
    }


def _products(graph: Graph, kept: set[str]) -> list[Any]:
    """Those of a computed value with rows of inputs, and a constant matrix."""
    return [
        node
        for node in onnx_channels.products(graph, kept)
        if not attribute(node, "transA", 0) and graph.constant(node.input[0]) is None
    ]


def _ranges(
    model: Any, samples: Feeds, kept: set[str]
) -> tuple[dict[str, _Range], dict[str, tuple[Any, Any]]]:
    """Input of a product -> its best range; and node -> its weights in 8 bits and their scales."""
    graph = Graph(model)
    takers: dict[str, list[Any]] = {}
    for node in _products(graph, kept):
        takers.setdefault(node.input[0], []).append(node)
    if not takers:
        return {}, {}
    rows, _ = onnx_smoothing.watched(model, samples, list(takers), padding=False)
    found, fitted = {}, {}
    for name, nodes in takers.items():
        seen = np.concatenate(rows[name])
        weights = []
        for node in nodes:
            weight = graph.constant(node.input[1])
            weights.append(weight if _axis(node) else weight.T)
        whole = np.concatenate(weights, axis=1)
        steps, scales = onnx_rounding.fit(whole, seen)
        found[name] = _best(seen, whole, steps * scales)
        start = 0
        for node, weight in zip(nodes, weights, strict=True):
            part = slice(start, start := start + weight.shape[1])
            own = steps[:, part] if _axis(node) else steps[:, part].T
            fitted[node.name] = own, scales[part]
    return found, fitted


def _best(seen: Any, weights: Any, rounded_weights: Any) -> _Range:
    """``seen`` float32 [rows, inputs], both weights float32 [inputs, outputs]."""
    half = len(seen) // 2 or 1
    ends = [(min(0.0, float(x.min())), max(0.0, float(x.max()))) for x in (seen[:half], seen)]
    rows = seen[-half:][:: -(-half // _ROWS)]
    # |E W|^2 for an error E of the inputs, without multiplying by all outputs each time.
    gram = weights @ weights.T
    total = max(1e-30, float(((rows @ gram) * rows).sum()))
    losses = [_weighed(rows, _cut(*ends[0], part), gram) / total for part in _PARTS]
    loss = min(losses)
    scale, zero = _cut(*ends[1], _PARTS[losses.index(loss)])
    moved = _rounded(seen, scale, zero).mean(0) @ rounded_weights - seen.mean(0) @ weights
    return _Range(scale, zero, loss, moved.astype(np.float32))


def _cut(low: float, high: float, part: float) -> tuple[float, int]:
    """The scale and the zero point of a part of a range."""
    scale = max(1e-12, (high - low) * part / _TOP)
    return scale, int(np.clip(round(-low * part / scale), 0, _TOP))


def _rounded(rows: Any, scale: float, zero: int) -> Any:
    return ((np.clip(np.rint(rows / scale) + zero, 0, _TOP) - zero) * scale).astype(np.float32)


def _weighed(rows: Any, cut: tuple[float, int], gram: Any) -> float:
    """|E W|^2 of the error that rounding leaves, with W W' in ``gram``."""
    error = _rounded(rows, *cut) - rows
    return float(((error @ gram) * error).sum())


def _axis(node: Any) -> int:
    """Of the outputs in a product's weights."""
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1


def _quantized(
    model: Any,
    ranges: Mapping[str, _Range],
    fitted: Mapping[str, tuple[Any, Any]],
    kept: set[str],
    *,
    corrected: bool = False,
) -> Any:
    """A copy with int8 weights everywhere, and ranges where there are some; ``corrected`` takes
    from biases what those move on average.
    """
    copy = type(model).FromString(model.SerializeToString())
    graph = Graph(copy)
    nodes = _products(graph, kept)
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
        start = 0
        for node in [node for node in nodes if node.input[0] == name]:
            node.input[0] = ends[2]
            outputs = graph.constant(node.input[1]).shape[_axis(node)]
            if corrected and node.op_type == "MatMul":
                onnx_channels.add_to_bias(graph, node, -chosen.moved[start : start + outputs])
            start += outputs
    onnx_channels.apply(graph, kept, fitted)
    return copy


def _answers(model: Any, feeds: Feeds) -> list[Any]:
    """The first output of every sample, flat, but for what stands where a text is padded."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    found = [session.run(None, dict(feed))[0].astype(np.float64) for feed in feeds]
    return [
        ort_quantization.rows(each, feed).ravel() for each, feed in zip(found, feeds, strict=True)
    ]


def _loss(wanted: list[Any], found: list[Any]) -> float:
    """1 less the mean cosine."""
    cosines = [
        float(a @ b) / max(1e-30, float(np.linalg.norm(a) * np.linalg.norm(b)))
        for a, b in zip(wanted, found, strict=True)
    ]
    return 1 - sum(cosines) / len(cosines)
