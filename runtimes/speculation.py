"""Prompt-lookup speculation: drafts what followed the same words before, and checks it in one go.

Must never change a greedy answer. A batch of tokens goes through other kernels than a single token,
so its logits, and the KV cells it leaves, differ from plain decoding in the last bits. Therefore a
choice that rests on a batch counts only when the best token leads by more than ``_lead`` logits,
many times the largest difference that was ever seen here. A narrower choice is made again on the
plain way: the cells that batches left are dropped and filled one token at a time.

Drafting costs time where text does not repeat: the speculator keeps time for both ways, and pauses
when drafting loses.
"""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from edgekit.runtime import Generation
from edgekit.runtimes.context_window import ContextWindow
from edgekit.runtimes.token_engine import Logits, TokenEngine

_WORDS = 3  # so many tokens must repeat before what followed them is drafted
_MAX_DRAFT = 10
_PLAIN_FIRST = 4  # plain steps that tell what a token costs
_TRIAL = 4  # drafts between two looks at the clock
_PAUSE = 64  # tokens; doubles with every lost trial
_FIRST_LEAD = 0.25  # in logits; measured differences of batch and single kernels are below 0.03
_SAFETY = 8.0


class Speculator:
    """One greedy generation's drafts. ``window`` already holds the prompt."""

    def __init__(self, engine: TokenEngine, window: ContextWindow, done: Generation) -> None:
        self._engine = engine
        self._window = window
        self._done = done
        self._ready: deque[int] = deque()
        self._followed: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._exact = len(window.tokens)  # the text up to here went the plain way
        self._lead = _FIRST_LEAD
        self._plain_steps = 0
        self._plain_s = 0.0
        self._drafts = 0
        self._gained = 0
        self._drafted_s = 0.0
        self._resume_at = 0
        self._pause = _PAUSE

    @property
    def ready(self) -> bool:
        """Whether the next token is known already, so that ``after`` needs no room."""
        return bool(self._ready)

    def after(self, token: int) -> int:
        """The greedy token that follows ``token``, the newest of the text."""
        if self._ready:
            return self._ready.popleft()
        draft = self._draft(token)
        started = time.perf_counter()
        if not draft:
            self._window.push(token)
            logits = self._engine.logits()
            pushed = time.perf_counter()
            self._plain_steps += 1
            self._plain_s += pushed - started
            chosen = self._choose(logits)
            self._drafted_s += time.perf_counter() - pushed  # what drafting made necessary
            return chosen
        self._ready.extend(self._verify(token, draft))
        self._drafts += 1
        self._gained += len(self._ready)
        self._drafted_s += time.perf_counter() - started
        self._look_at_the_clock()
        return self._ready.popleft()

    def _draft(self, token: int) -> list[int]:
        """What followed the last words when they stood in the text before; often nothing."""
        text = self._window.tokens
        # The place after the newest words is not indexed yet: it would only find itself.
        for end in range(max(self._indexed, _WORDS), len(text)):
            self._followed[tuple(text[end - _WORDS : end])] = end
        self._indexed = len(text)
        if self._plain_steps < _PLAIN_FIRST or len(text) < self._resume_at:
            return []
        at = self._followed.get((*text[1 - _WORDS :], token))
        room = min(_MAX_DRAFT, self._engine.n_ctx - self._window.used - 1, self._engine.n_batch - 1)
        return text[at : at + room] if at is not None and room > 0 else []

    def _verify(self, token: int, draft: list[int]) -> list[int]:
        """The tokens that follow ``token``: at least one, at most one more than was drafted."""
        self._done.drafted_tokens += len(draft)
        start = len(self._window.tokens)
        self._window.extend([token, *draft], outputs=len(draft) + 1)
        chosen: list[int] = []
        for row in range(len(draft) + 1):
            logits = self._engine.logits(row)
            best, lead = _best(logits)
            if lead < self._lead:
                logits = logits.copy()
                self._window.rewind(start + row + 1)
                chosen.append(self._redo(logits))
                break
            chosen.append(best)
            if row < len(draft) and best != draft[row]:
                break
        self._done.accepted_tokens += len(chosen) - 1
        # Of the draft only what was chosen may stay; the last choice is not part of the text yet.
        self._window.rewind(start + len(chosen))
        return chosen

    def _choose(self, logits: Logits) -> int:
        """The best token after a plain step, whose past may still hold cells from batches."""
        if self._exact == len(self._window.tokens) - 1:
            self._exact += 1
            return int(logits.argmax())
        best, lead = _best(logits)
        return best if lead >= self._lead else self._redo(logits.copy())

    def _redo(self, rough: Logits) -> int:
        """Read everything since the last batch-free place again, one by one, and choose exactly."""
        again = self._window.tokens[self._exact :]
        self._window.rewind(self._exact)
        for token in again:
            self._window.push(token)
        self._exact = len(self._window.tokens)
        exact = self._engine.logits()
        top = np.argpartition(exact, -2)[-2:]
        seen = float(np.ptp(rough[top] - exact[top]))
        self._lead = max(self._lead, _SAFETY * seen)
        return int(exact.argmax())

    def _look_at_the_clock(self) -> None:
        """After some drafts: did they cost more than plain steps would have?"""
        if self._drafts < _TRIAL:
            return
        if self._drafted_s > self._gained * self._plain_s / self._plain_steps:
            self._resume_at = len(self._window.tokens) + self._pause
            self._pause *= 2
        self._drafts = self._gained = 0
        self._drafted_s = 0.0


def _best(logits: Logits) -> tuple[int, float]:
    """The best token, and how far it leads the second best."""
    first = int(logits.argmax())
    second = np.partition(logits, -2)[-2]
    return first, float(logits[first] - second)
