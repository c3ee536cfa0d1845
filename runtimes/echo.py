"""A runtime without an engine: it answers with the prompt's own words. For tests and docs.

Must never import anything but edgekit; any file that exists is a model to it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from edgekit.errors import LoadError, PromptTooLongError, UsageError
from edgekit.runtime import (
    DEFAULT_N_CTX,
    POOLINGS,
    GenerateParams,
    Generation,
    LoadParams,
    merged,
)

_WIDTH = 16


class EchoRuntime:
    """Loads nothing, but refuses a file that is not there, as a real engine does."""

    def load(self, path: Path, params: LoadParams) -> EchoSession:
        if not path.is_file():
            raise LoadError(f"{path} is no file")
        return EchoSession(params)


class EchoSession:
    """One token is one character; the answer is the prompt again, then the end."""

    def __init__(self, params: LoadParams) -> None:
        self._n_ctx = params.n_ctx or DEFAULT_N_CTX
        self._last = Generation()
        self._closed = False

    def stream(
        self, prompt: str, params: GenerateParams | None = None, **fields: Any
    ) -> Iterator[str]:
        asked = merged(params, fields)
        self._open()
        tokens = self.tokenize(prompt) or [0]
        if len(tokens) + 1 > self._n_ctx and not asked.endless:
            raise PromptTooLongError(f"the prompt has {len(tokens)} tokens, n_ctx is {self._n_ctx}")
        self._last = Generation(prompt_tokens=len(tokens))
        return self._generate(prompt, asked, self._last)

    def _generate(self, prompt: str, params: GenerateParams, done: Generation) -> Iterator[str]:
        started = time.perf_counter()
        cuts = [at for stop in params.stop if (at := prompt.find(stop)) >= 0]
        answer = prompt[: min(cuts, default=len(prompt))]
        room = params.max_tokens
        if not params.endless:
            room = min(room, self._n_ctx - done.prompt_tokens)
        done.finish_reason = "stop" if len(answer) <= room and len(answer) < room else "length"
        for character in answer[:room]:
            self._open()
            if done is not self._last:
                raise UsageError("another generation of this session has begun")
            done.tokens.append(ord(character))
            done.text += character
            yield character
        done.decode_ms = (time.perf_counter() - started) * 1e3

    def complete(
        self, prompt: str, params: GenerateParams | None = None, **fields: Any
    ) -> Generation:
        for _ in self.stream(prompt, params, **fields):
            pass
        return self._last

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        params: GenerateParams | None = None,
        **fields: Any,
    ) -> Iterator[str]:
        if not messages:
            raise UsageError("a chat needs at least one message")
        return self.stream(messages[-1]["content"], params, **fields)

    def embed(self, text: str, *, pooling: str = "mean") -> list[float]:
        self._open()
        if pooling not in POOLINGS:
            raise UsageError(f"unknown pooling '{pooling}'")
        raw = [byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:_WIDTH]]
        norm = math.hypot(*raw)
        return [x / norm for x in raw]

    def tokenize(self, text: str) -> list[int]:
        self._open()
        return [ord(character) for character in text]

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._open()
        return "".join(map(chr, tokens))

    def reset(self) -> None:
        self._open()

    def _open(self) -> None:
        if self._closed:
            raise UsageError("the session is closed")

    @property
    def has_chat_template(self) -> bool:
        return True

    @property
    def last(self) -> Generation:
        return self._last

    def close(self) -> None:
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
