"""Rounding to 8 bits in front of operators that only move values, instead of behind them.

    DequantizeLinear(QuantizeLinear(M(x))) -> M(DequantizeLinear(QuantizeLinear(x)))

for M of Reshape, Flatten, Squeeze, Unsqueeze, Transpose, MaxPool, Relu; and of Concat, with such a
pair for each of its inputs. Then the kernel before hands out 8 bits itself, and what lies between
two int8 kernels moves bytes, not floats. The pair is r(x) = s (clip(round(x / s) + z) - z), and
with one s and z for a whole tensor both sides are equal, bit for bit: r looks at each value alone,
so it may be anywhere among others; it never decreases, so the largest of some rounded values is the
rounded largest; and r(0) = 0, so Relu, the larger of a value and 0, is as good behind it. Two equal
pairs one behind the other are one, for r(r(x)) = r(x).
Preconditions: s and z are constants of one number; nobody else takes a value in between.
Not Add, Clip or averages: r(a + b) is not r(a) + r(b), and r may move a bound.
"""

from __future__ import annotations

from typing import Any

from edgekit.exporters.onnx_graph import Graph

_MOVERS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Relu", "Concat")


def apply(graph: Graph) -> int:
    """Lift every pair as far as it goes; past how many operators, and of how many pairs none is
    left.
    """
    if graph.nested:
        return 0
    count = 0
    waiting = [node for node in graph.nodes if node.op_type == "QuantizeLinear"]
    while waiting:
        first = waiting.pop()
        pair = _pair(graph, first)
        if pair is None:
            continue
        if _repeats(graph, pair):
            _drop(graph, pair)
            count += 1
        elif mover := _mover(graph, first):
            waiting += _lift(graph, pair, mover, count)
            count += 1
    return count


def _pair(graph: Graph, first: Any) -> tuple[Any, Any] | None:
    """A QuantizeLinear and the DequantizeLinear behind it, with the same scale and zero point."""
    second = graph.only_taker(first.output[0], "DequantizeLinear")
    if second is None or list(first.input[1:]) != list(second.input[1:]):
        return None
    if first.attribute or second.attribute:
        return None
    ends = [graph.constant(name) for name in first.input[1:]]
    return (first, second) if all(each is not None and each.size == 1 for each in ends) else None


def _repeats(graph: Graph, pair: tuple[Any, Any]) -> bool:
    """Whether what the pair rounds is rounded by an equal one already."""
    before = graph.maker(pair[0].input[0], "DequantizeLinear")
    if pair[1].output[0] in {value.name for value in graph.model.graph.output}:
        return False
    if before is None or len(before.input) != len(pair[0].input):
        return False
    if graph.maker(before.input[0], "QuantizeLinear") is None:
        return False
    ends = [[graph.constant(name) for name in node.input[1:]] for node in (before, pair[0])]
    return all(
        one is not None and one.dtype == other.dtype and one.size == 1 and (one == other).all()
        for one, other in zip(*ends, strict=True)
    )


def _drop(graph: Graph, pair: tuple[Any, Any]) -> None:
    first, second = pair
    for node in graph.takers.get(second.output[0], []):
        for i, name in enumerate(node.input):
            if name == second.output[0]:
                node.input[i] = first.input[0]
    graph.keep([node for node in graph.nodes if node is not first and node is not second])


def _mover(graph: Graph, first: Any) -> Any:
    """The operator that makes what is rounded, if the pair may stand before it."""
    mover = graph.maker(first.input[0], *_MOVERS)
    if (
        mover is None
        or len(mover.output) > 1
        or graph.only_taker(mover.output[0], "QuantizeLinear") is None
    ):
        return None
    moved = mover.input if mover.op_type == "Concat" else mover.input[:1]
    return mover if all(graph.constant(name) is None for name in moved) else None


def _lift(graph: Graph, pair: tuple[Any, Any], mover: Any, number: int) -> list[Any]:
    """The new QuantizeLinear nodes, before the operator."""
    made: list[Any] = []
    behind = type(mover).FromString(mover.SerializeToString())
    behind.output[0] = pair[1].output[0]
    for i in range(len(mover.input) if mover.op_type == "Concat" else 1):
        value = mover.input[i]
        for old in pair:
            node = type(old).FromString(old.SerializeToString())
            node.name = f"{old.name}/lifted_{number}_{i}"
            node.input[0], node.output[0] = value, f"{value}/{node.name}"
            made.append(node)
            value = node.output[0]
        behind.input[i] = value
    graph.replace([mover, *pair], [*made, behind])
    return made[::2]
