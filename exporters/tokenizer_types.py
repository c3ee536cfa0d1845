"""A vocabulary as GGUF holds it: texts, types, scores or merges.

Knows llama.cpp's types of tokens; never reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from edgekit.errors import SourceError
from edgekit.exporters.tokenizer_files import AddedToken, TokenizerFiles

# Some models forget to mark these as special; llama.cpp hides them from its output all the same.
_HIDDEN = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_HIDDEN_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """``model`` is "gpt2" (BPE with merges) or "llama" (SentencePiece with scores).

    ``pre`` names the splitting rule. ``space_prefix`` says whether a space goes before every text;
    None where the model has no such notion.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None


def type_of_added(token: AddedToken) -> TokenType:
    """CONTROL for tokens that no text may contain by itself, else USER_DEFINED."""
    looks = any(token.text.startswith(a) and token.text.endswith(b) for a, b in _HIDDEN_ENDS)
    if token.special or looks or token.text in _HIDDEN:
        return TokenType.CONTROL
    return TokenType.USER_DEFINED


def padded_texts(files: TokenizerFiles, vocab_size: int) -> list[str | None]:
    """Text of every id below ``vocab_size``, None for ids that no token has.

    Raises SourceError for an id beyond that, or two texts with one id.
    """
    texts: list[str | None] = [None] * vocab_size
    entries = [*files.vocabulary.items(), *((token.text, token.id) for token in files.added)]
    for text, index in entries:
        if not 0 <= index < vocab_size:
            raise SourceError(f"token {text!r} has id {index}, but vocab_size is {vocab_size}")
        if texts[index] not in (None, text):
            raise SourceError(f"tokens {texts[index]!r} and {text!r} have the same id {index}")
        texts[index] = text
    return texts
