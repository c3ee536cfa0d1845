"""The bare loops of an ONNX language model for a stopwatch: prefill and decode of random tokens.

Must never sample, render text or keep statistics.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Self

import numpy as np

from edgekit.errors import UsageError
from edgekit.formats import onnx
from edgekit.runtimes.ort_engine import OrtEngine


class OrtBencher:
    """A loaded model that is driven as fast as it goes. Close it, or use it in ``with``."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int,
        n_batch: int = 512,
        threads: int,
        kv_type: str = "f32",
        flash_attention: bool = True,
        n_seqs: int = 1,
        spin: bool = True,
        profile_to: Path | None = None,
    ) -> None:
        """What ``LlamaBencher`` takes, as far as this engine can do it; ``profile_to`` as in
        ``OrtEngine``.

        Raises UsageError, CorruptArtifactError, LoadError.
        """
        if n_seqs != 1:
            raise UsageError(
                "an ONNX language model decodes one sequence at a time", hint="leave out --batch"
            )
        if kv_type != "f32" or not flash_attention:
            raise UsageError("an ONNX language model has one cache (f32) and one way of attention")
        onnx.read(path)
        self._engine = OrtEngine(
            path,
            n_ctx=n_ctx,
            n_batch=n_batch,
            threads=threads,
            spin=spin,
            profile_to=profile_to,
        )
        self._random = np.random.default_rng(0)
        self._depth = 0

    def prefill(self, n_tokens: int) -> float:
        """Seconds to read a prompt of ``n_tokens`` random tokens into an empty cache."""
        tokens = self._tokens(n_tokens)
        started = time.perf_counter()
        self._read(tokens)
        self._depth = n_tokens
        return time.perf_counter() - started

    def stand_at(self, depth: int) -> None:
        """Have ``depth`` tokens in the cache; what ``decode`` does first, untimed."""
        if self._depth < depth:
            self._read(self._tokens(depth))
            self._depth = depth

    def decode(self, n_tokens: int, depth: int = 0) -> list[float]:
        """Seconds of each of ``n_tokens`` steps behind ``depth`` tokens. The steps follow each
        other at once: their sum is the time of the whole loop.
        """
        tokens = self._tokens(depth + n_tokens)[depth:]
        self.stand_at(depth)
        step, clock = self._engine.decode_one, time.perf_counter
        seconds = []
        before = clock()
        for position, token in enumerate(tokens, depth):
            step(token, position)
            now = clock()
            seconds.append(now - before)
            before = now
        return seconds

    def end_profile(self) -> Path:
        """The profiler's file, complete."""
        return self._engine.end_profile()

    def _read(self, tokens: list[int]) -> None:
        size = self._engine.n_batch
        for at in range(0, len(tokens), size):
            self._engine.decode(tokens[at : at + size], at)

    def _tokens(self, count: int) -> list[int]:
        if not 0 <= count <= self._engine.n_ctx:
            raise UsageError(f"{count} tokens do not fit n_ctx {self._engine.n_ctx}")
        found: list[int] = self._random.integers(0, self._engine.n_vocab, count).tolist()
        return found

    def close(self) -> None:
        """Free the model; closing twice is fine."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
