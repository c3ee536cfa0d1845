"""Which tokens of a text are in the KV cache, and where: reuse, rewinding, endless shifting.

Must never know what the tokens mean or how the next one is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from edgekit.errors import UsageError
from edgekit.runtimes.token_engine import Logits, TokenEngine


class _OrNothing:
    """Empties the window when a change of it breaks off, for Ctrl-C may come between two lines.

    A class, for a generator-based context manager costs ten times as much per token.
    """

    def __init__(self, window: ContextWindow) -> None:
        self._window = window

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._window.clear()


class ContextWindow:
    """The text that the engine has read so far.

    ``tokens`` is the whole text. When an endless text outgrew the context, ``dropped`` tokens after
    the first ``keep`` are no longer in the cache, and the others have moved down.
    """

    def __init__(self, engine: TokenEngine) -> None:
        self._engine = engine
        self.tokens: list[int] = []
        self.keep = 0
        self.dropped = 0
        self._prompt_end = 0
        self._prompt_logits: Logits | None = None
        self._or_nothing = _OrNothing(self)

    @property
    def used(self) -> int:
        """Cells in use."""
        return len(self.tokens) - self.dropped

    @property
    def full(self) -> bool:
        """Whether the next token needs room to be made first."""
        return self.used >= self._engine.n_ctx

    def enter(self, prompt: Sequence[int], *, endless: bool, keep: int) -> int:
        """Make ``prompt`` (at least one token) the text, with logits for its end.

        Returns how many of its tokens needed no work, for the cache held them. The logits of its
        end are kept: the same prompt again costs nothing and gives the same answer, bit by bit.
        """
        reused = self._common(prompt)
        if reused == len(prompt) != self._prompt_end:
            reused -= 1
        if not self.rewind(reused):
            reused = 0
        if not self.dropped:
            self.keep = min(keep, self._engine.n_ctx // 2)
        # Whole batches are the fastest way; only where old text must go do they follow its room.
        most = self._engine.n_batch
        if self.dropped or len(prompt) > self._engine.n_ctx:
            most = min(most, max(1, (self._engine.n_ctx - self.keep) // 2))
        at = reused
        while at < len(prompt):
            step = min(most, len(prompt) - at)
            if endless:
                self._make_room(step)
            self.extend(prompt[at : at + step])
            at += step
        if reused < len(prompt):
            self._prompt_end = len(prompt)
            self._prompt_logits = self._engine.logits().copy()
        return reused

    def logits(self) -> Logits:
        """Logits for what follows the text; shape [n_vocab], valid until the text changes."""
        if self._prompt_logits is not None and len(self.tokens) == self._prompt_end:
            return self._prompt_logits
        return self._engine.logits()

    def _common(self, prompt: Sequence[int]) -> int:
        """Length of the beginning that ``prompt`` shares with the text."""
        count = common_length(prompt, self.tokens)
        if self.dropped and count <= self.keep + self.dropped:
            return 0
        return count

    def extend(self, tokens: Sequence[int], *, outputs: int = 1) -> None:
        """Read tokens that fit the room there is; the last ``outputs`` of them get logits."""
        with self._or_nothing:
            self._engine.decode(tokens, self.used, outputs=outputs)
            self.tokens.extend(tokens)

    def push(self, token: int) -> None:
        """``extend`` by one token, on the shortest way."""
        with self._or_nothing:
            self._engine.decode_one(token, len(self.tokens) - self.dropped)
            self.tokens.append(token)

    def rewind(self, length: int) -> bool:
        """Cut the text down to its first ``length`` tokens; False if all of it had to go."""
        if length >= len(self.tokens):
            return True
        with self._or_nothing:
            if length and self._engine.forget(length - self.dropped):
                del self.tokens[length:]
                return True
        self.clear()
        return False

    def clear(self) -> None:
        """Forget everything."""
        self._engine.forget(0)
        self.tokens.clear()
        self.dropped = 0
        self._prompt_end = 0
        self._prompt_logits = None

    def slide(self) -> None:
        """Make room for one more token of an endless text."""
        self._make_room(1)

    def _make_room(self, count: int) -> None:
        missing = self.used + count - self._engine.n_ctx
        if missing <= 0:
            return
        if not self._engine.can_shift:
            raise UsageError("the context is full, and this model's cannot be shifted")
        gone = max(missing, (self.used - self.keep) // 2)
        with self._or_nothing:
            self._engine.forget(self.keep, self.keep + gone)
            self._engine.shift(self.keep + gone, -gone)
            self.dropped += gone

    # What a prompt cache keeps

    def snapshot(self) -> tuple[list[int], Logits, bytes] | None:
        """The last prompt's tokens, the logits of its end and the state; None if not whole."""
        if self._prompt_logits is None or self.dropped:
            return None
        if not self.rewind(self._prompt_end):
            return None
        return self.tokens, self._prompt_logits, self._engine.save_state()

    def restore(self, tokens: list[int], logits: Logits, state: bytes) -> None:
        """Take over what ``snapshot`` gave; an engine that refuses the state starts empty."""
        self.clear()
        if len(tokens) < self._engine.n_ctx and self._engine.load_state(state):
            self.tokens = tokens
            self._prompt_end = len(tokens)
            self._prompt_logits = logits


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the beginning that two texts share."""
    limit = min(len(one), len(other))
    return next((i for i in range(limit) if one[i] != other[i]), limit)
