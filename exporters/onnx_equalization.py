"""Cross-layer equalization: channels of a value between two convolutions get ranges alike.

A channel that is divided by a positive factor in one convolution, and its weights multiplied by it
in the next, leaves the answer as it was, if all in between lets factors through: Relu, LeakyRelu
and poolings do, for f(s x) = s f(x) where s > 0. With r1 and r2 the ranges of both weights of a
channel, the factor sqrt(r1 / r2) makes them equal: M. Nagel et al., Data-Free Quantization, section
4.1 (https://arxiv.org/abs/1906.04721). Must never look at a sample; an activation with a bound of
its own (ReLU6) lets no factor through, and stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.exporters import onnx_moved
from edgekit.exporters.onnx_graph import Graph, attribute

_THROUGH = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool")
_SWEEPS = 20
_SETTLED = 1e-3  # of a factor's logarithm
_MOST = 1e4  # a factor beyond is that of a channel that is dead


@dataclass(frozen=True)
class _Pair:
    """Two Conv nodes, one behind the other, and the names of the values between them."""

    first: Any
    second: Any
    between: tuple[str, ...]


def apply(model: Any) -> int:
    """Change ``model`` in place; how many pairs of convolutions were made alike. What lies between
    them is something else then, and gets names of its own.
    """
    graph = Graph(model)
    pairs = [pair for node in graph.nodes if (pair := _pair(graph, node))]
    if not pairs:
        return 0
    weights: dict[str, Any] = {}
    for pair in pairs:
        for node in (pair.first, pair.second):
            for name in node.input[1:]:
                weights.setdefault(name, graph.constant(name).astype(np.float64))
    for _ in range(_SWEEPS):
        if max(_equalize(pair, weights) for pair in pairs) < _SETTLED:
            break
    for node in {id(each): each for pair in pairs for each in (pair.first, pair.second)}.values():
        for i, name in enumerate(node.input[1:], 1):
            node.input[i] = graph.add_constant(
                f"{name}/{node.name}/equalized", weights[name].astype(np.float32)
            )
    graph.finish()
    onnx_moved.mark(model, {name for pair in pairs for name in pair.between})
    return len(pairs)


def _pair(graph: Graph, first: Any) -> _Pair | None:
    if first.op_type != "Conv" or not _own_weights(graph, first):
        return None
    value = first.output[0]
    between = [value]
    while through := graph.only_taker(value, *_THROUGH):
        value = through.output[0]
        between.append(value)
    second = graph.only_taker(value, "Conv")
    if second is None or second.input[0] != value or not _own_weights(graph, second):
        return None
    group = attribute(second, "group", 1)
    channels = graph.constant(first.input[1]).shape[0]
    return _Pair(first, second, tuple(between)) if group in (1, channels) else None


def _own_weights(graph: Graph, node: Any) -> bool:
    """Whether they are constants that nobody else reads."""
    for name in node.input[1:]:
        array = graph.constant(name)
        if array is None or array.dtype != np.float32 or len(graph.takers[name]) != 1:
            return False
    return True


def _equalize(pair: _Pair, weights: dict[str, Any]) -> float:
    """One step; the largest logarithm of a factor."""
    first, second = weights[pair.first.input[1]], weights[pair.second.input[1]]
    depthwise = attribute(pair.second, "group", 1) > 1
    # Weights are [outputs, inputs of a group, ...]: of a depthwise one each channel has its own.
    axes = tuple(range(1, second.ndim)) if depthwise else (0, *range(2, second.ndim))
    ranges = np.abs(first).max(tuple(range(1, first.ndim)))
    others = np.abs(second).max(axes)
    if depthwise:
        others = others.reshape(len(ranges), -1).max(1)
    alive = (ranges > 0) & (others > 0)
    factors = np.ones_like(ranges)
    factors[alive] = np.clip(np.sqrt(ranges[alive] / others[alive]), 1 / _MOST, _MOST)
    first /= _along(factors, 0, first.ndim)
    if len(pair.first.input) > 2:
        weights[pair.first.input[2]] /= factors
    if depthwise:
        second *= _along(np.repeat(factors, len(second) // len(factors)), 0, second.ndim)
    else:
        second *= _along(factors, 1, second.ndim)
    return float(np.abs(np.log(factors)).max())


def _along(factors: Any, axis: int, ndim: int) -> Any:
    return factors.reshape([-1 if at == axis else 1 for at in range(ndim)])
