"""A session against llama.cpp's own calls in one process, in turns of a fraction of a second.

Two processes never have the same memory, nor the same neighbours. Here both sides use one model,
one context and the same threads, so that a ratio tells what edgekit's own code costs: tokenizing,
sampling and text, which llama-bench does without. Runs in a child process of ``runtime.py``.
"""

from __future__ import annotations

import ctypes
import random
import time
from pathlib import Path
from typing import Any

import session_child

import edgekit


def turns(
    model: str, load: dict[str, Any], prompt: int, answer: int, reps: int
) -> dict[str, dict[str, list[float]]]:
    """test ("prefill", "decode") -> side ("stream", "engine") -> tok/s, one for each of ``reps``.

    The engine's side are the calls of llama-bench: ``llama_decode`` of the whole prompt, or of one
    token after the other whatever they say, each followed by ``llama_synchronize``.
    """
    texts = session_child.prompts(model, prompt, 8)
    words = session_child.prompts(model, 1, 8)
    with edgekit.load(Path(model), **load) as session:
        sides = {
            "prefill": (_Stream(session, texts, prompt, 1), _Engine(session, [prompt])),
            "decode": (_Stream(session, words, 1, answer), _Engine(session, [1] * answer)),
        }
        found: dict[str, dict[str, list[float]]] = {
            test: {"stream": [], "engine": []} for test in sides
        }
        for turn in range(-1, reps):  # the first warms up
            for test, (stream, engine) in sides.items():
                both: list[tuple[str, _Stream | _Engine]] = [("stream", stream), ("engine", engine)]
                for name, side in both if turn % 2 else both[::-1]:
                    rate = side.rate(turn)
                    if turn >= 0:
                        found[test][name].append(rate)
    return found


class _Stream:
    """What a user calls."""

    def __init__(self, session: Any, prompts: list[str], tokens: int, answer: int) -> None:
        self._session, self._prompts = session, prompts
        self._tokens, self._answer = tokens, answer

    def rate(self, turn: int) -> float:
        """tok/s that are evaluated: the prompt's, and those of the answer but its last."""
        for prompt in self._prompts[turn % len(self._prompts) :] + self._prompts:
            self._session.reset()
            started = time.perf_counter()
            for _ in self._session.stream(prompt, max_tokens=self._answer):
                pass
            seconds = time.perf_counter() - started
            done = self._session.last
            if done.prompt_tokens != self._tokens or done.cached_tokens:
                raise AssertionError(f"not the work that was meant: {done}")
            if done.decode_tokens == self._answer:
                return (self._tokens + self._answer - 1) / seconds
        raise AssertionError("every answer ends early")


class _Engine:
    """The same work in bare calls."""

    def __init__(self, session: Any, batches: list[int]) -> None:
        self._session, self._batches = session, batches
        self._engine = session._engine

    def rate(self, turn: int) -> float:
        """tok/s that are evaluated; nobody looks at what comes out."""
        draw = random.Random(turn)
        llama, context = self._engine._llama, self._engine._context
        self._session.reset()
        started = time.perf_counter()
        for size in self._batches:
            tokens = (ctypes.c_int32 * size)(*(draw.randrange(1000, 2000) for _ in range(size)))
            if llama.llama_decode(context, llama.llama_batch_get_one(tokens, size)):
                raise AssertionError("the engine failed")
            llama.llama_synchronize(context)
        seconds = time.perf_counter() - started
        self._session.reset()
        return sum(self._batches) / seconds
