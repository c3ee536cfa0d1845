"""Where the engine's time goes: every operator of its graph timed, by kind, weight and layer.

Knows the evaluation callback and tensors' names; never how times are shown. Runs in a child
process, for the model may crash the engine.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekit import _proc
from edgekit.errors import InferenceError, LoadError, UsageError
from edgekit.formats.ggml_types import TYPES
from edgekit.ggml_tensor import Tensor, op_name
from edgekit.llama_library import Threadpools, libllama, recent_log

_FLASH_AUTO = -1
# They only look at data in another way: the engine skips them.
_EMPTY = ("NONE", "RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE")
_PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")
_WEIGHT = re.compile(r"(?:blk\.(\d+)\.)?([\w.]+)\.weight$")
_OF_LAYER = re.compile(r"(?:-|_l)(\d+)\b")
_MAX_BATCH = 512
_ROUNDS = 3
_COUNTING_TOKENS = 32

# (operator, kind of weight, tensor type, layer): its times and how often it ran.
Key = tuple[str, str, str, int | None]


class _Stopwatch:
    """The engine's evaluation callback: asks to stop after every real operator, and times it."""

    def __init__(self) -> None:
        self.seconds: dict[Key, float] = {}
        self.counts: dict[Key, int] = {}
        self._layer: int | None = None
        self._started = 0.0

    def __call__(self, pointer: int, asking: bool, _user_data: Any) -> bool:
        if asking:
            wanted = op_name(Tensor.at(pointer).op) not in _EMPTY
            self._started = time.perf_counter()
            return wanted
        spent = time.perf_counter() - self._started
        key = self._key(Tensor.at(pointer))
        self.seconds[key] = self.seconds.get(key, 0.0) + spent
        self.counts[key] = self.counts.get(key, 0) + 1
        return True

    def _key(self, tensor: Tensor) -> Key:
        kind = op_name(tensor.op)
        name = tensor.name.decode("utf-8", "replace")
        weight = type_name = ""
        if kind in _PRODUCTS and (found := _WEIGHT.match(_source_name(tensor, 0))):
            weight, type_name = found[2], TYPES[tensor.source(0).type].name
            self._layer = int(found[1]) if found[1] else None
        elif layer := _OF_LAYER.search(name):
            self._layer = int(layer[1])
        elif name == "norm" or name.startswith(("result_", "inp_")):
            self._layer = None
        # A tensor without a layer in its name stands among those of the layer before it.
        return kind, weight, type_name, self._layer

    def clear(self) -> None:
        """Forget all times."""
        self.seconds.clear()
        self.counts.clear()


def _source_name(tensor: Tensor, index: int) -> str:
    name: bytes = tensor.source(index).name
    return name.decode("utf-8", "replace")


class _Runs:
    """One context of a loaded model, and the two kinds of work that are timed in it."""

    def __init__(self, loaded: Any, n_ctx: int, threads: int, watch: _Stopwatch | None) -> None:
        llama = libllama()
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(_MAX_BATCH, n_ctx)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = _FLASH_AUTO
        params.no_perf = True
        if watch is not None:
            self._callback = llama.ggml_backend_sched_eval_callback(watch)
            params.cb_eval = self._callback
        self._llama = llama
        self._context = llama.llama_init_from_model(loaded, params)
        if not self._context:
            raise LoadError(f"llama.cpp could not make a context of {n_ctx} tokens")
        self._pools = Threadpools(threads, threads)
        self._pools.attach(self._context)
        self._n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(loaded))
        self._batch_size = params.n_batch
        self._batch = llama.llama_batch_init(self._batch_size, 0, 1)

    def prefill(self, n_tokens: int) -> float:
        """Seconds to read ``n_tokens`` into an empty cache, with logits for the last."""
        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        began = time.perf_counter()
        for start in range(0, n_tokens, self._batch_size):
            self._decode(start, min(self._batch_size, n_tokens - start))
        return time.perf_counter() - began

    def decode(self, n_tokens: int, depth: int) -> float:
        """Seconds for ``n_tokens`` tokens, one by one, from position ``depth`` on."""
        began = time.perf_counter()
        for position in range(depth, depth + n_tokens):
            self._decode(position, 1)
        return time.perf_counter() - began

    def _decode(self, position: int, count: int) -> None:
        batch = self._batch
        batch.n_tokens = count
        for i in range(count):
            # Any tokens will do, but not one alone: a routed model would use the same experts.
            batch.token[i] = (position + i) * 7 % self._n_vocab
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == count - 1
        if self._llama.llama_decode(self._context, batch):
            raise InferenceError("the engine failed to evaluate tokens for the profile")
        self._llama.llama_synchronize(self._context)

    def close(self) -> None:
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._pools.close()


@contextmanager
def _model(path: Path) -> Iterator[Any]:
    llama = libllama()
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0  # the limits that times are held against are the processor's
    loaded = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not loaded:
        raise LoadError(f"llama.cpp refused the model: {(recent_log() or ['no reason given'])[-1]}")
    try:
        yield loaded
    finally:
        llama.llama_model_free(loaded)


def measure(path: str, n_prompt: int, n_gen: int, threads: int) -> dict[str, Any]:
    """In the child: time both phases, plain and operator by operator, in turn.

    ``plain_ms`` and ``profiled_ms`` are of a whole prompt, and of one token decoded behind it, in
    the fastest of a few rounds; ``operators`` holds [operator, weight, type, layer, ms, times it
    runs] of the fastest profiled one.
    """
    with _model(Path(path)) as loaded:
        trained = libllama().llama_model_n_ctx_train(loaded)
        if n_prompt + n_gen > trained:
            raise UsageError(
                f"{n_prompt + n_gen} tokens are more than the {trained} this model was trained for"
            )
        watch = _Stopwatch()
        plain = _Runs(loaded, n_prompt + n_gen, threads, None)
        watched = _Runs(loaded, n_prompt + n_gen, threads, watch)
        try:
            prefill, decode = _Phase(1), _Phase(n_gen)
            for done in range(_ROUNDS + 1):
                for runs in (plain, watched):
                    timed = runs is watched
                    watch.clear()
                    prefill.add(runs.prefill(n_prompt), watch if timed else None)
                    watch.clear()
                    decode.add(runs.decode(n_gen, n_prompt), watch if timed else None)
                if done == 0:
                    prefill, decode = _Phase(1), _Phase(n_gen)  # that one only warmed up
                _proc.report([done + 1, _ROUNDS + 1])
            return {"prefill": prefill.answer(), "decode": decode.answer()}
        finally:
            plain.close()
            watched.close()


def count(path: str) -> int:
    """In the child: how many real operators one decoded token takes.

    Without the callback the engine fuses a few of them, so it makes somewhat fewer stops.
    """
    watch = _Stopwatch()
    with _model(Path(path)) as loaded:
        runs = _Runs(loaded, _COUNTING_TOKENS, 1, watch)
        try:
            runs.decode(1, 0)
        finally:
            runs.close()
    return sum(watch.counts.values())


class _Phase:
    """The fastest rounds so far; one round makes ``passes`` passes through the graph."""

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._plain_s = self._profiled_s = math.inf
        self._operators: list[list[Any]] = []

    def add(self, seconds: float, watch: _Stopwatch | None) -> None:
        if watch is None:
            self._plain_s = min(self._plain_s, seconds)
        elif seconds < self._profiled_s:
            self._profiled_s = seconds
            per_pass = 1e3 / self._passes
            self._operators = [
                [*key, spent * per_pass, watch.counts[key] / self._passes]
                for key, spent in watch.seconds.items()
            ]

    def answer(self) -> dict[str, Any]:
        return {
            "plain_ms": self._plain_s * 1e3 / self._passes,
            "profiled_ms": self._profiled_s * 1e3 / self._passes,
            "operators": self._operators,
        }
