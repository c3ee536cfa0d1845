"""A factor for each channel behind a layer norm, folded into the norm's own scale and bias.

    Mul(LayerNormalization(x, scale, bias), factors) -> LayerNormalization(x, scale * factors,
                                                                           bias * factors)

The norm ends with ``n * scale + bias`` for each channel (https://arxiv.org/abs/1607.06450), and
(n * s + b) * f = n * (s f) + b f, so both sides are equal, but for rounding. Smoothing before
quantization leaves such factors behind, as operators of their own.
Preconditions: nobody but the product reads the norm; scale, bias and factors are constants of one
number a channel; the norm is over the last axis alone.
"""

from __future__ import annotations

from typing import Any

from edgekit.exporters.onnx_graph import Graph, attribute


def apply(graph: Graph) -> int:
    """Rewrite every one; how many there were."""
    count = 0
    for norm in [node for node in graph.nodes if node.op_type == "LayerNormalization"]:
        product = graph.only_taker(norm.output[0], "Mul")
        if product is None or attribute(norm, "axis", -1) != -1 or len(norm.output) > 1:
            continue
        factors = graph.constant(_other(product, norm.output[0]))
        weights = [graph.constant(name) for name in norm.input[1:]]
        if factors is None or not weights or any(each is None for each in weights):
            continue
        if factors.ndim != 1 or any(each.shape != factors.shape for each in weights):
            continue
        fresh = type(norm).FromString(norm.SerializeToString())
        for i, each in enumerate(weights, 1):
            name = f"{norm.input[i]}/{norm.name}/scaled"
            fresh.input[i] = graph.add_constant(name, (each * factors).astype(each.dtype))
        fresh.output[0] = product.output[0]
        graph.replace([norm, product], [fresh])
        count += 1
    return count


def _other(node: Any, name: str) -> str:
    return str(node.input[1] if node.input[0] == name else node.input[0])
