"""Reads a SentencePiece ``tokenizer.model``: its pieces, and the options that change its output.

Must never run the tokenizer, or import protobuf: it walks the few fields it needs.

Format: ``src/sentencepiece_model.proto`` of https://github.com/google/sentencepiece, in the wire
format of https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import CorruptArtifactError
from edgekit.formats.foreign import Malformed, read_whole

MAX_BYTES = 1 << 26
MAX_PIECES = 1 << 20

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT = struct.Struct("<f")


@dataclass(frozen=True)
class SentencePieceModel:
    """A tokenizer model. A piece is (text, score, type); an id of -1 means that there is none."""

    pieces: list[tuple[str, float, int]]
    model_type: str
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    precompiled_charsmap: bytes
    byte_fallback: bool
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int


def read(path: Path) -> SentencePieceModel:
    """The model in the file at ``path``.

    Raises SourceError if there is no regular file of at most 64 MiB to read, CorruptArtifactError
    where it is no such model.
    """
    data = read_whole(path, MAX_BYTES)
    try:
        return _model(data)
    except Malformed as error:
        raise CorruptArtifactError(
            f"{path.name} is not a SentencePiece model: {error}", hint="fetch the file again"
        ) from None


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            if len(pieces) == MAX_PIECES:
                raise Malformed(f"more than {MAX_PIECES} pieces")
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer.update(_fields(_message(value)))
        elif number == 3:
            normalizer.update(_fields(_message(value)))
    if not pieces:
        raise Malformed("no pieces")
    kind = _integer(trainer, 3, 1)
    if kind not in MODEL_TYPES:
        raise Malformed(f"the unknown model type {kind}")
    unk_id, bos_id, eos_id, pad_id = (
        _id(trainer, number, default, len(pieces))
        for number, default in ((40, 0), (41, 1), (42, 2), (43, -1))
    )
    return SentencePieceModel(
        pieces=pieces,
        model_type=MODEL_TYPES[kind],
        add_dummy_prefix=bool(_integer(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_integer(normalizer, 4, 1)),
        precompiled_charsmap=_message(normalizer.get(2, b"")),
        byte_fallback=bool(_integer(trainer, 35, 0)),
        unk_id=unk_id,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _message(value)
        elif number == 2:
            packed = _message(value)
            if len(packed) != _FLOAT.size:
                raise Malformed("a score that is not a float")
            score = _FLOAT.unpack(packed)[0]
        elif number == 3:
            kind = value if isinstance(value, int) else 0
    if not NORMAL <= kind <= BYTE:
        raise Malformed(f"a piece of the unknown type {kind}")
    try:
        return text.decode(), score, kind
    except UnicodeDecodeError:
        raise Malformed("a piece that is not UTF-8") from None


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise Malformed("a number where bytes belong")
    return value


def _integer(fields: dict[int, int | bytes], number: int, default: int) -> int:
    value = fields.get(number, default)
    if isinstance(value, bytes):
        raise Malformed("bytes where a number belongs")
    return value


def _id(fields: dict[int, int | bytes], number: int, default: int, pieces: int) -> int:
    """A token id; a negative one, which protobuf writes as 64 bits, means that there is none."""
    value = _integer(fields, number, default)
    if value < 0 or value >> 63:
        return -1
    if value >= pieces:
        if number in fields:
            raise Malformed(f"the special id {value}, with {pieces} pieces")
        return -1
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: an integer for a varint, else its bytes."""
    at, size = 0, len(data)
    while at < size:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind == _FIXED32:
            length = 4
        elif kind == _FIXED64:
            length = 8
        else:
            raise Malformed(f"the unknown wire type {kind}")
        if length > size - at:
            raise Malformed(f"a field of {length} bytes with {size - at} left")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at ``at``, and where the next byte is."""
    value = shift = 0
    for byte in data[at : at + 10]:
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value & ((1 << 64) - 1), at
        shift += 7
    raise Malformed("a number without an end")
