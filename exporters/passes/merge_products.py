"""Products of one input with several matrices as one product: query, key and value of attention.

    MatMul(x, A) + a, MatMul(x, B) + b, ...  ->  Split(MatMul(x, [A B ...]) + [a b ...])

A column of a product depends on no other column of the matrix, so both sides are equal, but for the
order in which a kernel adds up. The input is read, and quantized, once instead of several times,
and one large product keeps cores busier than three small ones. The same holds for products in 8
bits with a scale and a zero point for each column (MatMulInteger, Cast, Mul; or DequantizeLinear
before the MatMul), and for blocks of weights (MatMulNBits), which never reach over two columns.
Preconditions: constant matrices of one type, the same input with the same scale, a bias of one
number a column in all or in none of them, and nobody else takes a value in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from edgekit.exporters.onnx_graph import Graph, attribute

_LEAST = 2


@dataclass(frozen=True)
class _Product:
    """Its nodes in order; ``joined`` are the inputs of those that become one, as (number of the
    node, number of the input, axis of the columns; None: one flat list of them); the bias as one
    of those too; the number of columns.
    """

    nodes: list[Any]
    joined: tuple[tuple[int, int, int | None], ...]
    columns: int


def apply(graph: Graph) -> int:
    """Merge every group; how many products went into others."""
    groups: dict[Any, list[_Product]] = {}
    for node in graph.nodes:
        match node.op_type:
            case "MatMul":
                found = _plain(graph, node) or _dequantized(graph, node)
            case "MatMulInteger":
                found = _integer(graph, node)
            case "MatMulNBits":
                found = _blocks(graph, node)
            case _:
                continue
        if found:
            groups.setdefault(_key(graph, found), []).append(found)
    whole = [group for group in groups.values() if len(group) >= _LEAST]
    for group in whole:
        _merge(graph, group)
    return sum(len(group) - 1 for group in whole)


def _plain(graph: Graph, node: Any) -> _Product | None:
    weights = graph.constant(node.input[1])
    if weights is None or weights.ndim != 2:
        return None
    return _biased(graph, [node], ((0, 1, 1),), weights.shape[1])


def _dequantized(graph: Graph, node: Any) -> _Product | None:
    """MatMul(x, DequantizeLinear(W, scales of its columns, zeros of them))."""
    made = graph.maker(node.input[1], "DequantizeLinear")
    if made is None or graph.only_taker(made.output[0], "MatMul") is None:
        return None
    weights, *ends = [graph.constant(name) for name in made.input]
    if weights is None or weights.ndim != 2 or attribute(made, "axis", 1) != 1:
        return None
    columns = weights.shape[1]
    if any(each is None or each.shape != (columns,) for each in ends):
        return None
    joined = ((0, 0, 1), *((0, place, 0) for place in range(1, len(made.input))))
    found = _biased(graph, [made, node], joined, columns)
    return None if _rounded(graph, found.nodes[-1].output[0]) else found


def _rounded(graph: Graph, name: str) -> bool:
    """Whether a value is rounded to 8 bits behind operators that only move it: an engine does that
    in the kernel of the product, but not behind a Split (OpenVINO: 1.08 instead of 1.03 of the time
    of its own quantizer's MiniLM).
    """
    while node := graph.only_taker(name, "Reshape", "Transpose"):
        name = node.output[0]
    return graph.only_taker(name, "QuantizeLinear") is not None


def _integer(graph: Graph, node: Any) -> _Product | None:
    """MatMulInteger(x, W, zero of x, zeros of W) -> Cast -> Mul by (scale of x) * (scales of W)."""
    if len(node.input) != 4:
        return None
    weights, zeros = (graph.constant(node.input[i]) for i in (1, 3))
    cast = graph.only_taker(node.output[0], "Cast")
    scaled = cast and graph.only_taker(cast.output[0], "Mul")
    if weights is None or weights.ndim != 2 or not scaled:
        return None
    columns = weights.shape[1]
    scale = graph.maker(scaled.input[1 - list(scaled.input).index(cast.output[0])], "Mul")
    if not scale or zeros is None or zeros.shape != (columns,):
        return None
    if graph.only_taker(scale.output[0], "Mul") is None:
        return None
    sides = [i for i in (0, 1) if graph.constant(scale.input[i]) is not None]
    if len(sides) != 1 or graph.constant(scale.input[sides[0]]).shape != (columns,):
        return None
    joined = ((0, 1, 1), (0, 3, 0), (2, sides[0], 0))
    return _biased(graph, [node, cast, scale, scaled], joined, columns)


def _blocks(graph: Graph, node: Any) -> _Product | None:
    """MatMulNBits(x, blocks [columns, ...], scales, zeros), flat or not."""
    if len(node.input) != 4 or any(graph.constant(name) is None for name in node.input[1:]):
        return None
    joined = ((0, 1, 0), (0, 2, None), (0, 3, None))
    return _biased(graph, [node], joined, int(attribute(node, "N")))


def _biased(
    graph: Graph, nodes: list[Any], joined: tuple[tuple[int, int, int | None], ...], columns: int
) -> _Product:
    """With the Add of a bias behind it, if there is one."""
    made = nodes[-1].output[0]
    added = graph.only_taker(made, "Add")
    if added:
        side = 1 - list(added.input).index(made)
        bias = graph.constant(added.input[side])
        if bias is not None and bias.shape == (columns,):
            return _Product([*nodes, added], (*joined, (len(nodes), side, 0)), columns)
    return _Product(nodes, joined, columns)


def _key(graph: Graph, found: _Product) -> Any:
    """Equal for products that can be merged: all but what is joined is the same."""
    own = {name for node in found.nodes for name in node.output}
    parts: list[Any] = []
    for number, node in enumerate(found.nodes):
        own_attributes = [each for each in node.attribute if each.name != "N"]
        attributes = sorted(str(each.SerializeToString()) for each in own_attributes)
        inputs: list[Any] = []
        for i, name in enumerate(node.input):
            axes = [axis for n, place, axis in found.joined if (n, place) == (number, i)]
            if axes:
                array = graph.constant(name)
                rest = [size for at, size in enumerate(array.shape) if at != axes[0]]
                inputs.append((str(array.dtype), () if axes[0] is None else tuple(rest)))
            else:
                inputs.append("inside" if name in own else name)
        parts.append((node.op_type, tuple(attributes), tuple(inputs)))
    return tuple(parts)


def _merge(graph: Graph, group: Sequence[_Product]) -> None:
    first = group[0]
    name = first.nodes[0].name or first.nodes[0].output[0]
    inside: dict[str, str] = {}
    made = []
    for number, node in enumerate(first.nodes):
        fresh = type(node).FromString(node.SerializeToString())
        fresh.name = f"{node.name}/merged"
        for i, old in enumerate(node.input):
            axes = [axis for n, place, axis in first.joined if (n, place) == (number, i)]
            if axes:
                arrays = [graph.constant(each.nodes[number].input[i]) for each in group]
                flat = arrays if axes[0] is not None else [array.reshape(-1) for array in arrays]
                fresh.input[i] = graph.add_constant(
                    f"{name}/merged_{number}_{i}", np.concatenate(flat, axis=axes[0] or 0)
                )
            elif old in inside:
                fresh.input[i] = inside[old]
        for i, old in enumerate(node.output):
            inside[old] = fresh.output[i] = f"{old}/merged"
        for each in fresh.attribute:
            if each.name == "N":
                each.i = sum(part.columns for part in group)
        made.append(fresh)
    sizes = np.array([each.columns for each in group], np.int64)
    split = helper.make_node(
        "Split",
        [made[-1].output[0], graph.add_constant(f"{name}/merged_sizes", sizes)],
        [each.nodes[-1].output[0] for each in group],
        name=f"{name}/split",
        axis=-1,
    )
    _place(graph, [node for each in group for node in each.nodes], [*made, split])


def _place(graph: Graph, old: list[Any], new: list[Any]) -> None:
    """In the place of the first of the old nodes behind which all inputs of the new are known."""
    gone = {id(node) for node in old}
    inner = {name for node in new for name in node.output}
    needed = {name for node in new for name in node.input} - inner
    ready = max(
        (i for i, node in enumerate(graph.nodes) if needed.intersection(node.output)), default=-1
    )
    kept = [
        [node for node in part if id(node) not in gone]
        for part in (graph.nodes[: ready + 1], graph.nodes[ready + 1 :])
    ]
    graph.keep([*kept[0], *new, *kept[1]])
