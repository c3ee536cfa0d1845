"""Any engine of tokens as a scorer: the logits of a text's tokens, without sampling or sessions.

Must never compute a statistic, know which engine it is (``token_engine``), nor be used outside a
child process: it does no first-load check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from edgekit.errors import InferenceError, PromptTooLongError, UsageError
from edgekit.runtimes.context_window import common_length
from edgekit.runtimes.token_engine import Logits, TokenEngine
from edgekit.scorer import BLOCK_TOKENS


class TokenScorer:
    """A loaded language model. See ``edgekit.scorer.Scorer``."""

    def __init__(self, engine: TokenEngine) -> None:
        """Takes ``engine`` over, which must read BLOCK_TOKENS at once: closing this closes it."""
        self._engine = engine
        self._held: list[int] = []  # the context that log_likelihoods left in the cache
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
        self._held = []
        for start in range(0, len(tokens), BLOCK_TOKENS):
            part = tokens[start : start + BLOCK_TOKENS]
            rows = min(len(part), max(0, start + len(part) - first))
            engine.decode(part, start, outputs=max(1, rows))
            if rows:
                yield engine.logits_block(rows)

    def log_likelihoods(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """For each continuation of ``context``: ln of its probability, and whether it is greedy."""
        if not context or not all(continuations):
            raise UsageError("a context and a continuation need at least one token")
        longest = len(context) + max(map(len, continuations), default=0)
        if longest > self.n_ctx:
            raise PromptTooLongError(f"{longest} tokens do not fit n_ctx {self.n_ctx}")
        after = self._read(context)
        found = []
        for tokens in continuations:
            # What the continuation before this one left behind the context; a recurrent state
            # cannot be cut there, so then the context is read again.
            if not self._engine.forget(len(context)):
                self._held = []
                after = self._read(context)
            scores = [log_softmax(after, tokens[:1])]
            for start in range(0, len(tokens) - 1, BLOCK_TOKENS):
                part = tokens[start : min(start + BLOCK_TOKENS, len(tokens) - 1)]
                self._engine.decode(part, len(context) + start, outputs=len(part))
                rows = self._engine.logits_block(len(part))
                scores.append(log_softmax(rows, tokens[start + 1 : start + 1 + len(part)]))
            found.append((sum(log for log, _ in scores), all(best for _, best in scores)))
        if not all(math.isfinite(log) for log, _ in found):
            raise InferenceError("the model gives logits that are no finite numbers")
        return found

    def _read(self, context: Sequence[int]) -> Logits:
        """Hold ``context`` in the cache; a copy of the logits after it, [1, n_vocab].

        What it begins with like the context before it, such as the same examples, is there already.
        """
        engine = self._engine
        at = min(common_length(context, self._held), len(context) - 1)
        if not engine.forget(at):
            engine.forget(0)
            at = 0
        self._held = []
        for start in range(at, len(context), BLOCK_TOKENS):
            engine.decode(context[start : start + BLOCK_TOKENS], start)
        self._held = list(context)
        return engine.logits()[None].copy()

    def close(self) -> None:
        """Free the model. Twice is fine."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def log_softmax(rows: Logits, tokens: Sequence[int]) -> tuple[float, bool]:
    """Summed ln of the probability of one token per row, and whether each is its row's best."""
    largest = rows.max(axis=1)
    log_sums = np.log(np.exp(rows - largest[:, None]).sum(axis=1, dtype=np.float64))
    chosen = rows[np.arange(len(tokens)), tokens]
    logs = (chosen - largest).astype(np.float64) - log_sums
    return float(logs.sum()), bool((rows.argmax(axis=1) == tokens).all())
