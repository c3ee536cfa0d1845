"""What each layer of a TFLite file makes, held against the ONNX file of the same model.

Knows both engines and how far a layer's parts may be fused; never how a file was made, and it
writes none. Names differ between the formats, and channels stand last in one of them: layers with
weights belong together by what they make, and else by their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import UsageError
from edgekit.exporter import Progress
from edgekit.formats import onnx, tflite
from edgekit.runtimes import litert, onnx_layers
from edgekit.tensor_figures import LayerLosses

_ONNX_PRODUCTS = {
    *("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv"),
    *("Gemm", "MatMul", "MatMulInteger", "MatMulNBits", "QLinearMatMul", "FusedMatMul"),
}
_TFLITE_PRODUCTS = {
    *("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D"),
    *("FULLY_CONNECTED", "BATCH_MATMUL"),
}
# What a format may keep in an operator of its own, and the other inside the layer before it.
_FOLLOWING = {
    *("Add", "Sub", "Mul", "Div", "Clip", "Relu", "LeakyRelu", "HardSigmoid", "HardSwish", "Gelu"),
    *("Sigmoid", "Tanh", "BatchNormalization", "Cast", "QuantizeLinear", "DequantizeLinear"),
    *("ADD", "SUB", "MUL", "RELU", "RELU6", "RELU_N1_TO_1", "LEAKY_RELU", "HARD_SWISH", "GELU"),
    *("LOGISTIC", "TANH", "MINIMUM", "MAXIMUM", "QUANTIZE", "DEQUANTIZE"),
    *("Reshape", "Transpose", "RESHAPE", "TRANSPOSE"),
}
_MOST_FOLLOWING = 5
_SAME_DB = 10.0  # two layers that make this are one and the same
_REACH = 12  # layers that a converter may move, or leave out
# Orders of the axes of TFLite's values that give ONNX's: as they are, channels first.
_ORDERS: dict[int, tuple[tuple[int, ...], ...]] = {
    3: ((0, 1, 2), (0, 2, 1)),
    4: ((0, 1, 2, 3), (0, 3, 1, 2)),
}


@dataclass(frozen=True)
class _Layer:
    """A product with weights: its first value, and those that follow it alone."""

    value: Any
    following: tuple[Any, ...]

    @property
    def values(self) -> tuple[Any, ...]:
        return (self.value, *self.following)


@dataclass(frozen=True)
class _Pair:
    """Values of both files that are to be the same; ``order`` turns the second one's axes."""

    layer: str
    mine: str
    theirs: int
    order: tuple[int, ...]
    snr_db: float


def losses(
    graph: Path,
    lite: Path,
    feeds: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    progress: Progress,
) -> LayerLosses:
    """Compare every layer with weights; ``feeds`` are those of the ONNX file ``graph``, and the
    same inputs as the TFLite file ``lite`` takes them.

    Raises UsageError where no layer of both has one shape, InferenceError when an engine fails.
    """
    header, other = onnx.read(graph), tflite.read(lite)
    layers, others = list(_of_onnx(header)), list(_of_tflite(other.main))
    names = [value for layer in layers for value in layer.values]
    mine = onnx_layers.Opened(graph, header, names)
    theirs = litert.Inside(lite, other)
    pairs: list[_Pair] = []
    powers: dict[str, float] = {}
    errors: dict[str, float] = {}
    for number, (feed, as_lite) in enumerate(feeds):
        progress("compare layers", number, len(feeds))
        truth = dict(zip(names, mine.run(feed), strict=True))
        found = theirs.run(as_lite, {value for layer in others for value in layer.values})
        if not number:
            pairs = _paired(layers, others, truth, found)
        for pair in pairs:
            wanted = np.asarray(truth[pair.mine], np.float64).ravel()
            own = found[pair.theirs].transpose(pair.order).astype(np.float64).ravel()
            powers[pair.layer] = powers.get(pair.layer, 0.0) + float(wanted @ wanted)
            error = own - wanted
            errors[pair.layer] = errors.get(pair.layer, 0.0) + float(error @ error)
    progress("compare layers", len(feeds), len(feeds))
    if not pairs:
        raise UsageError(f"{graph.name} and {lite.name} have no layer in common")
    makers = {name: node for node in header.nodes for name in node.outputs if name}
    ratios = {name: onnx_layers.ratio_db(powers[name], errors[name]) for name in powers}
    partners = {pair.layer: other.main.tensors[pair.theirs].name for pair in pairs}
    told = [
        replace(each, tensor=f"{each.tensor} = {partners[each.tensor]}")
        for each in onnx_layers.told(header, makers, ratios)
    ]
    worst = max(told, key=lambda each: each.drop_db, default=None)
    return LayerLosses(
        samples=len(feeds),
        shared=len(told),
        whole=len(layers),
        first=worst if worst and worst.drop_db >= onnx_layers.BREAK_DB else None,
        layers=tuple(told),
    )


# Layers


def _of_onnx(header: onnx.OnnxHeader) -> Iterator[_Layer]:
    known = {tensor.name for tensor in header.initializers}
    nodes = [(node.op_type, node.inputs, node.outputs) for node in header.nodes]
    return _layers(nodes, known, _ONNX_PRODUCTS)


def _of_tflite(graph: tflite.TfliteGraph) -> Iterator[_Layer]:
    known = {number for number, tensor in enumerate(graph.tensors) if tensor.buffer is not None}
    nodes = [(each.kind, each.inputs, each.outputs) for each in graph.operators]
    return _layers(nodes, known, _TFLITE_PRODUCTS)


def _layers(
    nodes: Sequence[tuple[str, Sequence[Any], Sequence[Any]]],
    constants: Iterable[Any],
    products: set[str],
) -> Iterator[_Layer]:
    """Every product of a value and a constant, in the order of the graph."""
    known = set(constants)
    readers: dict[Any, list[tuple[str, Sequence[Any], Sequence[Any]]]] = {}
    for node in nodes:
        given = [each for each in node[1] if each not in ("", -1)]
        if all(each in known for each in given):
            known.update(node[2])
        for each in given:
            readers.setdefault(each, []).append(node)
    for kind, inputs, outputs in nodes:
        if kind not in products or outputs[0] in known or not known.intersection(inputs[:4]):
            continue
        following: list[Any] = []
        value = outputs[0]
        while len(following) < _MOST_FOLLOWING and len(readers.get(value, [])) == 1:
            after, _, results = readers[value][0]
            if after not in _FOLLOWING or len(results) != 1:
                break
            value = results[0]
            following.append(value)
        yield _Layer(outputs[0], tuple(following))


# Which belong together


def _paired(
    layers: Sequence[_Layer],
    others: Sequence[_Layer],
    truth: Mapping[str, Any],
    found: Mapping[int, Any],
) -> list[_Pair]:
    """First those that make the same; then, between those, what has the same shape in order."""
    chosen: dict[int, tuple[int, _Pair]] = {}
    taken: set[int] = set()
    at = 0
    for number, layer in enumerate(layers):
        near = range(max(0, at - _REACH), min(len(others), at + _REACH))
        matches = [
            (match.snr_db, -abs(other - at), other, match)
            for other in near
            if other not in taken and (match := _match(layer, others[other], truth, found))
        ]
        if matches and (best := max(matches, key=lambda each: each[:3]))[0] >= _SAME_DB:
            chosen[number] = best[2], best[3]
            taken.add(best[2])
            at = best[2] + 1
    for number, layer in enumerate(layers):
        if number in chosen:
            continue
        first = max((o for n, (o, _) in chosen.items() if n < number), default=-1) + 1
        end = min((o for n, (o, _) in chosen.items() if n > number), default=len(others))
        for other in range(first, end):
            match = None if other in taken else _match(layer, others[other], truth, found)
            if match:
                chosen[number] = other, match
                taken.add(other)
                break
    return [pair for _, (_, pair) in sorted(chosen.items())]


def _match(
    layer: _Layer, other: _Layer, truth: Mapping[str, Any], found: Mapping[int, Any]
) -> _Pair | None:
    """The likest two values of both layers; None where none has the other's shape."""
    best: _Pair | None = None
    for mine in layer.values:
        wanted = truth[mine]
        if not isinstance(wanted, np.ndarray) or wanted.dtype.kind != "f":
            continue
        for theirs in other.values:
            if theirs not in found or found[theirs].size != wanted.size:
                continue
            for order in _orders(found[theirs], wanted):
                own = found[theirs].transpose(order)
                error = float(np.square(own.ravel() - wanted.ravel(), dtype=np.float64).sum())
                power = float(np.square(wanted, dtype=np.float64).sum())
                ratio = onnx_layers.ratio_db(power, error)
                if best is None or ratio > best.snr_db:
                    best = _Pair(layer.value, mine, theirs, order, ratio)
    return best


def _orders(value: Any, wanted: Any) -> Iterator[tuple[int, ...]]:
    """Those that give the other's shape; axes of one value do not count."""
    for order in _ORDERS.get(value.ndim, (tuple(range(value.ndim)),)):
        turned = [value.shape[axis] for axis in order]
        if [n for n in turned if n > 1] == [n for n in wanted.shape if n > 1]:
            yield order
