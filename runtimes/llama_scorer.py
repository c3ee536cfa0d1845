"""llama.cpp as a scorer: the logits of a text's tokens, without sampling or sessions.

Must never compute a statistic, nor be used outside a child process: it does no first-load check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from edgekit.errors import PromptTooLongError, UsageError
from edgekit.formats import gguf
from edgekit.runtime import LoadParams
from edgekit.runtimes import threads as thread_counts
from edgekit.runtimes.llama_engine import Engine, Logits, check_params
from edgekit.scorer import BLOCK_TOKENS


class LlamaScorer:
    """A loaded GGUF model. See ``edgekit.scorer.Scorer``."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 512,
        threads: int | None = None,
        adapters: tuple[Path, ...] = (),
    ) -> None:
        """Raises UsageError, LoadError, and what reading a header raises."""
        params = LoadParams(
            n_ctx=n_ctx,
            n_batch=BLOCK_TOKENS,
            n_threads=threads,
            adapters=tuple((file, 1.0) for file in adapters),
        )
        check_params(params)
        header = gguf.read(path)
        for file in adapters:
            gguf.read(file)
        counts = thread_counts.known(header, params) or thread_counts.first_guess()
        self._engine = engine = Engine(path, header, params, threads=counts)
        self.n_vocab = engine.n_vocab
        self.n_ctx = engine.n_ctx
        self.bos = engine.bos if engine.adds_bos and engine.bos >= 0 else None

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids without BOS; control tokens are recognised only with ``special``."""
        return self._engine.tokenize(text, special=special)

    def logits(self, tokens: Sequence[int], first: int) -> Logits:
        """Logits after positions ``first`` and on, float32 [len(tokens) - first, n_vocab]."""
        pieces = self.blocks(tokens, first)
        if len(tokens) <= BLOCK_TOKENS:
            return next(pieces)
        return np.concatenate([piece.copy() for piece in pieces])

    def blocks(self, tokens: Sequence[int], first: int) -> Iterator[Logits]:
        """``logits`` in pieces of at most BLOCK_TOKENS rows."""
        if not 0 <= first < len(tokens):
            raise UsageError(f"there is no position {first} in a text of {len(tokens)} tokens")
        if len(tokens) > self.n_ctx:
            raise PromptTooLongError(f"{len(tokens)} tokens do not fit n_ctx {self.n_ctx}")
        engine = self._engine
        engine.forget(0)
        for start in range(0, len(tokens), BLOCK_TOKENS):
            part = tokens[start : start + BLOCK_TOKENS]
            rows = min(len(part), max(0, start + len(part) - first))
            engine.decode(part, start, outputs=rows)
            if rows:
                yield engine.logits_block(len(part) - rows, rows)

    def close(self) -> None:
        """Free the model. Twice is fine."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
