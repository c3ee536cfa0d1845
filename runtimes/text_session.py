"""From a prompt to text, one session at a time, on any engine of tokens.

Must never know which engine it is (``token_engine``), nor parse a file's bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self

import numpy as np

from edgekit.errors import PromptTooLongError, UsageError
from edgekit.runtime import POOLINGS, GenerateParams, Generation, TokenLogprob, merged
from edgekit.runtimes.chat import ChatTemplate, Guard, check_messages
from edgekit.runtimes.context_window import ContextWindow, common_length
from edgekit.runtimes.speculation import Speculator
from edgekit.runtimes.text_stream import TextStream
from edgekit.runtimes.token_engine import Logits, TokenEngine


class Sampler(Protocol):
    """One generation's way of choosing. ``free``: it is the best token, and nothing else."""

    free: bool
    logprobs: list[TokenLogprob]

    def next(self, logits: Logits) -> int | None:
        """The token that ``logits`` lead to; None where a grammar ends."""
        ...

    def close(self) -> None: ...


class PromptCache(Protocol):
    """Keeps the state of the last prompt between runs."""

    def load(self, n_vocab: int) -> tuple[list[int], Logits, bytes] | None: ...
    def save(self, tokens: list[int], logits: Logits, state: bytes) -> None: ...


MakeSampler = Callable[[GenerateParams, Sequence[int]], Sampler]


class TextSession:
    """A loaded model. See ``edgekit.runtime.Session``; not to be shared between threads."""

    def __init__(
        self,
        engine: TokenEngine,
        *,
        chat_template: str | None,
        sampler: MakeSampler,
        embeddings: bool = False,
        cache: PromptCache | None = None,
    ) -> None:
        """Takes ``engine`` over: closing the session closes it. ``sampler`` makes one for each
        generation, from its parameters and the prompt.
        """
        self._engine = engine
        self._template: ChatTemplate | None = None
        self._guard: Guard | None = None
        if chat_template:
            bos, eos = engine.token_text(engine.bos), engine.token_text(engine.eos)
            self._template = ChatTemplate(chat_template, bos=bos, eos=eos)
        self._window = ContextWindow(engine)
        self._sampler = sampler
        self._with_embeddings = embeddings
        self._last = Generation()
        self._turn = 0
        self._closed = False
        self._cache = cache
        if cache is not None and (found := cache.load(engine.n_vocab)):
            self._window.restore(*found)

    # Generating

    def stream(
        self, prompt: str, params: GenerateParams | None = None, **fields: Any
    ) -> Iterator[str]:
        """Complete ``prompt``. It is plain text: control tokens written in it stay text.

        BOS comes first where the model wants it. Raises UsageError, PromptTooLongError.
        """
        asked = merged(params, fields)
        return self._run(self._prompt_tokens(self.tokenize(prompt)), asked)

    def complete(
        self, prompt: str, params: GenerateParams | None = None, **fields: Any
    ) -> Generation:
        """``stream`` to its end."""
        for _ in self.stream(prompt, params, **fields):
            pass
        return self._last

    def _prompt_tokens(self, tokens: list[int]) -> list[int]:
        """With BOS in front if the model wants one; at least one token in any case."""
        engine = self._engine
        if engine.adds_bos and tokens[:1] != [engine.bos]:
            return [engine.bos, *tokens]
        return tokens or [engine.bos if engine.bos >= 0 else engine.eos]

    def _run(self, prompt: list[int], params: GenerateParams, keep: int = 0) -> Iterator[str]:
        """Check what can be checked now, and return the generator that does the work."""
        self._open()
        n_ctx = self._engine.n_ctx
        if len(prompt) + 1 > n_ctx and not params.endless:
            raise PromptTooLongError(
                f"the prompt has {len(prompt)} tokens and leaves no room in n_ctx {n_ctx}",
                hint="load with a larger n_ctx, shorten the prompt, or generate with endless",
            )
        sampler = self._sampler(params, prompt)
        self._turn += 1
        self._last = Generation(prompt_tokens=len(prompt))
        kept = max(keep, params.n_keep)
        return self._generate(prompt, params, sampler, self._last, kept, self._turn)

    def _generate(
        self,
        prompt: list[int],
        params: GenerateParams,
        sampler: Sampler,
        done: Generation,
        keep: int,
        turn: int,
    ) -> Iterator[str]:
        engine, window = self._engine, self._window
        text = TextStream(params.stop)
        speculator: Speculator | None = None
        shown: list[str] = []
        clock = time.perf_counter
        try:
            self._still_mine(turn)
            started = clock()
            done.cached_tokens = window.enter(prompt, endless=params.endless, keep=keep)
            token = sampler.next(window.logits())
            if engine.can_rewind and _speculates(params, sampler):
                speculator = Speculator(engine, window, done)
            done.prompt_ms = (clock() - started) * 1e3
            done.finish_reason = "length"
            resumed = clock()
            while True:
                if token is None or engine.ends(token):
                    done.finish_reason = "stop"
                    break
                done.tokens.append(token)
                if piece := text.feed(engine.piece(token)):
                    shown.append(piece)
                    paused = clock()
                    done.decode_ms += (paused - resumed) * 1e3
                    yield piece
                    resumed = clock()
                    self._still_mine(turn)
                if text.stopped:
                    done.finish_reason = "stop"
                    break
                if len(done.tokens) >= params.max_tokens:
                    break
                if window.full and not (speculator and speculator.ready):
                    if not params.endless:
                        break
                    window.slide()
                if speculator:
                    token = speculator.after(token)
                else:
                    window.push(token)
                    token = sampler.next(engine.logits())
            done.decode_ms += (clock() - resumed) * 1e3
            if rest := text.finish():
                shown.append(rest)
                yield rest
        finally:
            sampler.close()
            done.text = "".join(shown)
            done.logprobs = sampler.logprobs[: len(done.tokens)]

    def _still_mine(self, turn: int) -> None:
        self._open()
        if turn != self._turn:
            raise UsageError("another generation of this session has begun; this one cannot go on")

    def _open(self) -> None:
        if self._closed:
            raise UsageError("the session is closed")

    @property
    def last(self) -> Generation:
        return self._last

    # Chat

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        params: GenerateParams | None = None,
        **fields: Any,
    ) -> Iterator[str]:
        """Stream the assistant's next turn.

        The prompt comes from the model's own template, rendered in a bounded process; control
        tokens that stand in the messages are only text to the model (``chat.Guard``). With
        ``endless`` everything before the first message that is no system message stays in the
        context. Raises UsageError, UnsafeModelError, UnsupportedModelError, PromptTooLongError.
        """
        asked = merged(params, fields)
        checked = check_messages(messages)
        tokens = self._chat_tokens(checked)
        keep = 0
        if asked.endless:
            keep = self._system_tokens(checked, tokens)
        return self._run(tokens, asked, keep)

    def _chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        self._open()
        if self._template is None:
            raise UsageError(
                "this model has no chat template", hint="complete a plain prompt instead (--raw)"
            )
        if self._guard is None:
            self._guard = Guard(self._engine.control_texts())
        marked, mark = self._guard.marked(messages)
        first, *rest = self._template.render(marked).split(mark)
        tokens = self._engine.tokenize(first, special=True)
        for part in rest:
            tokens += self._engine.tokenize_on(part)
        return self._prompt_tokens(tokens)

    def _system_tokens(self, messages: list[dict[str, str]], tokens: list[int]) -> int:
        """How many tokens stand before the first message that is no system message."""
        at = next((i for i, m in enumerate(messages) if m["role"] != "system"), None)
        if not at:
            return 0
        other = [dict(message) for message in messages]
        other[at]["content"] = "~" if messages[at]["content"] != "~" else "!"
        return common_length(tokens, self._chat_tokens(other))

    # Text and vectors

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text: no BOS, and control tokens are plain text too."""
        self._open()
        return self._engine.tokenize(text, special=False)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no valid UTF-8 becomes U+FFFD."""
        self._open()
        for token in tokens:
            if not 0 <= token < self._engine.n_vocab:
                raise UsageError(f"{token} is no token of this model")
        return b"".join(map(self._engine.piece, tokens)).decode("utf-8", "replace")

    def embed(self, text: str, *, pooling: str = "mean") -> list[float]:
        """The hidden states of ``text``, pooled and scaled to length 1; shape [n_embd].

        ``pooling``: "mean" of all tokens, the "last" token, or the first ("cls"). The session must
        be loaded with ``embeddings=True``. Raises UsageError, PromptTooLongError.
        """
        self._open()
        if pooling not in POOLINGS:
            raise UsageError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}")
        if not self._with_embeddings:
            raise UsageError("this session gives no embeddings", hint="load with embeddings=True")
        tokens = self._prompt_tokens(self.tokenize(text))
        engine = self._engine
        if len(tokens) > engine.n_ctx:
            raise PromptTooLongError(f"{len(tokens)} tokens do not fit n_ctx {engine.n_ctx}")
        self._turn += 1
        self._window.clear()
        states = []
        for at in range(0, len(tokens), engine.n_batch):
            part = tokens[at : at + engine.n_batch]
            self._window.extend(part, outputs=len(part))
            states.append(engine.embeddings(len(part)))
        rows = np.concatenate(states)
        vector = {"mean": rows.mean(axis=0), "last": rows[-1], "cls": rows[0]}[pooling]
        norm = float(np.linalg.norm(vector))
        return [float(x) for x in (vector / norm if norm else vector)]

    # Life

    def reset(self) -> None:
        """Forget all earlier prompts, so that the next one is evaluated from its first token."""
        self._open()
        self._turn += 1
        self._window.clear()

    def close(self) -> None:
        """Write the prompt cache, if there is one, and free the model. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            if self._template is not None:
                self._template.close()
            try:
                if self._cache is not None and (kept := self._window.snapshot()):
                    self._cache.save(*kept)
            finally:
                self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _speculates(params: GenerateParams, sampler: Sampler) -> bool:
    """Only plain greedy answers can be drafted and checked without changing them."""
    return params.speculate and not params.endless and sampler.free
