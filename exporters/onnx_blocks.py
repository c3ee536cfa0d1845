"""Weights alone in 4 or 8 bits: blocks with a scale and a zero point each, and tables of
embeddings in 8 bits.

Must never round an activation. A block's range is searched for the least squared error, which
loses less than rounding to the nearest of the full range (https://arxiv.org/abs/2210.17323 and
https://mobiusml.github.io/hqq_blog/ discuss why). Where samples of the inputs are given, blocks of
4 bits are fitted to what the product makes of them (``lm_rounding``), and taken where that loses
less on inputs that they were not fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import helper

from edgekit.exporters import lm_blocks, lm_rounding, onnx_smoothing
from edgekit.exporters.lm_graph import Blocks
from edgekit.exporters.onnx_graph import MICROSOFT, Graph, attribute, need_domain

_INT8_COMPUTE = 4  # accuracy_level of MatMulNBits: activations in 8 bits inside the kernel
_SHRINKS = np.linspace(1.0, 0.7, 13)  # parts of a block's range that are tried
_FITTED_BITS = 4
_LEAST_ROWS, _JUDGES = 64, 4  # of the rows every fourth is fitted to nothing
Feeds = Sequence[Mapping[str, Any]]
_FLOAT32 = 1  # TensorProto.DataType
_TABLE_ROWS = 256  # below, an embedding is not worth it


def apply(
    graph: Graph, bits: int, size: int, kept: set[str], samples: Feeds = ()
) -> dict[str, Any]:
    """Rewrite every matrix product with constant weights in blocks of ``size`` inputs, and every
    table; how many of each, and how many products were fitted to ``samples``.
    """
    count = fitted = 0
    seen = _inputs(graph, kept, samples) if bits == _FITTED_BITS and len(samples) else {}
    for node, weights in matrices(graph, kept):
        wide = np.ascontiguousarray(weights.T)
        packed, scales, zeros = quantize_blocks(wide, bits, size)
        parts = {"blocks": packed, "scales": scales, "zeros": zeros}
        better = _fitted(wide, seen.get(node.input[0]), parts, bits, size)
        parts, fitted = (better, fitted + 1) if better else (parts, fitted)
        options = {"bits": bits, "block_size": size, "accuracy_level": _INT8_COMPUTE}
        graph.replace([node], product(graph, node, weights.shape, parts, options))
        count += 1
    if count:
        need_domain(graph.model, MICROSOFT)
    tables = quantize_tables(graph, kept)
    graph.finish()
    return {"matrices": count, "tables": tables} | ({"fitted": fitted} if seen else {})


def _inputs(graph: Graph, kept: set[str], samples: Feeds) -> dict[str, Any]:
    """Rows of what each product reads, float32 [rows, inputs], by the value's name."""
    names = {node.input[0] for node, _ in matrices(graph, kept)}
    computed = sorted(name for name in names if graph.constant(name) is None)
    rows, _ = onnx_smoothing.watched(graph.model, samples, computed, padding=False)
    return {name: np.concatenate(each) for name, each in rows.items() if each}


def _fitted(
    weights: Any, rows: Any, parts: Mapping[str, Any], bits: int, size: int
) -> dict[str, Any] | None:
    """Blocks of ``weights``, float32 [outputs, inputs], that lose less than ``parts`` on rows that
    they were not fitted to; None where there are none.
    """
    if rows is None or len(rows) < _LEAST_ROWS:
        return None
    judged = np.zeros(len(rows), bool)
    judged[::_JUDGES] = True
    own = rows[~judged]
    found, _ = lm_rounding.fit(weights, own.T @ own, size)
    assert found.zeros is not None
    scales = found.scales.astype(np.float32).reshape(-1)
    made = {"blocks": found.packed, "scales": scales, "zeros": found.zeros.reshape(-1)}
    losses = [
        float(((rows[judged] @ (lm_blocks.restored(each) - weights).T) ** 2).sum())
        for each in (found, _as_blocks(parts, weights.shape, bits, size))
    ]
    return made if losses[0] < losses[1] else None


def _as_blocks(parts: Mapping[str, Any], shape: tuple[int, int], bits: int, size: int) -> Blocks:
    outputs, inputs = shape
    scales, zeros = (parts[name].reshape(outputs, -1) for name in ("scales", "zeros"))
    return Blocks(bits, size, inputs, parts["blocks"], scales, zeros)


def matrices(graph: Graph, kept: set[str]) -> Iterator[tuple[Any, Any]]:
    """Every product with a constant float32 matrix, and that matrix as [inputs, outputs]; a taker
    may replace the product meanwhile. Nodes named in ``kept`` are left out.
    """
    for node in list(graph.nodes):
        if node.name in kept or node.op_type not in ("MatMul", "Gemm"):
            continue
        weights = graph.constant(node.input[1])
        if weights is None or weights.ndim != 2 or weights.dtype != np.float32:
            continue
        if node.op_type == "Gemm":
            if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0:
                continue
            if attribute(node, "beta", 1.0) != 1.0:
                continue
            weights = weights.T if attribute(node, "transB", 0) else weights
        yield node, weights


def product(
    graph: Graph,
    node: Any,
    shape: tuple[int, int],
    parts: Mapping[str, Any],
    options: Mapping[str, int],
) -> list[Any]:
    """A MatMulNBits of ``shape`` (inputs, outputs) in the place of ``node``, with the bias of a
    Gemm behind it. ``parts`` are the operator's constants by name, in its order; ``options`` its
    attributes.
    """
    inputs, outputs = shape
    name = node.input[1]
    names = [
        graph.add_constant(f"{name}.{node.name}.{part}", array) for part, array in parts.items()
    ]
    biased = node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]
    out = f"{node.output[0]}.product" if biased else node.output[0]
    found = [
        helper.make_node(
            "MatMulNBits",
            [node.input[0], *names],
            [out],
            name=node.name,
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            **options,
        )
    ]
    if biased:
        found.append(
            helper.make_node("Add", [out, node.input[2]], [node.output[0]], f"{node.name}.bias")
        )
    return found


def quantize_blocks(weights: Any, bits: int, size: int) -> tuple[Any, Any, Any]:
    """float32 [outputs, inputs] -> (uint8 [outputs, blocks, bytes], float32 scales [outputs *
    blocks], uint8 zero points) as MatMulNBits stores them: w = scale (q - zero).
    """
    outputs, inputs = weights.shape
    blocks = -(-inputs // size)
    padded = np.zeros((outputs, blocks * size), np.float32)
    padded[:, :inputs] = weights
    values = padded.reshape(outputs, blocks, size)
    top = (1 << bits) - 1
    low = np.minimum(values.min(axis=2, keepdims=True), 0)
    high = np.maximum(values.max(axis=2, keepdims=True), 0)
    least = np.full((outputs, blocks, 1), np.inf, np.float32)
    scales, zeros = np.ones_like(least), np.zeros_like(least)
    for shrink in _SHRINKS:
        scale = (high - low) * np.float32(shrink) / top
        scale[scale == 0] = 1
        zero = np.clip(np.rint(-low * np.float32(shrink) / scale), 0, top)
        quantized = np.clip(np.rint(values / scale) + zero, 0, top)
        error = ((quantized - zero) * scale - values) ** 2
        total = error.sum(axis=2, keepdims=True)
        better = total < least
        least = np.where(better, total, least)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    quantized = np.clip(np.rint(values / scales) + zeros, 0, top).astype(np.uint8)
    flat = zeros.reshape(outputs, blocks).astype(np.uint8)
    if bits == 4:
        quantized = paired(quantized)
        flat = paired(np.pad(flat, ((0, 0), (0, blocks % 2))))
    return quantized, scales.reshape(-1).astype(np.float32), flat.reshape(-1)


def paired(values: Any) -> Any:
    """Two 4-bit values in a byte, the first in its lower half."""
    return values[..., ::2] | values[..., 1::2] << 4


def quantize_tables(graph: Graph, kept: set[str]) -> int:
    """Rewrite every look-up in a large float table to one in 8 bits with a scale for each row."""
    count = 0
    for node in [each for each in graph.nodes if each.op_type == "Gather"]:
        table = graph.constant(node.input[0])
        if table is None or table.ndim != 2 or table.dtype != np.float32 or node.name in kept:
            continue
        if len(table) < _TABLE_ROWS or attribute(node, "axis", 0) != 0:
            continue
        scales = np.abs(table).max(axis=1, keepdims=True) / np.float32(127)
        scales[scales == 0] = 1
        rows = np.rint(table / scales).astype(np.int8)
        name, out = node.input[0], node.output[0]
        graph.add_constant(f"{name}.{node.name}.rows", rows)
        graph.add_constant(f"{name}.{node.name}.scales", scales.astype(np.float32))
        graph.replace(
            [node],
            [
                helper.make_node(
                    "Gather",
                    [f"{name}.{node.name}.rows", node.input[1]],
                    [f"{out}.row"],
                    node.name,
                ),
                helper.make_node(
                    "Cast", [f"{out}.row"], [f"{out}.float"], f"{node.name}.cast", to=_FLOAT32
                ),
                helper.make_node(
                    "Gather",
                    [f"{name}.{node.name}.scales", node.input[1]],
                    [f"{out}.scale"],
                    f"{node.name}.scale",
                ),
                helper.make_node(
                    "Mul", [f"{out}.float", f"{out}.scale"], [out], f"{node.name}.mul"
                ),
            ],
        )
        count += 1
    if count:
        graph.finish()
    return count
