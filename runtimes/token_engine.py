"""What an engine must offer for text to come out of a language model: tokens, logits, a KV cache.

Knows no engine; sessions, samplers and windows are written against this, and never against one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Logits = np.ndarray[Any, np.dtype[np.float32]]


class TokenEngine(Protocol):
    """A loaded model with a context of one sequence, whose positions count from 0."""

    n_vocab: int
    n_ctx: int
    n_batch: int
    adds_bos: bool
    bos: int  # -1: none
    eos: int  # -1: none

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of ``text``; control tokens are recognised only with ``special``. Adds none."""
        ...

    def tokenize_on(self, text: str) -> list[int]:
        """``tokenize`` with control tokens, for text that goes on after other text."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes of ``token``, perhaps a part of a character; none for a control token."""
        ...

    def ends(self, token: int) -> bool:
        """Whether ``token`` ends a turn or a text."""
        ...

    def control_texts(self) -> list[str]:
        """What every control token looks like when it is written out."""
        ...

    def token_text(self, token: int) -> str:
        """A token as it is written in a template; "" for none (-1)."""
        ...

    def decode(self, tokens: Sequence[int], position: int, *, outputs: int = 1) -> None:
        """Feed at most ``n_batch`` tokens that stand at ``position`` and after it.

        The last ``outputs`` of them get logits. Raises InferenceError when the engine fails.
        """
        ...

    def decode_one(self, token: int, position: int) -> None:
        """``decode`` for one token, on the shortest way."""
        ...

    def logits(self, row: int = -1) -> Logits:
        """Logits of one output of the last decode, shape [n_vocab]; a view, until the next one."""
        ...

    def logits_block(self, count: int) -> Logits:
        """Logits of the last ``count`` outputs of the last decode, [count, n_vocab]; a view."""
        ...

    def embeddings(self, rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Hidden states of the last ``rows`` outputs, shape [rows, width]; a copy."""
        ...

    def forget(self, position: int, end: int = -1) -> bool:
        """Drop the cells from ``position`` up to ``end``; False where only all can go."""
        ...

    def shift(self, position: int, delta: int) -> None:
        """Move the cells from ``position`` on by ``delta`` positions."""
        ...

    @property
    def can_rewind(self) -> bool:
        """Whether the last tokens alone can be forgotten."""
        ...

    @property
    def can_shift(self) -> bool:
        """Whether cells can move to other positions."""
        ...

    def save_state(self) -> bytes:
        """The KV cells of the sequence, in the engine's own form."""
        ...

    def load_state(self, state: bytes) -> bool:
        """Take over what ``save_state`` gave; False, with an empty cache, if it does not fit."""
        ...

    def close(self) -> None:
        """Free everything. Twice is fine."""
        ...
