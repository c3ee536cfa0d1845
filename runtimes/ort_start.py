"""Starts ONNX Runtime on a file; what its optimizer made of the graph is kept for the next start.

Knows the engine's switches and its words; never what a model is for. What is kept holds for the
same bytes, engine, processor and switches (``compiled_cache``); where it is gone or damaged, it is
made again, and where there is no room for it, the engine starts as it would without.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime

from edgekit.errors import LoadError
from edgekit.runtimes import compiled_cache

_log = logging.getLogger("edgekit.runtime")
_ERRORS_ONLY = 4  # of the log: 3 would print what the errors say already
# The engine's own fusion of a residual's addition into the layer norm: its kernel takes several
# times as long as the two operators (docs/onnx.md, Fusion).
SLOW_FUSIONS = ("SkipLayerNormFusion",)
# The engine's own form of a graph, which it reads faster than ONNX.
_FILE = "model.ort"
_MOST_BYTES = 512 << 20  # of a model that is kept: larger ones spend their start on reading


def engine() -> str:
    """Its name and version."""
    return f"onnxruntime {version('onnxruntime')}"


def key(files: Sequence[Path]) -> str:
    """What the optimized graph of ``files`` (the model first) is kept as; empty for a model that is
    too large to keep.
    """
    if sum(file.stat().st_size for file in files) > _MOST_BYTES:
        return ""
    return compiled_cache.key(files, engine(), "CPU", *SLOW_FUSIONS, _FILE)


def started(path: Path, threads: int, kept: str) -> Any:
    """An engine's session; ``kept`` is the model's ``key``. Raises LoadError."""
    if not kept:
        return _session(path, threads)
    folder = compiled_cache.find(kept)
    if folder is not None:
        try:
            return _optimized(folder / _FILE, threads)
        except LoadError as error:  # of another build of the engine, or damaged: it is made again
            _log.info("the optimized graph in %s is of no use: %s", folder, error.message)
    made: list[Any] = []
    compiled_cache.keep(kept, lambda into: made.append(_session(path, threads, into / _FILE)))
    return made[0] if made else _session(path, threads)


def _session(path: Path, threads: int, optimized: Path | None = None) -> Any:
    """``optimized`` is where the engine writes what it made of the graph."""
    options = options_for(threads)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return opened(path, options, disabled_optimizers=list(SLOW_FUSIONS))


def _optimized(path: Path, threads: int) -> Any:
    options = options_for(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return opened(path, options)


def options_for(threads: int) -> Any:
    """The engine's own SessionOptions: quiet, one operator at a time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    return options


def opened(path: Path, options: Any, **more: Any) -> Any:
    """An engine's session as it comes, nothing kept. Raises LoadError."""
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0, **more
        )
    except Exception as error:  # the engine's own kinds, which have no common base
        raise LoadError(
            f"ONNX Runtime refuses {path}: {reason(error)}",
            hint="export the model again, or with a newer onnxruntime",
        ) from None


def reason(error: Exception) -> str:
    """The engine's words in one line, without its numbers."""
    text = " ".join(str(error).split())
    return text.rpartition(" : ")[2][:300] or type(error).__name__
