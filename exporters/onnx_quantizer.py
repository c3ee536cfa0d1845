"""Quantizes an ONNX file: which scheme, which operators, and what is better left in float.

Decides which of its neighbours writes a scheme; dynamic int8 is onnxruntime.quantization's. Never
knows where a model comes from.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit import quant
from edgekit.errors import RecipeError
from edgekit.exporter import Progress
from edgekit.exporters import (
    onnx_blocks,
    onnx_channels,
    onnx_graph,
    onnx_grid,
    onnx_products,
    onnx_smoothing,
    onnx_static,
    ort_quantization,
)
from edgekit.exporters.onnx_graph import Graph
from edgekit.exporters.ort_quantization import failing, quiet

Feeds = Sequence[Mapping[str, Any]]
_FLOAT = "F32"
_MATRICES = ("MatMul", "Gemm")
_DYNAMIC_BITS = 7  # of a weight


def quantize(
    source: Path,
    out: Path,
    scheme: str,
    *,
    samples: Feeds = (),
    overrides: Sequence[tuple[str, str]] = (),
    progress: Progress,
) -> dict[str, Any]:
    """Write ``source`` to ``out`` in ``scheme``, a name of ``quant.ONNX_TYPES``; facts for the
    manifest.

    ``samples`` are inputs by name, which static schemes need, dynamic ones smooth outliers by, and
    blocks of 4 bits are fitted to.
    ``overrides`` are pairs of a regular expression on names of nodes and "F32", which keeps those
    in float.
    Raises RecipeError, ExportError.
    """
    kept = _kept(source, overrides)
    progress("quantize", 0, 1)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=out.parent) as folder, quiet():
        if scheme == "F16":
            model, facts = _half(source), {}
        elif blocks := quant.blocks(scheme):
            model = onnx_graph.load(source)
            facts = onnx_blocks.apply(Graph(model), *blocks, kept, samples)
        elif scheme == "weight_only_wi8_afp32":
            model = onnx_graph.load(source)
            facts = onnx_channels.apply(Graph(model), kept)
        elif scheme == "weight_only_wi4_afp32":
            model = onnx_graph.load(source)
            facts = onnx_grid.apply(Graph(model), kept)
        elif scheme == "dynamic_wi8_afp32":
            model, facts = _dynamic(source, Path(folder), kept, samples)
        elif onnx_graph.is_convolutional(source):
            model, facts = onnx_static.write(source, Path(folder), kept, samples, progress)
        else:
            with failing():
                model, facts = onnx_products.apply(onnx_graph.load(source), samples, kept, progress)
    onnx_graph.save(model, out)
    progress("quantize", 1, 1)
    return facts | {"kept_float": sorted(set(facts.get("kept_float", ())) | kept)}


def _kept(source: Path, overrides: Sequence[tuple[str, str]]) -> set[str]:
    """Names of the nodes that an override keeps in float."""
    if not overrides:
        return set()
    for _, kind in overrides:
        if kind.upper() != _FLOAT:
            raise RecipeError(f"an ONNX override can only be {_FLOAT}, not {kind}")
    names = [node.name for node in onnx_graph.load(source).graph.node]
    found = {name for pattern, _ in overrides for name in names if re.search(pattern, name)}
    if not found:
        raise RecipeError("no node has a name that an override matches")
    return found


def _half(source: Path) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with failing():
        return convert_float_to_float16(onnx_graph.load(source), keep_io_types=True)


# Dynamic: the range of an activation is found anew in every run


def _dynamic(
    source: Path, folder: Path, kept: set[str], samples: Feeds
) -> tuple[Any, dict[str, Any]]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared, out = ort_quantization.prepared(source, folder), folder / "dynamic.onnx"
    with failing(folder):
        smoothed = onnx_graph.load(prepared)
        count = onnx_smoothing.apply(smoothed, samples, kept, _DYNAMIC_BITS)
        onnx_graph.save(smoothed, prepared)
    with failing(folder):
        quantize_dynamic(
            prepared,
            out,
            # A convolution with a range of its own in every run is slower than in float.
            op_types_to_quantize=list(_MATRICES),
            per_channel=True,
            # x86 without VNNI adds products of 8 bits up in 16, where only 7 bits are safe:
            # https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
            # Without a sign 8 would be safe, at half the speed on x86 with VNNI (measured).
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted(kept),
            extra_options=dict(ort_quantization.OPTIONS),
        )
    model = onnx_graph.load(out)
    tables = onnx_blocks.quantize_tables(Graph(model), kept)
    matrices = _count(model, "MatMulInteger")
    return model, {"matrices": matrices, "tables": tables, "smoothed": count}


def _count(model: Any, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)
