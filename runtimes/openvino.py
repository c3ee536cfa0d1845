"""OpenVINO as a TensorSession for ONNX files: the same calls as ONNX Runtime's, other kernels.

Must never parse a model before edgekit's own reader has, nor compute in fewer bits than the file
says: this engine's own default on some processors is bfloat16.
"""

from __future__ import annotations

import functools
import io
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from edgekit import _fs, language_model, preprocess
from edgekit.errors import InferenceError, LoadError, UsageError
from edgekit.formats import onnx
from edgekit.runtime import LoadParams, TensorSpec
from edgekit.runtimes import compiled_cache, first_load, graph_threads
from edgekit.runtimes.tensor_session import PreparedSession, check_params

_DEVICE = "CPU"
_BLOB = "model.blob"
# Activations that share a scale where the engine rounds them itself: its own 32 is slower and, on
# all-MiniLM-L6-v2 and a ViT, no better.
_GROUP = 64
_log = logging.getLogger("edgekit.runtime")


class OpenVinoRuntime:
    """Another engine for ONNX files."""

    def load(self, path: Path, params: LoadParams) -> OpenVinoSession:
        """Load an ONNX file, the first time in a child process (``first_load``) before this one.

        Raises SourceError, CorruptArtifactError, UnsafePathError or VersionError for a bad file,
        EngineCrashedError or DeadlineError for one that kills or hangs the engine, LoadError for
        one that it refuses, UsageError for language models and their parameters.
        """
        if language_model.is_one(path):
            raise UsageError("OpenVINO runs no language models here", hint="leave out --runtime")
        check_params(params)
        header = onnx.read(path)
        files = [path, *(path.parent / name for name in header.beside)]
        graph = Graph(path, header, compiled_cache.key(files, _engine()))
        first_load.pass_once(
            files,
            "edgekit.runtimes.openvino:attempt",
            {"path": str(path.absolute()), "key": graph.key},
            _engine(),
        )
        threads = params.n_threads or graph_threads.fastest(header, _engine(), graph.trial)
        return OpenVinoSession(graph, threads)


def attempt(path: str, key: str) -> None:
    """In the child: compile, and keep what came of it for the parent and for later loads."""
    graph = Graph(Path(path), onnx.read(Path(path)), key)
    stream = io.BytesIO()
    graph.compiled(1, one_image=graph.takes_images).export_model(stream)
    compiled_cache.keep(key, lambda folder: _fs.write_atomic(folder / _BLOB, stream.getvalue()))


def _engine() -> str:
    return f"openvino {version('openvino')}"


@functools.cache
def _core() -> Any:
    return openvino.Core()


def _settings(threads: int) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP,
    }


class Graph:
    """A model file, and what the engine made of it in earlier processes.

    Kernels for one known shape are faster than those for any: a model of images is compiled for
    single ones, and for batches only when the first comes.
    """

    def __init__(self, path: Path, header: onnx.OnnxHeader, key: str) -> None:
        self.path, self.key = path, key
        constants = {tensor.name for tensor in header.initializers}  # old files list them, too
        self.inputs = tuple(_spec(each) for each in header.inputs if each.name not in constants)
        self.outputs = tuple(map(_spec, header.outputs))
        shapes = [spec.shape for spec in self.inputs]
        self.takes_images = (
            preprocess.beside(path).image is not None
            and len(shapes) == 1
            and all(isinstance(size, int) for size in shapes[0][1:])
        )

    def compiled(
        self, threads: int, *, one_image: bool = False, more: dict[str, Any] | None = None
    ) -> Any:
        """Ready to run, with ``more`` of the engine's settings. Raises LoadError."""
        try:
            model = _core().read_model(str(self.path))
            if one_image:
                model.reshape([1, *self.inputs[0].shape[1:]])
            return _core().compile_model(model, _DEVICE, _settings(threads) | (more or {}))
        except Exception as error:  # the engine's own kinds, which have no common base
            raise LoadError(
                f"OpenVINO refuses {self.path}: {_reason(error)}",
                hint="--runtime ort runs it, or a newer openvino does",
            ) from None

    def opened(self, threads: int) -> Any:
        """For single images, or for any input of another kind: what an earlier load kept, where
        there is that.
        """
        folder = compiled_cache.find(self.key)
        if folder is not None:
            try:
                blob = io.BytesIO((folder / _BLOB).read_bytes())
                return _core().import_model(blob, _DEVICE, _settings(threads))
            except Exception:  # damaged, or of another build of the engine: it is made again
                _log.info("the compiled model in %s is of no use", folder)
        return self.compiled(threads, one_image=self.takes_images)

    def trial(self, threads: int) -> float | None:
        """Seconds of the fastest run on zeros (``graph_threads.Trial``)."""
        request = self.opened(threads).create_infer_request()
        feeds = graph_threads.zeros(self.inputs)
        return graph_threads.timed(lambda: request.infer(feeds))


def _reason(error: Exception) -> str:
    """What the engine says last: before it come its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _spec(value: onnx.OnnxValue) -> TensorSpec:
    return TensorSpec(value.name, "str" if value.dtype == "string" else value.dtype, value.shape)


class OpenVinoSession(PreparedSession):
    """A graph in OpenVINO."""

    def __init__(self, graph: Graph, threads: int) -> None:
        """Raises LoadError, CorruptArtifactError for a broken preprocess.json."""
        super().__init__(graph.path)
        self.threads = threads
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self._graph = graph
        self._usual: Any = graph.opened(threads).create_infer_request()
        self._batches: Any = None

    def _answers(self, feeds: dict[str, Any]) -> list[Any]:
        for name, value in feeds.items():
            # This engine's activations make ordinary numbers of them: the answer would be made up.
            if value.dtype.kind == "f" and value.size and np.isnan(value.min()):
                raise UsageError(f"{name} holds NaN", hint="--runtime ort carries it to the answer")
        request = self._request(feeds)
        try:
            # The engine's own memory is written to again in the next run: answers are copied.
            found = request.infer(feeds, share_inputs=True, share_outputs=True)
            return [np.array(found[number]) for number in range(len(self.outputs))]
        except Exception as error:
            raise InferenceError(f"OpenVINO failed: {_reason(error)}") from None

    def _request(self, feeds: dict[str, Any]) -> Any:
        if not self._graph.takes_images or len(next(iter(feeds.values()))) == 1:
            return self._usual
        if self._batches is None:
            self._batches = self._graph.compiled(self.threads).create_infer_request()
        return self._batches

    def _let_go(self) -> None:
        self._usual = self._batches = None
