"""Which tokens a grammar allows next, on any engine of tokens, by the package llguidance.

Must never choose a token; grammars are GBNF, as llama.cpp has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from edgekit.errors import InferenceError, MissingExtraError, UsageError
from edgekit.runtimes import grammar_text

Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Vocabulary(Protocol):
    """What a grammar needs of an engine."""

    n_vocab: int

    def tokenize(self, text: str, *, special: bool) -> list[int]: ...
    def piece(self, token: int) -> bytes: ...
    def ends(self, token: int) -> bool: ...


class TokenGrammars:
    """Makes grammars for one engine; what all of them share is made with the first."""

    def __init__(self, engine: Vocabulary) -> None:
        self._engine = engine

    def parsed(self, text: str) -> TokenGrammar:
        """A grammar before its first token. Raises UsageError for one that does not parse, and
        MissingExtraError.
        """
        tokenizer = self._tokenizer
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            lark = gbnf_to_lark(text)
        except Exception as error:  # the converter's own kinds, which have no common base
            raise _unparsed(error) from None
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # only this finds rules that go round in circles
        if matcher.is_error():
            raise _unparsed(matcher.get_error())
        return TokenGrammar(matcher, self._ends)

    @cached_property
    def _ends(self) -> Sequence[int]:
        engine = self._engine
        return [token for token in range(engine.n_vocab) if engine.ends(token)]

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise MissingExtraError("ort", missing="llguidance") from None
        return LLTokenizer(TokenizerWrapper(_Pieces(self._engine, self._ends)))


class _Pieces:
    """An engine's vocabulary in the form that llguidance asks for."""

    def __init__(self, engine: Vocabulary, ends: Sequence[int]) -> None:
        self._engine = engine
        # Something must stand for the end, also where a model has none.
        self.eos_token_id = ends[0] if ends else engine.n_vocab
        self.bos_token_id = None
        self.tokens = [engine.piece(token) for token in range(engine.n_vocab)]
        if not ends:
            self.tokens.append(b"")
        self.special_token_ids = [token for token, text in enumerate(self.tokens) if not text]

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._engine.tokenize(text, special=False)


class TokenGrammar:
    """One answer's way through a grammar."""

    def __init__(self, matcher: Any, ends: Sequence[int]) -> None:
        self._matcher = matcher
        self._ends = ends

    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next; the end of an answer only where the text is whole."""
        if token in self._ends:
            return bool(self._matcher.is_accepting())
        return bool(self._matcher.validate_tokens([token]) == 1)

    def allowed(self, n_vocab: int) -> Mask:
        """``allows`` of every token, [n_vocab]. Raises InferenceError where the engine gives up."""
        accepting = self._matcher.is_accepting()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise InferenceError(
                f"the grammar cannot be followed further: {_line(self._matcher.get_error())}"
            )
        mask: Mask = np.unpackbits(bits, count=n_vocab, bitorder="little").astype(bool)
        mask[self._ends] = accepting
        return mask

    def accept(self, token: int) -> None:
        """Go on behind ``token``, which is allowed."""
        if token not in self._ends:
            self._matcher.consume_token(token)


def _unparsed(error: object) -> UsageError:
    return UsageError(f"the grammar does not parse: {_line(error)}", hint=grammar_text.HINT)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
