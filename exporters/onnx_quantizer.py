"""Quantizes an ONNX file: which scheme, which operators, and what is better left in float.

Decides and compares; static and dynamic int8 are written by onnxruntime.quantization, blocks of
weights by ``onnx_blocks``. Never knows where a model comes from.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgekit import _fs
from edgekit.errors import ExportError, OutOfSpaceError, RecipeError
from edgekit.exporter import Progress
from edgekit.exporters import (
    onnx_blocks,
    onnx_channels,
    onnx_graph,
    onnx_grid,
    onnx_products,
    onnx_smoothing,
)
from edgekit.exporters.onnx_graph import Graph

Feeds = Sequence[Mapping[str, Any]]
_FLOAT = "F32"
_MATRICES = ("MatMul", "Gemm")
_BLOCKS = {"weight_only_wi8b32": 8, "weight_only_wi4b32": 4}
# How the range of an activation is found (the whole of it, or without the rarest values), and
# whether weights have 7 bits, for some kernels add products of 8 bits up in 16.
_VARIANTS = (("MinMax", False), ("MinMax", True), ("Percentile", True))
_PERCENTILE = 99.99
# Products of two activations stay float: attention is better fused. What an operator of another
# domain makes is float where nobody says more (TensorProto.FLOAT).
_OPTIONS: dict[str, Any] = {"MatMulConstBOnly": True, "DefaultTensorType": 1}
# A kernel of the quantized graph that takes less than this part of all weights may stay float.
_SMALL = 0.02
_DYNAMIC_BITS = 7  # of a weight
_TRIALS = 16  # samples that variants are compared on


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

    ``samples`` are inputs by name, which static schemes need and dynamic ones smooth outliers by.
    ``overrides`` are pairs of a regular expression on names of nodes and "F32", which keeps those
    in float.
    Raises RecipeError, ExportError.
    """
    kept = _kept(source, overrides)
    progress("quantize", 0, 1)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=out.parent) as folder, _quiet():
        if scheme == "F16":
            model, facts = _half(source), {}
        elif scheme in _BLOCKS:
            model = onnx_graph.load(source)
            facts = onnx_blocks.apply(Graph(model), _BLOCKS[scheme], kept)
        elif scheme == "weight_only_wi8_afp32":
            model = onnx_graph.load(source)
            facts = onnx_channels.apply(Graph(model), kept)
        elif scheme == "weight_only_wi4_afp32":
            model = onnx_graph.load(source)
            facts = onnx_grid.apply(Graph(model), kept)
        elif scheme == "dynamic_wi8_afp32":
            model, facts = _dynamic(source, Path(folder), kept, samples)
        elif onnx_graph.is_convolutional(source):
            model, facts = _static(source, Path(folder), kept, samples, progress)
        else:
            with _failing():
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

    with _failing():
        return convert_float_to_float16(onnx_graph.load(source), keep_io_types=True)


# Dynamic: the range of an activation is found anew in every run


def _dynamic(
    source: Path, folder: Path, kept: set[str], samples: Feeds
) -> tuple[Any, dict[str, Any]]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared, out = _prepared(source, folder), folder / "dynamic.onnx"
    with _failing():
        smoothed = onnx_graph.load(prepared)
        count = onnx_smoothing.apply(smoothed, samples, kept, _DYNAMIC_BITS)
        onnx_graph.save(smoothed, prepared)
    with _failing():
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
            extra_options=dict(_OPTIONS),
        )
    model = onnx_graph.load(out)
    tables = onnx_blocks.quantize_tables(Graph(model), kept)
    matrices = _count(model, "MatMulInteger")
    return model, {"matrices": matrices, "tables": tables, "smoothed": count}


# Static: ranges are measured on samples


def _static(
    source: Path, folder: Path, kept: set[str], samples: Feeds, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    if not samples:
        raise ExportError("static quantization needs samples")
    prepared = _prepared(source, folder)
    trials = samples[:_TRIALS]
    wanted = _run(prepared, trials)
    found: list[tuple[float, Path, tuple[str, bool], set[str]]] = []

    def attempt(variant: tuple[str, bool], floats: set[str]) -> None:
        progress("calibrate", len(found), len(_VARIANTS) + 1)
        out = folder / f"static-{len(found)}.onnx"
        with _failing():
            _write_static(prepared, out, variant, samples, kept | floats)
        found.append((_loss(wanted, _run(out, trials)), out, variant, floats))

    for variant in _VARIANTS:
        attempt(variant, set())
    if ends := _ends(prepared):
        attempt(min(found, key=_first)[2], ends)
    progress("calibrate", len(_VARIANTS) + 1, len(_VARIANTS) + 1)
    loss, out, (calibrator, reduced), floats = min(found, key=_first)
    return onnx_graph.load(out), {
        "calibrator": calibrator,
        "weight_bits": 7 if reduced else 8,
        "kept_float": sorted(floats),
        "calibration_loss": float(f"{loss:.6g}"),
    }


def _first(row: tuple[float, *tuple[Any, ...]]) -> float:
    return row[0]


def _write_static(
    prepared: Path, out: Path, variant: tuple[str, bool], samples: Feeds, kept: set[str]
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    calibrator, reduced = variant
    options = dict(_OPTIONS)
    if calibrator == "Percentile":
        options["CalibPercentile"] = _PERCENTILE
    quantize_static(
        prepared,
        out,
        _Reader(samples),
        quant_format=QuantFormat.QDQ,
        # Signed activations have no fast kernel on x86, and are no faster elsewhere.
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduced,
        calibrate_method=CalibrationMethod[calibrator],
        nodes_to_exclude=sorted(kept),
        extra_options=options,
    )


class _Reader:
    """What the library asks for one sample after the other."""

    def __init__(self, samples: Feeds) -> None:
        self._samples = iter(samples)

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._samples, None)


def _ends(path: Path) -> set[str]:
    """The first and the last operator with weights, where they are small beside the rest: they see
    raw pixels and decide between classes.
    """
    graph = Graph(onnx_graph.load(path))
    sizes: dict[str, int] = {}
    for node in graph.nodes:
        if node.op_type in ("Conv", *_MATRICES) and len(node.input) > 1:
            weights = graph.constant(node.input[1])
            if weights is not None:
                sizes[node.name] = weights.size
    names = list(sizes)
    if len(names) < 3:
        return set()
    total = sum(sizes.values())
    return {name for name in (names[0], names[-1]) if sizes[name] < _SMALL * total}


def _run(path: Path, feeds: Feeds) -> list[Any]:
    """The first output of every sample, flat."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with _failing():
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        return [session.run(None, dict(feed))[0].astype(np.float64).ravel() for feed in feeds]


def _loss(wanted: list[Any], found: list[Any]) -> float:
    """Mean squared error as a share of the mean square."""
    error = sum(float(((a - b) ** 2).sum()) for a, b in zip(wanted, found, strict=True))
    return error / max(1e-30, sum(float((a**2).sum()) for a in wanted))


# The library


def _prepared(source: Path, folder: Path) -> Path:
    """With the shape of every value, which the library looks up."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    out = folder / "prepared.onnx"
    with _failing():
        quant_pre_process(source, out, skip_symbolic_shape=True)
    return out


def _count(model: Any, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph.node)


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except (ExportError, RecipeError):  # a full disk among them
        raise
    except Exception as error:  # the library's asserts, and the engine's own kinds
        if _fs.is_full(error):
            raise OutOfSpaceError(
                "the disk filled up during the export", hint="free some space and run it again"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ExportError(f"onnxruntime cannot quantize this graph: {reason[:200]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library prints advice, and warns through the root logger."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
