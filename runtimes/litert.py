"""LiteRT as a TensorSession, with XNNPACK's kernels: images, texts and bare tensors in, classes and
vectors out.

Must never parse a model before edgekit's own reader has, nor print what the engine says of it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import (
    InferenceError,
    LoadError,
    MissingExtraError,
    UnsupportedModelError,
    UsageError,
)
from edgekit.formats import tflite
from edgekit.formats.foreign import shown
from edgekit.runtime import LoadParams, TensorSpec
from edgekit.runtimes import first_load, graph_threads
from edgekit.runtimes.tensor_session import PreparedSession, check_params

# The engine, and its predecessor of the same interface: what is installed is taken.
_PREDECESSOR = "tflite-runtime"
_ENGINES = {"ai_edge_litert": "ai-edge-litert", "tflite_runtime": _PREDECESSOR}
_log = logging.getLogger("edgekit.runtime")


def _installed() -> Any:
    for package in _ENGINES:
        try:
            return importlib.import_module(f"{package}.interpreter")
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
    raise MissingExtraError("tflite", missing="ai-edge-litert")


_LIBRARY = _installed()
_BATCH = "batch"


class LiteRtRuntime:
    """The engine for TFLite files."""

    def load(self, path: Path, params: LoadParams) -> LiteRtSession:
        """Load a TFLite file, the first time in a child process (``first_load``) before this one.

        Raises SourceError, CorruptArtifactError or VersionError for a bad file, EngineCrashedError
        or DeadlineError for one that kills or hangs the engine, LoadError for one that it refuses,
        UnsupportedModelError for one with inputs that are no arrays, UsageError for parameters of
        language models.
        """
        check_params(params)
        header = tflite.read(path)
        _check_ends(path, header)
        name = _engine()
        if name.startswith(_PREDECESSOR):
            _log.warning(
                "%s is older than today's files, and may compute some wrongly without a word:"
                " pip install ai-edge-litert, or check with edgekit verify --deep",
                name,
            )
        first_load.pass_once(
            [path], "edgekit.runtimes.litert:attempt", {"path": str(path.absolute())}, name
        )
        threads = params.n_threads or graph_threads.fastest(
            header, name, lambda count: _trial(path, header, count)
        )
        return LiteRtSession(path, header, threads)


def _engine() -> str:
    """Name and version."""
    distribution = _ENGINES[_LIBRARY.__name__.partition(".")[0]]
    return f"{distribution} {version(distribution)}"


def attempt(path: str) -> None:
    """In the child: load, and run once on zeros."""
    file = Path(path)
    header = tflite.read(file)
    graph = _Graph(file, header, 1)
    graph.run(graph_threads.zeros(_specs(header, "inputs")))


def _check_ends(path: Path, header: tflite.TfliteHeader) -> None:
    """Raises UnsupportedModelError for inputs and outputs that numpy has no arrays for."""
    for name, number in (*header.inputs.items(), *header.outputs.items()):
        dtype = header.main.tensors[number].dtype
        try:
            np.dtype(dtype)
        except TypeError:
            raise UnsupportedModelError(
                f"{path.name}: {shown(name)} is of the type {dtype}, which no array can have"
            ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The engine writes a line on stderr for every model that it opens, and has no switch."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _specs(header: tflite.TfliteHeader, which: str) -> list[TensorSpec]:
    tensors = header.main.tensors
    ends: dict[str, int] = getattr(header, which)
    return [
        TensorSpec(name, tensors[number].dtype, tensors[number].shape)
        for name, number in ends.items()
    ]


class _Graph:
    """The engine's own object, and the numbers of its ends."""

    def __init__(self, path: Path, header: tflite.TfliteHeader, threads: int) -> None:
        """Raises LoadError."""
        self._inputs, self._outputs = header.inputs, header.outputs
        try:
            with quiet():
                self._engine = _LIBRARY.Interpreter(model_path=str(path), num_threads=threads)
                self._engine.allocate_tensors()
        except (ValueError, RuntimeError, TypeError) as error:
            raise LoadError(
                f"LiteRT refuses {path}: {_reason(error)}",
                hint="export the model again, or with a newer ai-edge-litert",
            ) from None
        self._shapes = {
            name: tuple(n or 1 for n in header.main.tensors[number].shape)
            for name, number in self._inputs.items()
        }

    def run(self, feeds: Mapping[str, Any]) -> list[Any]:
        """The outputs, in order. Raises InferenceError."""
        try:
            for name, value in feeds.items():
                if value.shape != self._shapes[name]:
                    self._engine.resize_tensor_input(self._inputs[name], value.shape)
                    self._engine.allocate_tensors()
                    self._shapes[name] = value.shape
            for name, value in feeds.items():
                self._engine.set_tensor(self._inputs[name], value)
            self._engine.invoke()
            return [self._engine.get_tensor(number) for number in self._outputs.values()]
        except (ValueError, RuntimeError, TypeError) as error:
            raise InferenceError(f"LiteRT failed: {_reason(error)}") from None


class Inside:
    """A graph whose every value can be seen: the engine's own kernels, without XNNPACK, which shows
    nothing of what it runs.
    """

    def __init__(self, path: Path, header: tflite.TfliteHeader) -> None:
        """Raises LoadError."""
        self._inputs = header.inputs
        try:
            with quiet():
                self._engine = _LIBRARY.Interpreter(
                    model_path=str(path),
                    num_threads=1,
                    experimental_op_resolver_type=(
                        _LIBRARY.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
                    ),
                    experimental_preserve_all_tensors=True,
                )
                self._engine.allocate_tensors()
        except (ValueError, RuntimeError, TypeError) as error:
            raise LoadError(f"LiteRT refuses {path}: {_reason(error)}") from None
        self._details = {each["index"]: each for each in self._engine.get_tensor_details()}

    def run(self, feeds: Mapping[str, Any], wanted: Iterable[int]) -> dict[int, Any]:
        """Values by the numbers of their tensors, as floats; those of another kind are left out.
        Raises InferenceError.
        """
        try:
            for name, value in feeds.items():
                self._engine.set_tensor(self._inputs[name], value)
            self._engine.invoke()
            return {
                number: self._as_floats(number)
                for number in wanted
                if self._details[number]["dtype"] in (np.float32, np.int8, np.uint8, np.int16)
            }
        except (ValueError, RuntimeError, TypeError) as error:
            raise InferenceError(f"LiteRT failed: {_reason(error)}") from None

    def _as_floats(self, number: int) -> Any:
        value = self._engine.get_tensor(number)
        how = self._details[number]["quantization_parameters"]
        scales, zeros = how["scales"], how["zero_points"]
        if len(scales) != 1:
            return value.astype(np.float32)
        return (value.astype(np.float32) - np.float32(zeros[0])) * np.float32(scales[0])


def _reason(error: Exception) -> str:
    """The engine's words in one line, without the places in its sources."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _trial(path: Path, header: tflite.TfliteHeader, threads: int) -> float | None:
    graph = _Graph(path, header, threads)
    feeds = graph_threads.zeros(_specs(header, "inputs"))
    return graph_threads.timed(lambda: graph.run(feeds))


class LiteRtSession(PreparedSession):
    """A loaded graph with its preprocessing. A graph for one input at a time takes batches too: it
    runs them one by one.
    """

    def __init__(self, path: Path, header: tflite.TfliteHeader, threads: int) -> None:
        """Raises LoadError, CorruptArtifactError for a broken preprocess.json."""
        super().__init__(path)
        self.threads = threads
        self._graph: _Graph | None = _Graph(path, header, threads)
        inputs, outputs = (_specs(header, which) for which in ("inputs", "outputs"))
        self._one_by_one = bool(inputs) and all(
            spec.shape[:1] == (1,) for spec in (*inputs, *outputs)
        )
        if self._one_by_one:
            inputs, outputs = (list(map(_for_any_batch, specs)) for specs in (inputs, outputs))
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def _answers(self, feeds: dict[str, Any]) -> list[Any]:
        assert self._graph is not None
        if not self._one_by_one:
            return self._graph.run(feeds)
        sizes = {len(value) for value in feeds.values()}
        if len(sizes) != 1:
            raise UsageError(f"the inputs are batches of different sizes: {sorted(sizes)}")
        (size,) = sizes
        parts = [
            self._graph.run({name: value[i : i + 1] for name, value in feeds.items()})
            for i in range(size)
        ]
        return (
            parts[0] if size == 1 else [np.concatenate(each) for each in zip(*parts, strict=True)]
        )

    def _let_go(self) -> None:
        self._graph = None


def _for_any_batch(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, (_BATCH, *spec.shape[1:]))
