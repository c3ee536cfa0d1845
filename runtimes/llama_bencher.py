"""The engine's bare loops for a stopwatch: prefill and decode of random tokens, nothing else.

Must never sample, render text or keep statistics; its work is that of llama-bench and
llama-batched-bench, so that its figures can be held against theirs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from edgekit.errors import InferenceError, UsageError
from edgekit.formats import gguf
from edgekit.formats.gguf import GgufHeader
from edgekit.runtime import LoadParams
from edgekit.runtimes.llama_engine import Engine, check_params

_MAX_SEQS = 256  # LLAMA_MAX_SEQ


class LlamaBencher:
    """A loaded model that is driven as fast as it goes. Close it, or use it in ``with``."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int,
        n_batch: int = 512,
        threads: int,
        kv_type: str = "f16",
        flash_attention: bool = True,
        n_seqs: int = 1,
    ) -> None:
        """Load ``path`` with a KV cache of ``n_ctx`` tokens for all ``n_seqs`` sequences together.

        ``n_batch`` tokens of a prompt are read at once. Raises UsageError, CorruptArtifactError,
        LoadError.
        """
        if not 1 <= n_seqs <= _MAX_SEQS:
            raise UsageError(f"n_seqs must lie between 1 and {_MAX_SEQS}, not {n_seqs}")
        params = LoadParams(
            n_ctx=n_ctx,
            n_batch=max(n_batch, n_seqs),
            n_threads=threads,
            kv_type=kv_type,
            flash_attention=flash_attention,
        )
        check_params(params)
        self.n_seqs = n_seqs
        self._room = n_ctx // n_seqs  # tokens of each sequence
        self._engine = _Sequences(path, gguf.read(path), params, threads=threads, n_seqs=n_seqs)
        self._random = np.random.default_rng(0)
        self._depth = self._position = 0

    def prefill(self, n_tokens: int) -> float:
        """Seconds to read a prompt of ``n_tokens`` random tokens into an empty cache."""
        self._fits(n_tokens)
        self._engine.forget(0)
        pieces = list(self._pieces(n_tokens))
        started = time.perf_counter()
        for position, tokens in pieces:
            self._engine.read(tokens, position, sequence=0)
        seconds = time.perf_counter() - started
        self._engine.forget(0)
        self._depth = self._position = 0
        return seconds

    def stand_at(self, depth: int) -> None:
        """Bring every sequence to ``depth`` tokens; what ``decode`` does first, untimed."""
        self._fits(depth)
        engine = self._engine
        if self._depth == depth:
            if self._position == depth:
                return
            if engine.can_rewind and engine.cut(depth):
                self._position = depth
                return
        engine.forget(0)
        for sequence in range(self.n_seqs):
            for position, tokens in self._pieces(depth):
                engine.read(tokens, position, sequence=sequence)
        self._depth = self._position = depth

    def decode(self, n_tokens: int, depth: int = 0) -> list[float]:
        """Seconds of each of ``n_tokens`` steps; a step decodes one token of every sequence.

        Each sequence holds ``depth`` tokens before the first step. The steps follow each other at
        once: their sum is the time of the whole loop.
        """
        self._fits(depth + n_tokens)
        self.stand_at(depth)
        step, clock = self._engine.step, time.perf_counter
        rows = self._tokens(n_tokens * self.n_seqs).reshape(n_tokens, self.n_seqs)
        self._position = depth + n_tokens
        seconds = []
        before = clock()
        for position, tokens in enumerate(rows, depth):
            step(tokens, position)
            now = clock()
            seconds.append(now - before)
            before = now
        return seconds

    def _pieces(self, n_tokens: int) -> Iterator[tuple[int, Any]]:
        """(position, tokens) of the batches that make up a prompt."""
        tokens = self._tokens(n_tokens)
        size = self._engine.n_batch
        for at in range(0, n_tokens, size):
            yield at, tokens[at : at + size]

    def _tokens(self, count: int) -> Any:
        return self._random.integers(0, self._engine.n_vocab, count, dtype=np.int32)

    def _fits(self, tokens: int) -> None:
        if tokens < 0 or tokens > self._room:
            raise UsageError(
                f"{tokens} tokens in each of {self.n_seqs} sequences need n_ctx"
                f" {tokens * self.n_seqs}; there is {self._room * self.n_seqs}"
            )

    def close(self) -> None:
        """Free the model; closing twice is fine."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Sequences(Engine):
    """An engine of several sequences, each with a KV cache of its own."""

    def __init__(
        self, path: Path, header: GgufHeader, params: LoadParams, *, threads: int, n_seqs: int
    ) -> None:
        self._n_seqs = n_seqs
        super().__init__(path, header, params, threads=(threads, threads))

    def _choose_n_ctx(self, asked: int | None) -> int:
        each = -(-(asked or 1) // self._n_seqs)
        super()._choose_n_ctx(each)  # a sequence longer than the model knows is refused
        return each * self._n_seqs

    def _context_params(self, params: LoadParams, threads: tuple[int, int]) -> Any:
        wanted = super()._context_params(params, threads)
        wanted.n_seq_max = self._n_seqs
        return wanted

    def _make_batch(self) -> None:
        super()._make_batch()
        self._own_rows()

    def _own_rows(self) -> None:
        """Row i of the batch belongs to sequence i: what a step needs."""
        for row in range(min(self._n_seqs, self.n_batch)):
            self._batch.seq_id[row][0] = row

    def read(self, tokens: Any, position: int, *, sequence: int) -> None:
        """Feed at most ``n_batch`` tokens to one sequence; its last token gets logits."""
        count = len(tokens)
        if self._n_seqs > 1:
            for row in range(count):
                self._batch.seq_id[row][0] = sequence
        self._tokens[:count] = tokens
        self._positions[:count] = np.arange(position, position + count)
        self._wanted[count - 1] = 1
        self._compute(count)
        self._wanted[count - 1] = 0
        if self._n_seqs > 1:
            self._own_rows()

    def step(self, tokens: Any, position: int) -> None:
        """Feed one token to every sequence and wait for their logits."""
        count = self._n_seqs
        self._tokens[:count] = tokens
        self._positions[:count] = position
        self._wanted[:count] = 1
        self._compute(count)
        self._wanted[:count] = 0

    def _compute(self, count: int) -> None:
        # Without Engine.decode's ear for signals, which costs a call of Python at every operator.
        self._batch.n_tokens = count
        code = self._llama.llama_decode(self._context, self._batch)
        if code:
            raise InferenceError(f"the engine failed to evaluate {count} tokens (code {code})")
        self._llama.llama_synchronize(self._context)

    def cut(self, position: int) -> bool:
        """Drop the cells from ``position`` on in every sequence; False where that cannot be."""
        remove = self._llama.llama_memory_seq_rm
        return all(
            [remove(self._memory, sequence, position, -1) for sequence in range(self._n_seqs)]
        )
