"""Chooses the next token from logits with numpy alone: greedy, or sampled within cuts, free or
inside a grammar.

Must never know the text or an engine: it sees logits and gives token ids. The cuts come in
llama.cpp's order: penalty, top-k, top-p, min-p, temperature.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.runtime import GenerateParams, TokenLogprob
from edgekit.runtimes.token_engine import Logits
from edgekit.runtimes.token_grammar import TokenGrammar

Array = np.ndarray[Any, np.dtype[Any]]


class ArraySampler:
    """One generation's way of choosing. ``text_of`` writes a token, for the log probabilities."""

    def __init__(
        self,
        params: GenerateParams,
        prompt: Sequence[int],
        text_of: Callable[[int], str],
        grammar: TokenGrammar | None = None,
    ) -> None:
        """``grammar`` is that of ``params``, before its first token."""
        self._params, self._text_of = params, text_of
        self._grammar = grammar
        penalised = params.repeat_penalty != 1.0 and params.repeat_last_n > 0
        self._newest: deque[int] | None = None
        if penalised:
            self._newest = deque(prompt, maxlen=params.repeat_last_n)
        self._random = np.random.default_rng(params.seed)
        self.logprobs: list[TokenLogprob] = []
        self._plain = params.temperature == 0 and not penalised
        self.free = self._plain and grammar is None and not params.logprobs

    def next(self, logits: Logits) -> int | None:
        """The token that ``logits`` (shape [n_vocab]) lead to; None where the grammar ends."""
        token = self._choose(logits)
        if self._grammar is not None:
            # First freely, which is cheap; what the grammar forbids is chosen again.
            if not self._grammar.allows(token):
                allowed = self._grammar.allowed(len(logits))
                if not allowed.any():
                    return None
                token = self._choose(np.where(allowed, logits, -np.inf))
            self._grammar.accept(token)
        if self._newest is not None:
            self._newest.append(token)
        if self._params.logprobs:
            self.logprobs.append(report(logits, token, self._params.logprobs, self._text_of))
        return token

    def _choose(self, logits: Logits) -> int:
        if self._plain:
            return int(logits.argmax())
        params = self._params
        if self._newest is not None:
            logits = logits.copy()
            seen = np.unique(np.fromiter(self._newest, np.int64))
            values, penalty = logits[seen], np.float32(params.repeat_penalty)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if params.temperature == 0:
            return int(logits.argmax())
        candidates = _best(logits, params.top_k or len(logits))
        candidates = candidates[~np.isneginf(logits[candidates])]  # what a grammar forbids
        values = logits[candidates].astype(np.float64)
        if params.top_p < 1:
            shares = _softmax(values)
            # The first that makes the sum reach top_p still counts.
            kept = int(np.searchsorted(np.cumsum(shares), params.top_p)) + 1
            candidates, values = candidates[:kept], values[:kept]
        if params.min_p > 0:
            kept = int((values >= values[0] + np.log(params.min_p)).sum())
            candidates, values = candidates[:kept], values[:kept]
        shares = _softmax(values / params.temperature)
        place = np.searchsorted(np.cumsum(shares), self._random.random())
        return int(candidates[min(int(place), len(candidates) - 1)])

    def close(self) -> None:
        """Nothing to free."""


def _best(logits: Logits, count: int) -> Array:
    """The ``count`` likeliest tokens, best first; equal ones in the order of their ids."""
    chosen: Array = np.arange(len(logits))
    if count < len(logits):
        chosen = np.sort(np.argpartition(-logits, count - 1)[:count])
    order: Array = chosen[np.argsort(-logits[chosen], kind="stable")]
    return order


def _softmax(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    shares: NDArray[np.floating[Any]] = np.exp(values - values.max())
    shares /= shares.sum()
    return shares


def report(logits: Logits, token: int, count: int, text_of: Callable[[int], str]) -> TokenLogprob:
    """Natural-log probabilities of ``token`` and of the ``count`` best, before penalties,
    temperature and cuts.
    """
    highest = float(logits.max())
    norm = highest + float(np.log(np.exp(logits - highest, dtype=np.float64).sum()))
    best = np.argpartition(logits, -count)[-count:]
    best = best[np.argsort(-logits[best], kind="stable")]
    top = tuple((text_of(int(i)), float(logits[i]) - norm) for i in best)
    return TokenLogprob(text_of(token), float(logits[token]) - norm, top)
