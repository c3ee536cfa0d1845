"""Bytes of tokens in, text out: whole characters only, and never a part of a stop string.

Must never know tokens or engines.
"""

from __future__ import annotations

import codecs


class TextStream:
    """Collects bytes and releases the text that can no longer turn into a stop string.

    ``stopped`` says that a stop string was found: it and all after it is cut off.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """The text that is safe to show after ``piece``; often shorter or longer than it."""
        text = self._decode(piece)
        return self._release(text) if self._stop else text

    def finish(self) -> str:
        """What was held back; half a character at the very end becomes U+FFFD."""
        text = self._decode(b"", True)
        if self.stopped:
            return ""
        released = self._release(text) if self._stop else text
        released += self._held
        self._held = ""
        return released

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_start(self, text: str) -> int:
        """The longest tail of ``text`` (in characters) that begins one of the stop strings."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
