"""Ranges for the two products inside attention, queries with keys and shares with values.

Knows where they stand in a traced graph, and which form engines keep in 8 bits from the projection
to the softmax: symmetric and signed for what is multiplied, without a sign for shares, which lie
between 0 and 1; and what may change in the projections so that one range fits all channels. Must
never decide whether that loses too much: who calls it measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from edgekit.exporters import onnx_smoothing, ort_quantization
from edgekit.exporters.onnx_graph import Graph
from edgekit.exporters.passes import fuse_attention

Feeds = Sequence[Mapping[str, Any]]
_TOP, _TOP_SHARE = 127, 255
_TINY = 1e-6
_STILL = 0.01  # of the median: a channel of queries or keys that moves less in samples
_BETWEEN = ("Mul", "Div", "Add", "Identity", "Cast")  # the scores and their softmax


@dataclass(frozen=True)
class Projection:
    """x W + b that nobody but one Reshape into heads takes: its MatMul, its Add, and the bias,
    float32 [channels], which stands at ``side`` of the Add.
    """

    product: Any
    added: Any
    side: int
    bias: Any

    def change(self, graph: Graph, centre: Any, factors: Any) -> None:
        """Let it be (x W + b - ``centre``) / ``factors``, each float32 [channels]."""
        weights = graph.constant(self.product.input[1])
        name = self.added.output[0]
        self.product.input[1] = graph.add_float(f"{name}/weights", weights / factors)
        self.added.input[self.side] = graph.add_float(
            f"{name}/bias", (self.bias - centre) / factors
        )
        graph.keep(graph.nodes)


def projection(graph: Graph, name: str) -> Projection | None:
    """What makes a value before it is split into heads, if it has that form."""
    added = graph.maker(name, "Add")
    if added is None or not graph.only_taker(name, "Reshape"):
        return None
    for side in (0, 1):
        product, bias = (
            graph.maker(added.input[1 - side], "MatMul"),
            graph.constant(added.input[side]),
        )
        if product is None or bias is None or not graph.only_taker(product.output[0], "Add"):
            continue
        weights = graph.constant(product.input[1])
        alone = len(graph.takers[product.input[1]]) == 1
        if weights is not None and alone and weights.ndim == 2 and bias.shape == weights.shape[1:]:
            return Projection(product, added, side, bias)
    return None


def values(graph: Graph) -> dict[str, str]:
    """Output of an attention -> its values; both [batch, tokens, heads x size], and each channel
    of the one is a sum over tokens of that channel of the other, with shares that add up to 1.
    """
    found = (fuse_attention.match(graph, node) for node in graph.nodes if node.op_type == "Softmax")
    return {each.output: each.value for each in found if each}


def balance(model: Any, samples: Feeds) -> int:
    """Let queries and keys have ranges alike, channel by channel, and keys lie around 0; of how
    many attentions. Changes ``model`` in place.

    A channel of the queries may be multiplied by what that of the keys is divided by, and what is
    taken from all keys moves all scores of a query alike, which a softmax does not see.
    """
    graph = Graph(model)
    found = (fuse_attention.match(graph, node) for node in graph.nodes if node.op_type == "Softmax")
    pairs = {(each.query, each.key) for each in found if each}
    names = sorted({name for pair in pairs for name in pair})
    if not names or not samples:
        return 0
    _, ends = onnx_smoothing.watched(model, samples, names, padding=False)
    changed = 0
    for query, key in sorted(pairs):
        queries, keys = projection(graph, query), projection(graph, key)
        if queries is None or keys is None or queries.bias.shape != keys.bias.shape or query == key:
            continue
        low, high = ends[key]
        centre = (low + high) / 2
        widest = _spread((high - low) / 2)
        others = _spread(np.maximum(-ends[query][0], ends[query][1]))
        factors = np.sqrt(widest / others)
        queries.change(graph, np.zeros_like(centre), 1 / factors)
        keys.change(graph, centre, factors)
        changed += 1
    graph.finish()
    return changed


def _spread(span: Any) -> Any:
    return np.maximum(span, max(_TINY, _STILL * float(np.median(span))))


def inputs(graph: Graph, *, values: bool) -> dict[str, bool]:
    """Input of such a product -> whether it holds shares; with ``values`` of the second product of
    an attention too.
    """
    found: dict[str, bool] = {}
    for softmax in graph.nodes:
        if softmax.op_type != "Softmax":
            continue
        product = _product(graph, softmax.input[0])
        after = softmax.output[0]
        while through := graph.only_taker(after, "Identity", "Cast"):
            after = through.output[0]
        weighted = graph.only_taker(after, "MatMul")
        if product is None or weighted is None or weighted.input[0] != after:
            continue
        found |= dict.fromkeys(product.input, False)
        if values:
            found |= {after: True, weighted.input[1]: False}
    return {name: shares for name, shares in found.items() if graph.constant(name) is None}


def _product(graph: Graph, name: str) -> Any:
    """The MatMul of two computed values that scores come from, past a scale and a mask."""
    node = graph.maker(name, *_BETWEEN, "MatMul")
    if node is None or node.op_type == "MatMul":
        computed = node is not None and all(graph.constant(each) is None for each in node.input)
        return node if computed else None
    return next((found for each in node.input if (found := _product(graph, each))), None)


def largest(model: Any, samples: Feeds) -> dict[str, float]:
    """The largest value of each input over samples, without its sign."""
    names = list(inputs(Graph(model), values=True))
    if not names:
        return {}
    copy = type(model).FromString(model.SerializeToString())
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    engine = ort_quantization.session(copy)
    found = dict.fromkeys(names, 0.0)
    for sample in samples:
        for name, value in zip(names, engine.run(names, dict(sample)), strict=True):
            found[name] = max(found[name], float(np.abs(value).max()))
    return found


def insert(graph: Graph, ends: Mapping[str, float], *, values: bool) -> int:
    """Put a rounding to 8 bits before these products; how many inputs got one."""
    wanted = inputs(graph, values=values)
    for name, shares in wanted.items():
        top, kind = (_TOP_SHARE, np.uint8) if shares else (_TOP, np.int8)
        step = np.float32(max(1e-12, ends[name]) / top)
        scale = graph.add_constant(f"{name}.scores.scale", np.array(step, np.float32))
        zero = graph.add_constant(f"{name}.scores.zero", np.array(0, kind))
        parts = [f"{name}.scores.int8", f"{name}.scores"]
        rounded = helper.make_node("QuantizeLinear", [name, scale, zero], parts[:1], parts[0])
        again = helper.make_node("DequantizeLinear", [parts[0], scale, zero], parts[1:], parts[1])
        takers = [node for node in graph.takers[name] if node.op_type == "MatMul"]
        graph.replace([takers[0]], [rounded, again, takers[0]])
        for node in takers:
            for i, old in enumerate(node.input):
                if old == name:
                    node.input[i] = parts[1]
    return len(wanted)
