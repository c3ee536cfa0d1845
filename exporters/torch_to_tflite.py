"""Traces a torch module into a TFLite file, and proves that both compute the same.

Knows litert-torch and the engine; never where the module comes from, and no quantization.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ai_edge_litert.interpreter import Interpreter

from edgekit.errors import ExportError, MissingExtraError
from edgekit.exporters import parity
from edgekit.exporters.silence import silenced
from edgekit.exporters.torch_model import TracedModel
from edgekit.formats import tflite
from edgekit.preprocess import Preprocessing

# Tokens of a text: a graph here has one length, and pays for all of it in every run.
MOST_TOKENS = 128


def length_of(steps: Preprocessing) -> int:
    """Tokens of every text; 0 for a model that reads none."""
    return min(steps.text.max_length, MOST_TOKENS) if steps.text else 0


def fixed(traced: TracedModel) -> TracedModel:
    """The same model for one input at a time, and for texts of one length."""
    text = traced.preprocessing.text
    length = length_of(traced.preprocessing)
    examples = []
    for name, tensor in zip(traced.inputs, traced.example_inputs, strict=True):
        axes = traced.dynamic.get(name, {})
        one = tensor[:1] if 0 in axes else tensor
        if length and 1 in axes:
            one = one.repeat(1, -(-length // one.shape[1]))[:, :length]
        examples.append(one.contiguous())
    steps = traced.preprocessing
    if text:
        steps = replace(steps, text=replace(text, max_length=length, padded=True))
    return replace(traced, example_inputs=tuple(examples), dynamic={}, preprocessing=steps)


def write(traced: TracedModel, path: Path) -> None:
    """Write the graph of a ``fixed`` model to ``path``. Raises ExportError where it cannot be
    traced, MissingExtraError without litert-torch.
    """
    import torch

    try:
        with silenced():
            import litert_torch
        # What it stands on has threads, and warns of every child process from now on. Those of
        # edgekit run another program at once.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    except ImportError as error:
        raise MissingExtraError("tflite-convert", missing=error.name or "litert-torch") from None

    class Named(torch.nn.Module):  # type: ignore[misc]
        """With inputs and outputs by name, which become those of the file's signature."""

        def __init__(self) -> None:
            super().__init__()
            self.module = traced.module

        def forward(self, **tensors: Any) -> Any:
            found = self.module(*(tensors[name] for name in traced.inputs))
            outputs = found if isinstance(found, tuple) else (found,)
            return dict(zip(traced.outputs, outputs, strict=True))

    given = dict(zip(traced.inputs, traced.example_inputs, strict=True))
    try:
        with torch.no_grad(), silenced():
            made = litert_torch.convert(Named().eval(), sample_kwargs=given)
            made.export(str(path))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"litert-torch cannot export this model to TFLite: {reason[:200]}",
            hint="the forward must be one path of tensor operations",
        ) from error


def check(traced: TracedModel, path: Path) -> float:
    """The largest difference between torch and the file on the example inputs and on noise, as a
    share of the largest value; of a graph that rounds activations the root of the mean square.
    Raises ParityError when rounding does not explain it.
    """
    import torch

    rounds = any(operator.kind == "ROUND" for operator in tflite.read(path).main.operators)
    engine = Engine(path.read_bytes())
    worst = 0.0
    for inputs in _trials(torch, traced):
        with torch.no_grad(), silenced():
            found = traced.module(*inputs)
        expected = found if isinstance(found, tuple) else (found,)
        feeds = {n: t.numpy() for n, t in zip(traced.inputs, inputs, strict=True)}
        answers = engine.run(feeds)
        for name, wanted in zip(traced.outputs, expected, strict=True):
            worst = max(
                worst,
                parity.difference(name, "LiteRT", wanted.numpy(), answers[name], rounds=rounds),
            )
    return worst


class Engine:
    """LiteRT with a file of our own making, on one thread."""

    def __init__(self, model: bytes, **options: Any) -> None:
        """``options`` are the interpreter's. Raises ExportError."""
        try:
            with silenced():
                self.interpreter = Interpreter(model_content=model, num_threads=1, **options)
                self.interpreter.allocate_tensors()
                self._run = self.interpreter.get_signature_runner()
        except (ValueError, RuntimeError) as error:
            raise ExportError(f"LiteRT cannot load what was exported: {error}"[:300]) from error
        details = self._run.get_input_details()
        self._dtypes = {name: each["dtype"] for name, each in details.items()}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, in the order of those."""
        given = {name: feeds[name].astype(kind, copy=False) for name, kind in self._dtypes.items()}
        found = self._run(**given)
        return {name: found[name] for name in sorted(found)}


def open_file(path: str) -> None:
    """Open a file and forget it, in a child that the engine may end. Raises ExportError."""
    Engine(Path(path).read_bytes())


def _trials(torch: Any, traced: TracedModel) -> Iterator[tuple[Any, ...]]:
    """The example as it is, and twice with noise."""
    yield traced.example_inputs
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 3.0):
        yield tuple(
            t + scale * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
            for t in traced.example_inputs
        )
