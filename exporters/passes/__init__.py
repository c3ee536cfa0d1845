"""Kernel fusion: an ordered table of passes, one small file each.

Never changes what a graph computes: each file says what it looks for, and why the two are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgekit.exporters.onnx_graph import Graph
from edgekit.exporters.passes import (
    drop_identities,
    fold_scale,
    fuse_attention,
    lift_roundings,
    merge_products,
)

# name -> what rewrites a graph and says how often; in this order.
PASSES: dict[str, Callable[[Graph], int]] = {
    "identities": drop_identities.apply,
    "attention": fuse_attention.apply,
    "folded_scales": fold_scale.apply,
    "merged_products": merge_products.apply,
    "lifted_roundings": lift_roundings.apply,
}


# They only clear the way for others: the engine does without those operators anyway.
UNMEASURED = ("identities",)


def apply(name: str, model: Any) -> int:
    """Rewrite a ModelProto with one pass; how often it fired."""
    graph = Graph(model)
    fired = PASSES[name](graph)
    if fired:
        graph.finish()
    return fired


def run(model: Any) -> dict[str, int]:
    """Rewrite a ModelProto with every pass; how often each fired."""
    return {name: apply(name, model) for name in PASSES}
