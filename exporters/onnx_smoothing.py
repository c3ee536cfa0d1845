"""Smooths the inputs of matrix products before they are quantized: outliers move into the weights.

A channel that is divided by a factor, and its row of weights multiplied by it, leaves the product
as it was, but a range of 8 bits then fits the channels better. SmoothQuant, section 4
(https://arxiv.org/abs/2211.10438); unlike there, the strength is searched for each product, and
where the division cannot be folded into the layer before (a residual reads it too) it stays an
operator, which costs little beside the product. Decides by samples; never writes a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper

from edgekit.exporters import ort_quantization
from edgekit.exporters.onnx_graph import Graph

Feeds = Sequence[Mapping[str, Any]]
_STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_SAMPLES, _ROWS = 16, 128  # of each input: what a strength is judged on
_MOST_ROWS, _FEWER = 2048, 64  # in all and of a sample, where the tokens that pad are left out
_GAIN = 0.9  # of the error must be left at most, or the product stays as it is
_TINY = 1e-6


def apply(model: Any, samples: Feeds, kept: set[str], weight_bits: int) -> int:
    """Change ``model`` in place; how many inputs were smoothed.

    ``kept`` are names of nodes that stay float, ``weight_bits`` those of a weight.
    """
    graph = Graph(model)
    groups = groups_of(graph, kept)
    if not groups or not samples:
        return 0
    rows, ends = watched(model, samples, list(groups))
    changed = 0
    for name, nodes in groups.items():
        weights = [graph.constant(node.input[1]) for node in nodes]
        low, high = ends[name]
        largest = np.maximum(_TINY, np.maximum(-low, high))
        factors = _best(rows[name], largest, weights, weight_bits)
        if factors is None:
            continue
        _insert(graph, name, nodes, weights, factors)
        changed += 1
    graph.finish()
    return changed


def groups_of(graph: Graph, kept: set[str]) -> dict[str, list[Any]]:
    """Input -> the products of it with constant weights that nobody else reads."""
    found: dict[str, list[Any]] = {}
    for node in graph.nodes:
        if node.op_type != "MatMul" or node.name in kept:
            continue
        weights = graph.constant(node.input[1])
        alone = len(graph.takers[node.input[1]]) == 1
        if weights is not None and weights.ndim == 2 and alone:
            found.setdefault(node.input[0], []).append(node)
    return {name: nodes for name, nodes in found.items() if graph.constant(name) is None}


def watched(
    model: Any, samples: Feeds, names: list[str], *, padding: bool = True
) -> tuple[dict[str, list[Any]], dict[str, tuple[Any, Any]]]:
    """Input -> of some samples its rows, float32 [rows, channels]; and over all samples the least
    and the largest value of each channel, for a single token may hold it. Without ``padding`` only
    of tokens that are no padding.
    """
    copy = type(model).FromString(model.SerializeToString())
    known = {value.name for value in copy.graph.output}
    for name in names:
        if name not in known:
            copy.graph.output.append(helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        copy.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    rows: dict[str, list[Any]] = {name: [] for name in names}
    ends: dict[str, tuple[Any, Any]] = {}
    most = _ROWS if padding else _FEWER
    for number, feed in enumerate(samples):
        for name, value in zip(names, session.run(names, dict(feed)), strict=True):
            flat = ort_quantization.rows(value, {} if padding else feed)
            if not len(flat):
                continue
            here = flat.min(0), flat.max(0)
            low, high = ends.get(name, here)
            ends[name] = np.minimum(low, here[0]), np.maximum(high, here[1])
            full = number >= _SAMPLES if padding else sum(map(len, rows[name])) >= _MOST_ROWS
            if not full:
                rows[name].append(flat[:: -(-len(flat) // most)].astype(np.float32))
    return rows, ends


def _best(rows: list[Any], largest: Any, weights: list[Any], weight_bits: int) -> Any:
    """The factors that leave the least error; None where none is much better than nothing."""
    heaviest = np.maximum(_TINY, np.max([np.abs(each).max(1) for each in weights], axis=0))
    wanted = [[each @ weight for weight in weights] for each in rows]

    def error(factors: Any) -> float:
        scaled = [_rounded_weights(weight * factors[:, None], weight_bits) for weight in weights]
        inputs = [_rounded_inputs(each / factors) for each in rows]
        return sum(
            float(((each @ weight - truth) ** 2).sum())
            for each, truths in zip(inputs, wanted, strict=True)
            for weight, truth in zip(scaled, truths, strict=True)
        )

    best, least = None, _GAIN * error(np.ones_like(largest))
    for strength in _STRENGTHS:
        factors = largest**strength / heaviest ** (1 - strength)
        factors = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
        found = error(factors)
        if found < least:
            best, least = factors, found
    return best


def _rounded_inputs(values: Any) -> Any:
    """As a run does it: 8 bits without a sign, one range for all, with 0 in it."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    step = max(_TINY, (high - low) / 255)
    zero = np.round(-low / step)
    return (np.clip(np.round(values / step) + zero, 0, 255) - zero) * step


def _rounded_weights(values: Any, bits: int) -> Any:
    """Symmetric, a range for each column."""
    step = np.maximum(_TINY, np.abs(values).max(0) / (2 ** (bits - 1) - 1))
    return np.round(values / step) * step


def _insert(graph: Graph, name: str, nodes: list[Any], weights: list[Any], factors: Any) -> None:
    smooth = f"{name}_smooth"
    graph.add_constant(f"{smooth}_factors", (1 / factors).astype(np.float32))
    scale = helper.make_node("Mul", [name, f"{smooth}_factors"], [smooth], name=smooth)
    graph.replace([nodes[0]], [scale, nodes[0]])
    for node, weight in zip(nodes, weights, strict=True):
        node.input[0] = smooth
        node.input[1] = graph.add_constant(f"{node.input[1]}_smooth", weight * factors[:, None])
