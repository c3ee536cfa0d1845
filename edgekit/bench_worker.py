"""The child's side of a benchmark: holds one model and times what it is asked for.

Knows the runtime and the machine's counters; never which tests there are, or what they show.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from edgekit import _proc, machine, sample_inputs, telemetry
from edgekit.page_cache import drop_from_page_cache
from edgekit.registry import RUNTIME_OF_FORMAT, RUNTIMES
from edgekit.runtime import LoadParams, Session, load

_TICK_S = 0.02
_ASLEEP = 0.1  # the part of a tick that sleeping threads may still use
_PATIENCE_S = 3.0
_WARM_RUNS = 3
_LLAMA = RUNTIME_OF_FORMAT["gguf"]
# Runtime -> the package with its engine, and what the engine calls its code for processors.
_TENSOR_ENGINES = {
    "ort": ("onnxruntime", "CPUExecutionProvider"),
    "openvino": ("openvino", "CPU"),
    "litert": ("ai-edge-litert", "XNNPACK"),
}


def serve() -> None:
    """Answer JSON lines on stdin until it ends: for ``_proc.Worker``."""
    # What the engine or a library prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    child = _Child()
    answers.write(b"{}\n")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        call = functools.partial(getattr(child, request["call"]), **request["arguments"])
        _proc.write_all(answers, json.dumps(_proc.answer_of(call)).encode() + b"\n")
    os._exit(0)  # without the engine's own clean-up


class _Child:
    """What can be asked for, by name."""

    def __init__(self) -> None:
        self._root = machine.root()
        self._bencher: Any = None
        self._session: Session | None = None
        self._tensors: Any = None
        self._feed: dict[str, Any] = {}
        self._prompts: dict[int, str] = {}

    # The engine's bare loops

    def hold(self, path: str, settings: dict[str, Any], runtime_name: str = _LLAMA) -> None:
        """Load a model for ``prefill`` and ``decode``."""
        runtime = RUNTIMES.load(runtime_name)()
        self._bencher = runtime.bencher(Path(path), **settings)

    def prefill(self, n_tokens: int) -> dict[str, Any]:
        """One prompt."""
        with self._watched() as seen:
            seen["seconds"] = self._bencher.prefill(n_tokens)
        return seen

    def decode(self, n_tokens: int, depth: int) -> dict[str, Any]:
        """One answer, step by step."""
        self._bencher.stand_at(depth)
        with self._watched() as seen:
            steps = self._bencher.decode(n_tokens, depth)
        seen["seconds"] = sum(steps)
        seen["step_ms"] = [round(1e3 * step, 4) for step in steps]
        return seen

    @contextlib.contextmanager
    def _watched(self) -> Iterator[dict[str, Any]]:
        """What the machine felt meanwhile; the block adds what it found."""
        seen: dict[str, Any] = {}
        before, own = telemetry.counters(self._root), time.process_time()
        yield seen
        own = time.process_time() - own
        after = telemetry.counters(self._root)
        seen["own_cpu_s"] = own
        seen["before"], seen["after"] = vars(before), vars(after)

    # Models without tokens

    def hold_tensors(
        self, path: str, threads: int | None, batch: int, runtime_name: str
    ) -> dict[str, Any]:
        """Load a model for ``run_tensors``: seconds until it could run, and its threads."""
        runtime = RUNTIMES.load(runtime_name)()
        runtime.load(Path(path), LoadParams(n_threads=threads)).close()  # checks, trials, cache
        started = time.perf_counter()
        self._tensors = session = runtime.load(Path(path), LoadParams(n_threads=threads))
        seconds = time.perf_counter() - started
        self._feed = sample_inputs.batch(Path(path), session.inputs, batch)
        for _ in range(_WARM_RUNS):
            session.run(self._feed)
        return {"seconds": seconds, "threads": session.threads}

    def run_tensors(self, seconds: float, least: int) -> dict[str, Any]:
        """Runs one after the other for so long, and so many at the least."""
        with self._watched() as seen:
            runs: list[float] = []
            ends = time.perf_counter() + seconds
            while (started := time.perf_counter()) < ends or len(runs) < least:
                self._tensors.run(self._feed)
                runs.append(time.perf_counter() - started)
        seen["runs_s"] = runs
        return seen

    def profile_tensors(
        self, path: str, threads: int, runtime_name: str
    ) -> list[tuple[str, int, float]]:
        """(kind of operator, how many, milliseconds in a run), the longest first; none of an engine
        that does not tell.
        """
        profiler = importlib.import_module(f"edgekit.runtimes.{runtime_name}_profile")
        found: list[tuple[str, int, float]] = profiler.operators(Path(path), threads, self._feed)
        return found

    def tensor_engine(self, runtime_name: str) -> dict[str, Any]:
        """Version and backend of an engine that runs graphs."""
        package, backend = _TENSOR_ENGINES[runtime_name]
        return {"version": metadata.version(package), "backend": backend}

    # A user's session

    def open(
        self, given: str, file: str, fields: dict[str, Any], cold: bool, runtime_name: str
    ) -> dict[str, Any]:
        """Load a session and let it give one token; seconds, and why a cold load was not cold."""
        self._warm_imports(runtime_name)
        if self._session is not None:
            self._session.close()
        note = drop_from_page_cache(Path(file)) if cold else None
        started = time.perf_counter()
        self._session = load(given, **fields)
        for _ in self._session.stream("The", max_tokens=1):
            pass
        return {"seconds": time.perf_counter() - started, "note": note}

    def _warm_imports(self, runtime_name: str) -> None:
        """What a process pays once is no part of a model's load time."""
        RUNTIMES.load(runtime_name)
        if runtime_name == _LLAMA:
            from edgekit import llama_library

            llama_library.libllama()

    def first_token(self, n_tokens: int) -> dict[str, Any]:
        """Seconds from the call to the first piece of text, with nothing cached."""
        session = self._opened()
        prompt = self._prompt(n_tokens)
        session.reset()
        started = time.perf_counter()
        pieces = session.stream(prompt, max_tokens=8)
        next(pieces, None)
        seconds = time.perf_counter() - started
        getattr(pieces, "close", lambda: None)()
        return {"seconds": seconds, "prompt_tokens": session.last.prompt_tokens}

    def answer(self, n_tokens: int, depth: int) -> dict[str, Any]:
        """The pace of an answer behind ``depth`` tokens: tokens, and tokens per second."""
        session = self._opened()
        prompt = self._prompt(max(1, depth))
        session.reset()
        started = time.perf_counter()
        done = session.complete(prompt, max_tokens=n_tokens)
        seconds = time.perf_counter() - started
        return {"tokens": done.decode_tokens, "tok_s": done.decode_tok_s, "seconds": seconds}

    def _opened(self) -> Session:
        assert self._session is not None
        return self._session

    def _prompt(self, n_tokens: int) -> str:
        """English prose of about ``n_tokens`` tokens, the BOS included."""
        if n_tokens not in self._prompts:
            session = self._opened()
            text = resources.files("edgekit.exporters").joinpath("calibration.txt")
            tokens = session.tokenize(text.read_text("utf-8"))
            tokens *= -(-n_tokens // len(tokens))
            self._prompts[n_tokens] = session.detokenize(tokens[:n_tokens])
        return self._prompts[n_tokens]

    # The process

    def threads(self, given: str, file: str, runtime_name: str) -> list[int]:
        """The counts for decode and for prefill that ``edgekit.load`` takes for this model."""
        from edgekit.formats import gguf
        from edgekit.runtimes import threads

        if runtime_name != _LLAMA:
            return list(threads.first_guess())
        with load(given):
            pass  # the first load of this kind of model measures them
        header = gguf.read(Path(file))
        # A busy machine's figures are not remembered.
        return list(threads.known(header, LoadParams()) or threads.first_guess())

    def engine(self, runtime_name: str) -> dict[str, Any]:
        """Version and backend of an engine of language models."""
        if runtime_name != _LLAMA:
            return self.tensor_engine(runtime_name)
        from edgekit import llama_library

        return {"version": llama_library.version(), "backend": llama_library.backend_file()}

    def rest(self) -> bool:
        """Wait until the engine's threads sleep: idle ones spin for a while, and take a core."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            before = time.process_time()
            time.sleep(_TICK_S)
            if time.process_time() - before < _ASLEEP * _TICK_S:
                return True
        return False

    def peak_rss_bytes(self) -> int | None:
        """The most that this process ever held in memory."""
        return machine.peak_bytes()
