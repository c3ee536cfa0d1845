"""How far the inputs of a model's matrices spread: outliers that quantization has to pay for.

Reads the live activations of llama.cpp over a text. Must never write a file or judge a figure.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import _proc
from edgekit.errors import UsageError
from edgekit.formats import gguf
from edgekit.formats.gguf import GgufHeader
from edgekit.ggml_tensor import TYPE_F32, Tensor, op_name
from edgekit.llama_library import libllama
from edgekit.runtime import LoadParams
from edgekit.runtimes import threads as thread_counts
from edgekit.runtimes.llama_engine import Engine
from edgekit.scorer import memory_limit, model_files

_SILENCE_S = 1800
_OP_MUL_MAT = "MUL_MAT"


def outliers(
    path: Path,
    text: str,
    *,
    chunks: int | None = None,
    n_ctx: int = 512,
    threads: int | None = None,
    on_chunk: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Statistics of every matrix's input over the first ``chunks`` (all) x ``n_ctx`` tokens.

    Weight name -> "kurtosis" of all values, E[(x - mean)^4] / variance^2, which is 3 for a normal
    distribution; "max_to_median", the largest of the channels' largest absolute values divided by
    their median (0 where the median is 0); "channels". The first token of each chunk is left out:
    it is unlike all others (https://arxiv.org/abs/2402.17762), and each token is rounded alone.
    Computed in a child process; ``on_chunk`` hears (done, total). Raises UsageError for a text
    shorter than one chunk, and what loading raises.
    """
    found: dict[str, dict[str, float]] = _proc.call(
        "edgekit.runtimes.llama_activations:_outliers",
        {
            "path": str(path),
            "text": text,
            "chunks": chunks,
            "n_ctx": n_ctx,
            "threads": threads,
        },
        silence_s=_SILENCE_S,
        memory_bytes=memory_limit([model_files(path)], n_ctx),
        what="reading activations",
        on_report=lambda message: on_chunk(*message),
    )
    return found


class _Spread:
    """Running moments of all values, and the largest absolute value of each channel."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._powers = np.zeros(4)  # sums of x, x^2, x^3, x^4
        self._largest = np.zeros(channels, dtype=np.float32)

    def add(self, values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Take in rows of [tokens, channels]."""
        exact = values.astype(np.float64)
        squares = exact * exact
        self._powers += [
            exact.sum(),
            squares.sum(),
            np.vdot(squares, exact),
            np.vdot(squares, squares),
        ]
        self._count += values.size
        np.maximum(self._largest, np.abs(values).max(axis=0), out=self._largest)

    def figures(self) -> dict[str, float]:
        mean, square, cube, fourth = self._powers / max(1, self._count)
        variance = square - mean**2
        about_mean = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
        median = float(np.median(self._largest))
        return {
            "kurtosis": float(about_mean / variance**2) if variance > 0 else 0.0,
            "max_to_median": float(self._largest.max()) / median if median > 0 else 0.0,
            "channels": len(self._largest),
        }


class _Watch:
    """Looks at the input of every matrix of the model, as the engine computes with it."""

    def __init__(self) -> None:
        self._spreads: dict[str, _Spread] = {}
        self._same: dict[str, str] = {}
        self._asked: tuple[int, str] = (0, "")

    def __call__(self, pointer: int, asking: bool, _user_data: Any) -> bool:
        """The engine's evaluation callback: first "do you want this node?", then its data."""
        tensor = Tensor.at(pointer)
        if asking:
            return self._wanted(tensor)
        self._add(tensor)
        return True

    def figures(self) -> dict[str, dict[str, float]]:
        """Weight name -> its input's statistics; matrices that share an input share them."""
        own = {name: spread.figures() for name, spread in self._spreads.items()}
        return own | {name: own[first] for name, first in self._same.items()}

    def _wanted(self, tensor: Tensor) -> bool:
        if op_name(tensor.op) != _OP_MUL_MAT:
            return False
        weight, inputs = tensor.source(0), tensor.source(1)
        if not weight.name.endswith(b".weight") or inputs.type != TYPE_F32:
            return False
        name = weight.name.decode()
        # Query, key and value read one input; the engine stops at every node that is wanted.
        if self._asked[0] == tensor.src[1]:
            self._same[name] = self._asked[1]
            return False
        self._asked = (tensor.src[1], name)
        return True

    def _add(self, tensor: Tensor) -> None:
        weight, inputs = tensor.source(0), tensor.source(1)
        columns, rows = inputs.ne[0], inputs.ne[1]
        pointer = ctypes.cast(inputs.data, ctypes.POINTER(ctypes.c_float))
        values = np.ctypeslib.as_array(pointer, shape=(rows, inputs.nb[1] // 4))[1:, :columns]
        name = weight.name.decode()
        self._spreads.setdefault(name, _Spread(columns)).add(values)


class WatchedEngine(Engine):
    """An engine whose every graph node passes ``watch``, its evaluation callback."""

    def __init__(
        self,
        path: Path,
        header: GgufHeader,
        params: LoadParams,
        threads: int,
        watch: Callable[[int, bool, Any], bool],
    ) -> None:
        self._watch = libllama().ggml_backend_sched_eval_callback(watch)  # must outlive the context
        super().__init__(path, header, params, threads=(threads, threads))

    def _context_params(self, params: LoadParams, threads: tuple[int, int]) -> Any:
        wanted = super()._context_params(params, threads)
        wanted.cb_eval = self._watch
        return wanted


def _outliers(
    path: str, text: str, chunks: int | None, n_ctx: int, threads: int | None
) -> dict[str, dict[str, float]]:
    """Child side of ``outliers``."""
    watch = _Watch()
    # Activations are read where they lie, so they must lie in RAM.
    params = LoadParams(n_ctx=n_ctx, n_batch=n_ctx, n_gpu_layers=0)
    header = gguf.read(Path(path))
    count = threads or thread_counts.first_guess()[1]
    engine = WatchedEngine(Path(path), header, params, count, watch)
    tokens = list(engine.tokenize(text, special=False))
    total = min(len(tokens) // n_ctx, chunks or len(tokens))
    if total < 1:
        raise UsageError(f"the text has {len(tokens)} tokens, not even {n_ctx}")
    for chunk in range(total):
        part = tokens[chunk * n_ctx : (chunk + 1) * n_ctx]
        if engine.adds_bos:
            part[0] = engine.bos
        engine.forget(0)
        # The last layer computes only the tokens that have outputs.
        engine.decode(part, 0, outputs=n_ctx)
        _proc.report([chunk + 1, total])
    return watch.figures()
