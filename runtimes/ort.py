"""ONNX Runtime as a TensorSession: images, texts and bare tensors in, classes and vectors out.

Must never parse a model before edgekit's own reader has, nor print what the engine says of it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime

from edgekit import _fs, image_input, language_model, machine, preprocess, text_input
from edgekit.errors import InferenceError, LoadError, UsageError
from edgekit.formats import onnx
from edgekit.runtime import LoadParams, TensorSpec
from edgekit.runtimes import cache_file, first_load, ort_lm, pooling
from edgekit.runtimes.text_session import TextSession

# What the engine calls its types -> numpy's words.
_DTYPES = {
    "float": "float32",
    "float16": "float16",
    "double": "float64",
    "bool": "bool",
    "string": "str",
} | {f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_ERRORS_ONLY = 4  # of the log: 3 would print what the errors say already
_TRIAL_S = 0.2  # for each count of threads
_TRIAL_RUNS = 3
_WORTH = 1.05  # so much faster must a larger count be
_FREE_SIZE = 16  # of a free axis while threads are measured


class OrtRuntime:
    """The engine for ONNX files."""

    def load(self, path: Path, params: LoadParams) -> OrtSession | TextSession:
        """Load an ONNX file, the first time in a child process (``first_load``) before this one.
        A language model becomes a Session, any other model a TensorSession.

        Raises SourceError, CorruptArtifactError, UnsafePathError or VersionError for a bad file,
        EngineCrashedError or DeadlineError for one that kills or hangs the engine, LoadError for
        one that it refuses, UsageError for parameters of language models.
        """
        if language_model.is_one(path):
            return ort_lm.load(path, params)
        _check_params(params)
        header = onnx.read(path)
        beside = sorted({tensor.external for tensor in header.initializers if tensor.external})
        first_load.pass_once(
            [path, *(path.parent / name for name in beside)],
            "edgekit.runtimes.ort:attempt",
            {"path": str(path.absolute())},
            version("onnxruntime"),
        )
        threads = params.n_threads or _fastest_threads(path, header)
        return OrtSession(path, threads)


def attempt(path: str) -> None:
    """In the child: load, and run once where the inputs can be made up."""
    _started(Path(path), 1)


def _check_params(params: LoadParams) -> None:
    for field in fields(LoadParams):
        if field.name != "n_threads" and getattr(params, field.name) != field.default:
            raise UsageError(f"{field.name} is for language models; this one takes n_threads alone")
    if params.n_threads is not None and not 1 <= params.n_threads <= 512:
        raise UsageError(f"n_threads must lie between 1 and 512, not {params.n_threads}")


def _started(path: Path, threads: int) -> Any:
    """An engine's session. Raises LoadError."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the engine's own kinds, which have no common base
        raise LoadError(
            f"ONNX Runtime refuses {path}: {_reason(error)}",
            hint="export the model again, or with a newer onnxruntime",
        ) from None


def _reason(error: Exception) -> str:
    """The engine's words in one line, without its numbers."""
    text = " ".join(str(error).split())
    return text.rpartition(" : ")[2][:300] or type(error).__name__


# Threads


def _fastest_threads(path: Path, header: onnx.OnnxHeader) -> int:
    """The count that runs this graph fastest here: measured once, and remembered."""
    counts = sorted({1, max(1, _cores() // 2), _cores()})
    if len(counts) == 1:
        return counts[0]
    file, key = _fs.home("state") / "ort-threads.json", _key(header)
    try:
        known = json.loads(file.read_bytes())
        if known.get(key) in counts:
            return int(known[key])
    except (OSError, ValueError, AttributeError):
        known = {}
    busy = os.getloadavg()[0] > _cores()
    best, best_s = counts[0], math.inf
    for count in counts:
        seconds = _trial(path, count)
        if seconds is None:
            return counts[-1]
        if seconds * _WORTH < best_s:
            best, best_s = count, seconds
    if not busy:
        cache_file.write(file, json.dumps(known | {key: best}, indent=1).encode())
    return best


def _trial(path: Path, threads: int) -> float | None:
    """Seconds of the fastest run on zeros; None where the graph takes no zeros."""
    session = _started(path, threads)
    feeds = {
        spec.name: np.zeros(
            [n if isinstance(n, int) else _FREE_SIZE if axis else 1 for axis, n in _axes(spec)],
            spec.dtype,
        )
        for spec in map(_spec, session.get_inputs())
    }
    best, ends = math.inf, time.perf_counter() + _TRIAL_S
    for turn in range(1 << 20):
        started = time.perf_counter()
        try:
            session.run(None, feeds)
        except Exception:  # other shapes than these are needed: nothing can be measured
            return None
        now = time.perf_counter()
        best = min(best, now - started)
        if now > ends and turn >= _TRIAL_RUNS:
            break
    return best


def _axes(spec: TensorSpec) -> list[tuple[int, int | str | None]]:
    return list(enumerate(spec.shape))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _key(header: onnx.OnnxHeader) -> str:
    """Machine, engine and kind of graph: what a count of threads depends on."""
    types = {tensor.dtype for tensor in header.initializers if len(tensor.shape) > 1}
    parts = [
        machine.cpu(machine.root()).model or "unknown CPU",
        f"{_cores()} cores",
        f"onnxruntime {version('onnxruntime')}",
        f"{len(header.nodes)} nodes",
        f"{header.parameters} weights",
        " ".join(sorted(types)),
    ]
    return "; ".join(parts)


def _spec(found: Any) -> TensorSpec:
    kind = str(found.type).removeprefix("tensor(").removesuffix(")")
    return TensorSpec(found.name, _DTYPES.get(kind, kind), tuple(found.shape))


class OrtSession:
    """A loaded graph with its preprocessing (edgekit.runtime.TensorSession)."""

    def __init__(self, path: Path, threads: int) -> None:
        """Raises LoadError, CorruptArtifactError for a broken preprocess.json."""
        self.threads = threads
        self._preprocessing = preprocess.beside(path)
        self.task: str = self._preprocessing.task
        self._folder = path.parent
        self._tokens: text_input.Tokens | None = None
        self._session = _started(path, threads)
        self.inputs = tuple(map(_spec, self._session.get_inputs()))
        self.outputs = tuple(map(_spec, self._session.get_outputs()))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by name in; numpy arrays by name out, in the order of ``outputs``.

        Raises UsageError for wrong names, shapes or types, InferenceError when the engine fails.
        """
        session = self._opened()
        feeds = self._checked(inputs)
        try:
            found = session.run(None, feeds)
        except Exception as error:
            raise InferenceError(f"ONNX Runtime failed: {_reason(error)}") from None
        return {spec.name: value for spec, value in zip(self.outputs, found, strict=True)}

    def classify(self, what: Any, *, top: int = 5) -> list[tuple[str, float]]:
        """(label, probability) of the likeliest classes; ``what`` as in ``embed``."""
        if not self._preprocessing.task.endswith("classification"):
            raise UsageError(
                f"this model is for {self._preprocessing.task}, it has no classes",
                hint="session.embed() or session.run()",
            )
        if top < 1:
            raise UsageError(f"top must be at least 1, not {top}")
        logits = self._first_output([what])[0].reshape(-1).astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        labels = self._preprocessing.labels
        best = np.argsort(-shares, kind="stable")[:top]
        return [(labels[i] if i < len(labels) else str(i), float(shares[i])) for i in best]

    def embed(self, what: Any) -> list[float] | list[list[float]]:
        """A vector for a text, or for an image (path, bytes, PIL image, array); several for a list
        of them.
        """
        if self._preprocessing.task not in ("text-embedding", "image-features"):
            raise UsageError(
                f"this model is for {self._preprocessing.task}, it makes no vectors",
                hint="session.classify() or session.run()",
            )
        several = isinstance(what, list | tuple)
        vectors = self._vectors(list(what) if several else [what])
        found: list[list[float]] = vectors.tolist()
        return found if several else found[0]

    def _vectors(self, items: list[Any]) -> Any:
        """float32 [len(items), width]."""
        feeds = self._feeds(items)
        return pooling.vectors(self._first(feeds), feeds, self._preprocessing)

    def _first_output(self, items: list[Any]) -> Any:
        return self._first(self._feeds(items))

    def _first(self, feeds: Mapping[str, Any]) -> Any:
        return self.run(feeds)[self.outputs[0].name]

    def _feeds(self, items: list[Any]) -> dict[str, Any]:
        steps = self._preprocessing
        if not items:
            raise UsageError("give at least one input")
        if steps.image:
            images = [image_input.tensor(item, steps.image) for item in items]
            return {steps.image.input: np.concatenate(images)}
        assert steps.text is not None
        if self._tokens is None:
            self._tokens = text_input.Tokens(self._folder, steps.text)
        return self._tokens.tensors(items, [spec.name for spec in self.inputs])

    def _checked(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays, if they are what the graph takes."""
        wanted = {spec.name: spec for spec in self.inputs}
        if set(inputs) != set(wanted):
            raise UsageError(
                f"the model takes the inputs {', '.join(wanted)}, not {', '.join(inputs) or 'none'}"
            )
        feeds = {}
        for name, spec in wanted.items():
            try:
                value = np.asarray(inputs[name])
            except (ValueError, TypeError) as error:
                raise UsageError(f"{name} is no array: {error}") from None
            if value.dtype != spec.dtype:
                if value.dtype.kind != np.dtype(spec.dtype).kind:
                    raise UsageError(f"{name} must be {spec.dtype}, not {value.dtype}")
                value = value.astype(spec.dtype)
            fits = len(value.shape) == len(spec.shape) and all(
                size == dim if isinstance(dim, int) else size > 0
                for size, dim in zip(value.shape, spec.shape, strict=True)
            )
            if not fits:
                shape = ", ".join(str(dim or "?") for dim in spec.shape)
                raise UsageError(f"{name} must have the shape ({shape}), not {value.shape}")
            feeds[name] = value
        return feeds

    def _opened(self) -> Any:
        if self._session is None:
            raise UsageError("the model is closed")
        return self._session

    def close(self) -> None:
        """Free the model; closing twice is fine."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
