"""Kernel fusion: an ordered table of passes, one small file each.

Never changes what a graph computes: each file says what it looks for, and why the two are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgekit.exporters.onnx_graph import Graph
from edgekit.exporters.passes import drop_identities, fuse_attention

# name -> what rewrites a graph and says how often; in this order.
PASSES: dict[str, Callable[[Graph], int]] = {
    "identities": drop_identities.apply,
    "attention": fuse_attention.apply,
}


def run(model: Any) -> dict[str, int]:
    """Rewrite a ModelProto with every pass; how often each fired."""
    fired = {}
    for name, apply in PASSES.items():
        graph = Graph(model)
        fired[name] = apply(graph)
        if fired[name]:
            graph.finish()
    return fired
