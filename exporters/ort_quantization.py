"""What the package onnxruntime does for the quantizers: shapes, answers, and its errors as ours.

Must never decide what is quantized, nor how.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgekit import _fs
from edgekit.errors import ExportError, OutOfSpaceError, RecipeError

Feeds = Sequence[Mapping[str, Any]]
# Products of two activations stay float: attention is better fused. What an operator of another
# domain makes is float where nobody says more (TensorProto.FLOAT).
OPTIONS: dict[str, Any] = {"MatMulConstBOnly": True, "DefaultTensorType": 1}
_FULL_BYTES = 1 << 16  # a disk with less is one that filled up


def prepared(source: Path, folder: Path) -> Path:
    """A copy with the shape of every value, which the library looks up."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    out = folder / "prepared.onnx"
    with failing(folder):
        quant_pre_process(source, out, skip_symbolic_shape=True)
    return out


def session(model: Any) -> Any:
    """An engine's session of a file, or of a ModelProto. Raises what the engine raises."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    graph = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], enable_fallback=0
    )


def answers(model: Any, feeds: Feeds) -> list[Any]:
    """The first output of every sample, flat float64."""
    with failing():
        engine = session(model)
        return [engine.run(None, dict(feed))[0].astype(np.float64).ravel() for feed in feeds]


def rows(value: Any, feed: Mapping[str, Any]) -> Any:
    """A value [batch, tokens, ..., channels] as [rows, channels], without the tokens that only pad
    a text: no answer is made of them, and there are many.
    """
    mask = feed.get("attention_mask")
    if mask is not None and value.ndim > 2 and value.shape[:2] == mask.shape:
        value = value[mask.astype(bool)]
    return value.reshape(-1, value.shape[-1])


def loss(wanted: list[Any], found: list[Any]) -> float:
    """Mean squared error of answers as a share of the mean square."""
    error = sum(float(((a - b) ** 2).sum()) for a, b in zip(wanted, found, strict=True))
    return error / max(1e-30, sum(float((a**2).sum()) for a in wanted))


@contextlib.contextmanager
def failing(folder: Path | None = None) -> Iterator[None]:
    """Whatever the library raises becomes one ExportError; ``folder`` is where it writes."""
    try:
        yield
    except (ExportError, RecipeError):  # a full disk among them
        raise
    except Exception as error:  # the library's asserts, and the engine's own kinds
        # The library writes through streams that do not say so, and then reads half a file.
        if _fs.is_full(error) or (folder and _fs.free_bytes(folder) < _FULL_BYTES):
            raise OutOfSpaceError(
                "the disk filled up during the export", hint="free some space and run it again"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ExportError(f"onnxruntime cannot quantize this graph: {reason[:200]}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The library prints advice, and warns through the root logger."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
