"""Centres and scales the inputs of matrix products that get one range, so that every channel fills
it: (x - c) / f, with the rows of weights multiplied by f, and c W in the bias.

The product stays what it was. Scales are SmoothQuant's, section 4 (https://arxiv.org/abs/2211.10438),
centres those of Outlier Suppression+, section 4.2 (https://arxiv.org/abs/2304.09145); strength, and
whether to centre, are searched for each input. Both go into what makes the input where that is a
layer norm of nobody else, or an attention: shares add up to 1, so that what is taken from a value
is taken from every weighted sum. Elsewhere they stay operators, which engines take into rounding.
Decides by samples; never writes a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from edgekit.exporters import onnx_attention, onnx_channels, onnx_smoothing
from edgekit.exporters.onnx_graph import Graph, attribute

Feeds = Sequence[Mapping[str, Any]]
_STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_PARTS = (1.3, 1.15, 1.0, 0.85, 0.7)  # of the range seen, that a choice is judged by
_ROWS = 512  # of an input, that a choice is judged on
_GAIN = 0.9  # of the error must be left at most, or the input stays as it is
_TOP, _WEIGHT_TOP = 255, 127
# Of the median: a channel that moves less in samples may move elsewhere.
_STILL = 0.02
_TINY = 1e-6


@dataclass(frozen=True)
class _Choice:
    """float32 [channels]: what is taken off, and what the rest is divided by."""

    centre: Any
    factors: Any


def apply(model: Any, samples: Feeds, kept: set[str]) -> int:
    """Change ``model`` in place; how many inputs were centred or scaled. ``kept`` are names of
    nodes that stay float. Raises what the engine raises.
    """
    graph = Graph(model)
    groups = onnx_smoothing.groups_of(graph, kept)
    if not groups or not samples:
        return 0
    rows, ends = onnx_smoothing.watched(model, samples, list(groups), padding=False)
    values = onnx_attention.values(graph)
    changed = 0
    for name, nodes in groups.items():
        weights = np.concatenate([graph.constant(node.input[1]) for node in nodes], axis=1)
        choice = _best(np.concatenate(rows[name]), ends[name], weights)
        if choice is None:
            continue
        alone = len(graph.takers[name]) == len(nodes)
        if not (
            alone and (_into_norm(graph, name, choice) or _into_values(graph, values, name, choice))
        ):
            _insert(graph, name, nodes, choice)
        for node in nodes:
            _adapt(graph, node, choice)
        changed += 1
    graph.finish()
    return changed


def _best(rows: Any, ends: tuple[Any, Any], weights: Any) -> _Choice | None:
    """The choice of least error of the products; None where none is much better than nothing.

    ``rows`` float32 [rows, channels], ``ends`` the least and the largest of each channel over all
    samples, ``weights`` float32 [channels, outputs]. Choices are made of one half of the rows and
    judged on the other: where each channel fills the range, new values leave it more often.
    """
    half = len(rows) // 2 or 1
    seen = rows[:half].min(0), rows[:half].max(0)
    others = rows[-half:][:: -(-half // _ROWS)]
    heaviest = np.maximum(_TINY, np.abs(weights).max(1))
    root = _root(weights)
    none = _Choice(np.zeros_like(ends[0]), np.ones_like(ends[0]))
    best, least = None, _GAIN * _error(none, others, seen, weights, root)
    for centred in (False, True):
        for strength in _STRENGTHS:
            tried = _choice(seen, heaviest, strength, centred)
            found = _error(tried, others, seen, weights, root)
            if found < least:
                best, least = _choice(ends, heaviest, strength, centred), found
    return best


def _choice(ends: tuple[Any, Any], heaviest: Any, strength: float, centred: bool) -> _Choice:
    low, high = ends
    centre = (low + high) / 2 if centred else np.zeros_like(low)
    span = np.maximum(high - centre, centre - low)
    span = np.maximum(span, max(_TINY, _STILL * float(np.median(span))))
    factors = span**strength / heaviest ** (1 - strength)
    factors = factors / np.exp(np.log(factors).mean())
    return _Choice(centre.astype(np.float32), factors.astype(np.float32))


def _root(weights: Any) -> Any:
    """R with |e R| = |e W| for every e, no wider than W is high."""
    if weights.shape[1] <= weights.shape[0]:
        return weights
    lower: Any = np.linalg.qr(weights.T, mode="r")
    return lower.T


def _error(choice: _Choice, rows: Any, ends: tuple[Any, Any], weights: Any, root: Any) -> float:
    """Squares of what rounding inputs, in the best of some ranges, and weights does to products."""
    scaled = (rows - choice.centre) / choice.factors
    heavier = weights * choice.factors[:, None]
    step = np.maximum(_TINY, np.abs(heavier).max(0) / _WEIGHT_TOP)
    off = np.rint(heavier / step) * step - heavier
    low, high = [(end - choice.centre) / choice.factors for end in ends]
    least_seen, most_seen = min(0.0, float(low.min())), max(0.0, float(high.max()))
    least = np.inf
    for part in _PARTS:
        width = max(_TINY, (most_seen - least_seen) * part / _TOP)
        zero = np.rint(-least_seen * part / width)
        rounded = (np.clip(np.rint(scaled / width) + zero, 0, _TOP) - zero) * width
        least = min(least, float((((rounded - scaled) * choice.factors @ root) ** 2).sum()))
    return least + float(((scaled @ off) ** 2).sum())


def _into_norm(graph: Graph, name: str, choice: _Choice) -> bool:
    """(n s + b - c) / f for the layer norm n s + b that makes the input; whether there is one."""
    norm = graph.maker(name, "LayerNormalization")
    if norm is None or len(norm.output) > 1 or attribute(norm, "axis", -1) != -1:
        return False
    scale = graph.constant(norm.input[1])
    bias = graph.constant(norm.input[2]) if len(norm.input) > 2 else np.zeros_like(choice.centre)
    if any(each is None or each.shape != choice.factors.shape for each in (scale, bias)):
        return False
    parts = {"scale": scale / choice.factors, "bias": (bias - choice.centre) / choice.factors}
    names = [graph.add_float(f"{name}/centred/{part}", array) for part, array in parts.items()]
    del norm.input[1:]
    norm.input.extend(names)
    return True


def _into_values(graph: Graph, values: Mapping[str, str], name: str, choice: _Choice) -> bool:
    """The same for the values that the input is a weighted sum of; whether there are some."""
    found = onnx_attention.projection(graph, values.get(name, ""))
    if found is None or found.bias.shape != choice.factors.shape:
        return False
    found.change(graph, choice.centre, choice.factors)
    return True


def _insert(graph: Graph, name: str, nodes: Sequence[Any], choice: _Choice) -> None:
    """As operators of their own, before these products."""
    value, made = name, []
    for kind, array in (("Mul", 1 / choice.factors), ("Add", -choice.centre / choice.factors)):
        if kind == "Mul" or array.any():
            constant = graph.add_float(f"{name}/centred/{kind}", array)
            made.append(helper.make_node(kind, [value, constant], [f"{constant}/value"], constant))
            value = made[-1].output[0]
    graph.replace([nodes[0]], [*made, nodes[0]])
    for node in nodes:
        node.input[0] = value
    graph.keep(graph.nodes)


def _adapt(graph: Graph, node: Any, choice: _Choice) -> None:
    """The weights and the bias of a product to its changed input."""
    weights = graph.constant(node.input[1])
    node.input[1] = graph.add_float(f"{node.input[1]}/centred", weights * choice.factors[:, None])
    graph.keep(graph.nodes)
    if not choice.centre.any():
        return
    onnx_channels.add_to_bias(graph, node, choice.centre.astype(np.float64) @ weights)
