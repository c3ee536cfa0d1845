"""OpenVINO as a TensorSession for ONNX files: the same calls as ONNX Runtime's, other kernels.

Must never parse a model before edgekit's own reader has, nor compute in fewer bits than the file
says: this engine's own default on some processors is bfloat16.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from edgekit import language_model
from edgekit.errors import InferenceError, LoadError, UsageError
from edgekit.formats import onnx
from edgekit.runtime import LoadParams, TensorSpec
from edgekit.runtimes import first_load, graph_threads
from edgekit.runtimes.tensor_session import PreparedSession, check_params

_DEVICE = "CPU"


class OpenVinoRuntime:
    """Another engine for ONNX files."""

    def load(self, path: Path, params: LoadParams) -> OpenVinoSession:
        """Load an ONNX file, the first time in a child process (``first_load``) before this one.

        Raises SourceError, CorruptArtifactError, UnsafePathError or VersionError for a bad file,
        EngineCrashedError or DeadlineError for one that kills or hangs the engine, LoadError for
        one that it refuses, UsageError for parameters of language models.
        """
        if language_model.is_one(path):
            raise UsageError("OpenVINO runs no language models here", hint="leave out --runtime")
        check_params(params)
        header = onnx.read(path)
        first_load.pass_once(
            [path, *(path.parent / name for name in header.beside)],
            "edgekit.runtimes.openvino:attempt",
            {"path": str(path.absolute())},
            _engine(),
        )
        threads = params.n_threads or graph_threads.fastest(
            header, _engine(), lambda count: _trial(path, header, count)
        )
        return OpenVinoSession(path, header, threads)


def attempt(path: str) -> None:
    """In the child: compile."""
    compiled(Path(path), 1)


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
    }


def compiled(path: Path, threads: int, more: dict[str, Any] | None = None) -> Any:
    """The graph, ready to run, with ``more`` of the engine's settings. Raises LoadError."""
    try:
        return _core().compile_model(str(path), _DEVICE, _settings(threads) | (more or {}))
    except Exception as error:  # the engine's own kinds, which have no common base
        raise LoadError(
            f"OpenVINO refuses {path}: {_reason(error)}",
            hint="--runtime ort runs it, or a newer openvino does",
        ) from None


def _reason(error: Exception) -> str:
    """What the engine says last: before it come its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def _trial(path: Path, header: onnx.OnnxHeader, threads: int) -> float | None:
    request = compiled(path, threads).create_infer_request()
    feeds = graph_threads.zeros(_inputs(header))
    return graph_threads.timed(lambda: request.infer(feeds))


def _inputs(header: onnx.OnnxHeader) -> tuple[TensorSpec, ...]:
    """Without constants, which old files list among the inputs."""
    constants = {tensor.name for tensor in header.initializers}
    return tuple(_spec(value) for value in header.inputs if value.name not in constants)


def _spec(value: onnx.OnnxValue) -> TensorSpec:
    return TensorSpec(value.name, "str" if value.dtype == "string" else value.dtype, value.shape)


class OpenVinoSession(PreparedSession):
    """A graph in OpenVINO."""

    def __init__(self, path: Path, header: onnx.OnnxHeader, threads: int) -> None:
        """Raises LoadError, CorruptArtifactError for a broken preprocess.json."""
        super().__init__(path)
        self.threads = threads
        self._request = compiled(path, threads).create_infer_request()
        self.inputs = _inputs(header)
        self.outputs = tuple(map(_spec, header.outputs))

    def _answers(self, feeds: dict[str, Any]) -> list[Any]:
        for name, value in feeds.items():
            # This engine's activations make ordinary numbers of them: the answer would be made up.
            if value.dtype.kind == "f" and value.size and np.isnan(value.min()):
                raise UsageError(f"{name} holds NaN", hint="--runtime ort carries it to the answer")
        try:
            # The engine's own memory is written to again in the next run: answers are copied.
            found = self._request.infer(feeds, share_inputs=True, share_outputs=True)
            return [np.array(found[number]) for number in range(len(self.outputs))]
        except Exception as error:
            raise InferenceError(f"OpenVINO failed: {_reason(error)}") from None

    def _let_go(self) -> None:
        self._request = None
