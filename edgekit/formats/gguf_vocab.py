"""Knows which vocabularies make llama.cpp abort, when it loads them or at a later prompt.

Must never know the bytes of a file: it judges the metadata that the GGUF reader has read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekit.formats.foreign import Malformed, shown

MAX_TOKENS = 1 << 20

_PREFIX = "tokenizer.ggml."
_BYTE_TOKEN = 6
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_NO_TOKEN = 0xFFFFFFFF
_INTEGERS = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")

# Key -> the GGUF types it may have; "[str]" is an array of strings.
_KINDS: dict[str, tuple[str, ...]] = {
    "model": ("str",),
    "pre": ("str",),
    "tokens": ("[str]",),
    "merges": ("[str]",),
    "scores": ("[f32]", "[i32]"),
    "token_type": ("[i32]",),
}


def check(metadata: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Raise Malformed for a vocabulary that no engine can use.

    ``kinds`` gives the GGUF type of each metadata value. Files without a vocabulary pass. A special
    token id of 2**32 - 1 means "none" in files of the wild, and passes.
    """
    for name, allowed in _KINDS.items():
        kind = kinds.get(_PREFIX + name, allowed[0])
        if kind not in allowed:
            raise Malformed(f"{_PREFIX}{name} is {kind}, not {' or '.join(allowed)}")
    tokens: list[str] | None = metadata.get(_PREFIX + "tokens")
    if tokens is None:
        return
    if len(tokens) > MAX_TOKENS:
        raise Malformed(f"has {len(tokens)} tokens, the limit is {MAX_TOKENS}")
    for name in ("scores", "token_type"):
        values = metadata.get(_PREFIX + name)
        if values is not None and len(values) < len(tokens):
            raise Malformed(f"{_PREFIX}{name} has {len(values)} of {len(tokens)} values")
    _check_ids(metadata, kinds, len(tokens))
    model = metadata.get(_PREFIX + "model")
    if model not in ("none", "no_vocab"):
        _check_distinct(tokens)
    if model == "llama":
        _check_bytes(tokens)
    if model == "bert" and _BYTE_TOKEN in metadata.get(_PREFIX + "token_type", ()):
        raise Malformed("has byte tokens, which a 'bert' tokenizer cannot have")


def _check_ids(metadata: Mapping[str, Any], kinds: Mapping[str, str], tokens: int) -> None:
    for key, value in metadata.items():
        if not (key.startswith(_PREFIX) and key.endswith("_token_id")):
            continue
        if kinds[key] not in _INTEGERS:
            raise Malformed(f"{shown(key)} is {kinds[key]}, not a token id")
        if not 0 <= value < tokens and value not in (-1, _NO_TOKEN):
            raise Malformed(f"{shown(key)} is {value}, but there are {tokens} tokens")


def _check_distinct(tokens: list[str]) -> None:
    """llama.cpp cuts a text at its first NUL and names empty ones; equal texts abort it."""
    if len({"", *tokens}) == len(tokens) + 1 and "\0" not in "".join(tokens):
        return
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        text = token.partition("\0")[0] or f"[EMPTY_{index}]"
        first = seen.setdefault(text, index)
        if first != index:
            raise Malformed(f"tokens {first} and {index} have the same text {shown(text)}")


def _check_bytes(tokens: list[str]) -> None:
    """SentencePiece spells unknown characters in bytes; llama.cpp aborts where one is missing."""
    texts = set(tokens)
    for byte, name in enumerate(_BYTES):
        if name not in texts and bytes([byte]).decode("utf-8", "surrogateescape") not in texts:
            raise Malformed(f"has no token {name} to spell unknown characters with")
