"""Weights that training put on a grid of at most 16 levels, stored in 4 bits: nothing is rounded.

Must never look at an activation, and never put a weight on a grid that it is not on: such a matrix
stays float.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.errors import RecipeError
from edgekit.exporters import onnx_blocks, weight_grid
from edgekit.exporters.onnx_graph import MICROSOFT, Graph, need_domain

_BLOCKS = (16, 32, 64, 128, 256)  # of inputs, that the engine has kernels for
_SCALE_BYTES = 4
_ZERO = 8  # what MatMulNBits takes off each value where it is given no zero points
_FLOAT_COMPUTE = 1  # accuracy_level: the levels of activations must not be rounded once more


def apply(graph: Graph, kept: set[str]) -> dict[str, Any]:
    """Rewrite every matrix product whose constant weights lie on a grid; how many, and the names of
    those that do not. Raises RecipeError where none does.
    """
    count = 0
    floats: list[str] = []
    for node, weights in onnx_blocks.matrices(graph, kept):
        found = weight_grid.of_rows(np.ascontiguousarray(weights.T))
        if found is None:
            floats.append(node.name)
            continue
        block = _block(len(weights))
        options = {"bits": 4, "block_size": block, "accuracy_level": _FLOAT_COMPUTE}
        parts = _packed(*found, block)
        graph.replace([node], onnx_blocks.product(graph, node, weights.shape, parts, options))
        count += 1
    if not count:
        raise RecipeError(
            "no matrix of this model lies on a grid of 16 levels",
            hint="weight_only_wi4b32 rounds any weights; edgekit train vit-qat trains for 4 bits",
        )
    need_domain(graph.model, MICROSOFT)
    graph.finish()
    return {"matrices": count, "kept_float": floats}


def _block(inputs: int) -> int:
    """The size of block that stores a row in the fewest bytes, padding and scales included."""
    return min(_BLOCKS, key=lambda size: -(-inputs // size) * (size // 2 + _SCALE_BYTES))


def _packed(levels: Any, steps: Any, block: int) -> dict[str, Any]:
    """As MatMulNBits stores them: uint8 [outputs, blocks, block / 2], a scale for each block."""
    outputs, inputs = levels.shape
    blocks = -(-inputs // block)
    padded = np.full((outputs, blocks * block), _ZERO, np.uint8)
    padded[:, :inputs] = levels + _ZERO
    return {
        "blocks": onnx_blocks.paired(padded.reshape(outputs, blocks, block)),
        "scales": np.repeat(steps, blocks),
    }
