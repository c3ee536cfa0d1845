"""Text to token ids and back, by the tokenizer.json of an artifact.

Knows the package tokenizers and how vocabularies spell bytes; never a model.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from edgekit.errors import CorruptArtifactError, MissingExtraError
from edgekit.formats import json_file
from edgekit.language_model import TOKENIZER, LanguageModel

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # SentencePiece's mark for a space
# Some models forget to mark these as special; nobody wants to read them.
_HIDDEN = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d*>|<pad>|<mask>", re.DOTALL)


class HfTokens:
    """The tokenizer beside a model."""

    def __init__(self, folder: Path, facts: LanguageModel) -> None:
        """Raises CorruptArtifactError for a broken tokenizer.json, MissingExtraError."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingExtraError("ort", missing="tokenizers") from None
        path = folder / TOKENIZER
        try:
            self._special = Tokenizer.from_file(str(path))
            self._plain = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise CorruptArtifactError(f"{path} is no tokenizer: {error}"[:300]) from None
        for each in (self._special, self._plain):
            each.no_truncation()
            each.no_padding()
        self._plain.encode_special_tokens = True
        self._n_vocab = facts.vocab_size
        self._added = {id: token for id, token in self._special.get_added_tokens_decoder().items()}
        body: Any = json_file.read(path)
        self._bytes_as_letters = _mentions(body.get("decoder"), "ByteLevel")
        self._prefixes = _mentions(body.get("normalizer"), "Prepend") or _mentions(
            body.get("pre_tokenizer"), "Metaspace"
        )
        self._pieces: dict[int, bytes] = {}

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids of ``text``; control tokens are recognised only with ``special``. Adds none."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        chosen = self._special if special else self._plain
        ids: list[int] = chosen.encode(text, add_special_tokens=False).ids
        return ids

    def tokenize_on(self, text: str) -> list[int]:
        """``tokenize`` with control tokens, for text that goes on after other text.

        SentencePiece puts a space before every text; behind a line break it can be cut off.
        """
        if self._prefixes:
            start = self.tokenize("\n", special=True)
            tokens = self.tokenize("\n" + text, special=True)
            if tokens[: len(start)] == start:
                return tokens[len(start) :]
        return self.tokenize(text, special=True)

    def piece(self, token: int) -> bytes:
        """The bytes of ``token``, perhaps a part of a character; none for a control token."""
        known = self._pieces.get(token)
        if known is None:
            known = b"" if self._is_control(token) else self._written(token)
            self._pieces[token] = known
        return known

    def _is_control(self, token: int) -> bool:
        added = self._added.get(token)
        return added is not None and (added.special or bool(_HIDDEN.fullmatch(added.content)))

    def _written(self, token: int) -> bytes:
        if token in self._added:
            added = str(self._added[token].content)
            return (added if self._bytes_as_letters else added.replace(_SPACE, " ")).encode()
        text: str | None = self._special.id_to_token(token)
        if text is None:  # tables are often padded to more rows than there are tokens
            return b""
        if self._bytes_as_letters:
            return bytes(self._letters.get(letter, 0x3F) for letter in text)
        if match := _BYTE.fullmatch(text):
            return bytes([int(match[1], 16)])
        return text.replace(_SPACE, " ").encode()

    @cached_property
    def _letters(self) -> dict[str, int]:
        """GPT-2's letter for each byte: printable ones stand for themselves, others follow."""
        own = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in own]
        letters = {chr(byte): byte for byte in own}
        return letters | {chr(256 + place): byte for place, byte in enumerate(others)}

    def control_texts(self) -> list[str]:
        """What every control token looks like when it is written out."""
        return [str(added.content) for id, added in self._added.items() if self._is_control(id)]

    def token_text(self, token: int) -> str:
        """A token as it is written in a template; "" for none (-1)."""
        return "" if token < 0 else self._written(token).decode("utf-8", "replace")


def _mentions(component: Any, kind: str) -> bool:
    """Whether a part of tokenizer.json is of a kind, or has a step that is."""
    if isinstance(component, dict):
        return component.get("type") == kind or any(_mentions(v, kind) for v in component.values())
    if isinstance(component, list):
        return any(_mentions(each, kind) for each in component)
    return False
