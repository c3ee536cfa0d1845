"""Traces a torch module into an ONNX file, and proves that both compute the same.

Knows torch's exporter and its options; never where the module comes from, and no quantization.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime

from edgekit import _fs
from edgekit.errors import ExportError, OutOfSpaceError
from edgekit.exporters import parity
from edgekit.exporters.torch_model import TracedModel
from edgekit.formats import onnx as reader

# The newest that the tracing exporter writes well; its graphs of attention run fastest (docs).
OPSET = 17
_ROUNDING = ("Round", "QuantizeLinear")


def write(traced: TracedModel, path: Path) -> None:
    """Write the graph to ``path``, weights inside. Raises ExportError where it cannot be traced."""
    import torch

    try:
        with torch.no_grad(), _quiet():
            torch.onnx.export(
                traced.module,
                traced.example_inputs,
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=list(traced.inputs),
                output_names=list(traced.outputs),
                dynamic_axes={name: dict(axes) for name, axes in traced.dynamic.items()},
                do_constant_folding=True,
            )
    except Exception as error:
        if _fs.is_full(error):
            raise OutOfSpaceError(
                "the disk filled up during the export", hint="free some space and run it again"
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"torch cannot export this model to ONNX: {reason[:200]}",
            hint="the forward must be one path of tensor operations",
        ) from error


def check(traced: TracedModel, path: Path) -> float:
    """The largest difference between torch and the file on the example inputs and on a larger
    batch, as a share of the largest value; of a graph that rounds activations the root of the mean
    square. Raises ParityError when rounding does not explain it.
    """
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load what torch exported: {error}") from error
    rounds = any(node.op_type in _ROUNDING for node in reader.read(path).nodes)
    worst = 0.0
    for inputs in _trials(torch, traced):
        with torch.no_grad(), _quiet():
            found = traced.module(*inputs)
        expected = found if isinstance(found, tuple) else (found,)
        feeds = {n: t.numpy() for n, t in zip(traced.inputs, inputs, strict=True)}
        for name, wanted, got in zip(
            traced.outputs, expected, session.run(list(traced.outputs), feeds), strict=True
        ):
            worst = max(
                worst, parity.difference(name, "ONNX Runtime", wanted.numpy(), got, rounds=rounds)
            )
    return worst


def _trials(torch: Any, traced: TracedModel) -> Iterator[tuple[Any, ...]]:
    """The example as it is, with noise, twice in one batch, and twice as long: where those axes are
    free.
    """
    yield traced.example_inputs
    generator = torch.Generator().manual_seed(0)
    noisy = tuple(
        t + torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for t in traced.example_inputs
    )
    yield noisy
    if all(0 in traced.dynamic.get(name, {}) for name in traced.inputs):
        yield tuple(torch.cat([a, b]) for a, b in zip(traced.example_inputs, noisy, strict=True))
    if all(1 in traced.dynamic.get(name, {}) for name in traced.inputs):
        yield tuple(torch.cat([each, each], dim=1) for each in traced.example_inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of every branch and every constant; ``check`` judges what came of it."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.getLogger("torch.onnx").level
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
