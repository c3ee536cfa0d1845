"""Attention as one operator: scores, softmax and the weighted sum of every head in one kernel.

Pattern, as the tracing exporter writes eager attention (https://arxiv.org/abs/1706.03762, 3.2.1):

    q, k, v [batch, tokens, heads x size] -> Reshape -> Transpose(0, 2, 1, 3) each
    MatMul(q, Transpose(k)) -> Mul or Div by a constant -> (Add of a mask) -> Softmax
    MatMul(that, v) -> Transpose(0, 2, 1, 3) -> Reshape to [batch, tokens, heads x size]

becomes com.microsoft MultiHeadAttention of q, k, v, which computes softmax(scale q k' + mask) v for
each head: the same sums in another order. Preconditions: constant scale and head size, softmax over
the last axis, nobody else takes a value in between, and the two Reshapes at the ends only split and
join the heads. A mask must be spread over the batch, so it is taken from where it is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnx import helper

from edgekit.exporters.onnx_graph import MICROSOFT, Graph, attribute, need_domain

_HEADS_FIRST = [0, 2, 1, 3]


@dataclass(frozen=True)
class Match:
    """What the pattern holds: the values that go in and come out, and the nodes between them.

    ``query``, ``key``, ``value`` and ``output`` are [batch, tokens, heads x size].
    """

    nodes: list[Any]
    query: str
    key: str
    value: str
    mask: str
    output: str
    scale: float
    head_size: int


def apply(graph: Graph) -> int:
    """Rewrite every attention of the graph; how many there were."""
    count = 0
    for softmax in [node for node in graph.nodes if node.op_type == "Softmax"]:
        found = match(graph, softmax)
        width = found and (_width(graph, found.query) or _width(graph, found.key))
        if not found or not width or width % found.head_size:
            continue
        # The engine counts inputs: an empty name leaves one out.
        inputs = [found.query, found.key, found.value]
        if found.mask:
            inputs += ["", "", found.mask]
        fused = helper.make_node(
            "MultiHeadAttention",
            inputs,
            [found.output],
            name=f"{softmax.name}/attention",
            domain=MICROSOFT,
            num_heads=width // found.head_size,
            scale=found.scale,
        )
        graph.replace(found.nodes, [fused])
        count += 1
    if count:
        need_domain(graph.model, MICROSOFT)
    return count


def match(graph: Graph, softmax: Any) -> Match | None:
    """The attention that a Softmax belongs to; None where it is something else."""
    if attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    nodes, mask = [softmax], ""
    scores = softmax.input[0]
    if masked := graph.maker(scores, "Add"):
        made = [graph.maker(name, "Mul", "Div", "MatMul") is not None for name in masked.input]
        if made.count(True) != 1:
            return None
        nodes.append(masked)
        scores, mask = masked.input[made.index(True)], masked.input[made.index(False)]
    scale = 1.0
    if scaled := graph.maker(scores, "Mul", "Div"):
        constant = graph.constant(scaled.input[1])
        if constant is None or constant.size != 1:
            return None
        scale = constant.item() if scaled.op_type == "Mul" else 1 / constant.item()
        nodes.append(scaled)
        scores = scaled.input[0]
    product, weighted = graph.maker(scores, "MatMul"), graph.only_taker(softmax.output[0], "MatMul")
    if product is None or weighted is None or weighted.input[0] != softmax.output[0]:
        return None
    nodes += [product, weighted]
    query, key, value = (
        _heads(graph, product.input[0], _HEADS_FIRST),
        _keys(graph, product.input[1]),
        _heads(graph, weighted.input[1], _HEADS_FIRST),
    )
    joined = _joined(graph, weighted.output[0])
    if not (query and key and value and joined):
        return None
    if not query[1] == key[1] == value[1]:
        return None
    nodes += joined
    if any(len(graph.takers.get(node.output[0], ())) > 1 for node in nodes[:-1]):
        return None
    return Match(nodes, query[0], key[0], value[0], mask, joined[-1].output[0], scale, query[1])


def _heads(graph: Graph, name: str, order: list[int]) -> tuple[str, int] | None:
    """What was split into heads by a Reshape and a Transpose, and the size of a head."""
    turned = graph.maker(name, "Transpose")
    split = turned and graph.maker(turned.input[0], "Reshape")
    if not split or list(attribute(turned, "perm", ())) != order:
        return None
    size = _last(graph, split.input[1])
    return (split.input[0], size) if size else None


def _keys(graph: Graph, name: str) -> tuple[str, int] | None:
    """As ``_heads`` for keys, which are turned once more, or at once."""
    if found := _heads(graph, name, [0, 2, 3, 1]):
        return found
    turned = graph.maker(name, "Transpose")
    if turned and list(attribute(turned, "perm", ())) == [0, 1, 3, 2]:
        return _heads(graph, turned.input[0], _HEADS_FIRST)
    return None


def _last(graph: Graph, shape: str) -> int | None:
    """The last of the four sizes that a Reshape is given, where it is a constant."""
    constant = graph.constant(shape)
    if constant is not None:
        return int(constant[-1]) if constant.size == 4 and constant[-1] > 0 else None
    parts = graph.maker(shape, "Concat")
    if not parts or len(parts.input) != 4:
        return None
    last = graph.constant(parts.input[-1])
    return int(last.reshape(-1)[0]) if last is not None and last.size == 1 and last > 0 else None


def _joined(graph: Graph, name: str) -> list[Any] | None:
    """The Transpose and the Reshape that put the heads side by side again."""
    turned = graph.only_taker(name, "Transpose")
    if not turned or list(attribute(turned, "perm", ())) != _HEADS_FIRST:
        return None
    joined = graph.only_taker(turned.output[0], "Reshape")
    if not joined:
        return None
    constant = graph.constant(joined.input[1])
    parts = graph.maker(joined.input[1], "Concat")
    sizes = constant.size if constant is not None else len(parts.input) if parts else 0
    return [turned, joined] if sizes == 3 else None


def _width(graph: Graph, name: str) -> int | None:
    """The last size of a projection: that of its bias, or of its matrix."""
    node = graph.maker(name, "Add", "MatMul", "Gemm", "MatMulNBits")
    if node is None:
        return None
    if node.op_type == "MatMulNBits":
        return int(attribute(node, "N"))
    for each in node.input:
        constant = graph.constant(each)
        if constant is not None and constant.ndim:
            return int(constant.shape[-1])
    return None
