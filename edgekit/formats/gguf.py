"""Reads the header of a GGUF file: metadata, tensor names, shapes, types and places.

Must never read tensor data, import numpy or an engine, or trust a number in the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgekit.errors import CorruptArtifactError, UnsupportedModelError, VersionError
from edgekit.formats import gguf_vocab
from edgekit.formats.foreign import Cursor, Malformed, opened, shown
from edgekit.formats.ggml_types import TYPES, GgmlType

__all__ = ["TYPES", "GgmlType", "GgufHeader", "GgufTensor", "read"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Several times what the largest known models use. They bound time and memory on hostile files.
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 15
MAX_KEY_BYTES = (1 << 16) - 1
MAX_TEXT_BYTES = 1 << 24
MAX_ELEMENTS = 1 << 21
MAX_HEADER_BYTES = 1 << 27
MAX_ALIGNMENT = 1 << 16
MAX_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_INT64 = (1 << 63) - 1

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: ("u8", struct.Struct("<B")),
    1: ("i8", struct.Struct("<b")),
    2: ("u16", struct.Struct("<H")),
    3: ("i16", struct.Struct("<h")),
    4: ("u32", struct.Struct("<I")),
    5: ("i32", struct.Struct("<i")),
    6: ("f32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("u64", struct.Struct("<Q")),
    11: ("i64", struct.Struct("<q")),
    12: ("f64", struct.Struct("<d")),
}
_U32, _U64 = _SCALARS[4][1], _SCALARS[10][1]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor. ``shape`` as in the file: the dimension that varies fastest comes first.

    ``offset`` counts from the start of the file; ``type`` is a name of ``TYPES``, such as "Q4_K".
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """All of a GGUF file but its weights.

    Metadata values are int, float, bool, str, or a list of one of these. A string in a list may
    hold lone surrogates: tokens need not be UTF-8, and their bytes are kept that way
    (``text.encode("utf-8", "surrogateescape")`` gives them back).
    """

    version: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    alignment: int
    data_offset: int
    file_size: int

    @property
    def architecture(self) -> str:
        """The model family, such as "llama"; CorruptArtifactError where the file names none."""
        family = self.metadata.get("general.architecture")
        if not family:
            raise CorruptArtifactError("the GGUF file does not name its architecture")
        return str(family)

    @cached_property
    def _by_name(self) -> dict[str, GgufTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    def tensor(self, name: str) -> GgufTensor:
        """The tensor called ``name``, else CorruptArtifactError."""
        try:
            return self._by_name[name]
        except KeyError:
            raise CorruptArtifactError(f"the GGUF file has no tensor {shown(name)}") from None

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all tensors; 0.0 for a file that holds a vocabulary only."""
        bits = 8 * sum(tensor.size_bytes for tensor in self.tensors)
        return bits / self.parameters if self.tensors else 0.0

    def types(self) -> dict[str, int]:
        """How many tensors have each type, most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())

    def main_type(self) -> str:
        """The type that takes most bytes among the matrices; CorruptArtifactError without any."""
        size_bytes: Counter[str] = Counter()
        for tensor in self.tensors:
            if len(tensor.shape) > 1:
                size_bytes[tensor.type] += tensor.size_bytes
        if not size_bytes:
            raise CorruptArtifactError("the GGUF file holds no weights")
        return size_bytes.most_common(1)[0][0]


def read(path: Path, *, whole: bool = True) -> GgufHeader:
    """The header of the GGUF file at ``path``; ``whole`` False: its weights may be missing.

    Raises SourceError if there is no regular file to read, VersionError for version 1, unknown
    versions and big-endian files, CorruptArtifactError for anything that breaks the format, points
    outside the file, exceeds the limits above, or is known to make llama.cpp abort, and
    UnsupportedModelError for a shard.
    """
    with opened(path) as (file, size):
        cursor = Cursor(file, min(size, MAX_HEADER_BYTES))
        try:
            if cursor.take(len(MAGIC)) != MAGIC:
                raise Malformed("is not a GGUF file")
            version = cursor.number(_U32)
            if version not in VERSIONS:
                raise _unsupported(path, version)
            return _whole_model(path, _header(cursor, version, size, whole))
        except Malformed as error:
            raise CorruptArtifactError(
                f"{path.name}: {error}", hint="download or export the file again"
            ) from None


def _whole_model(path: Path, header: GgufHeader) -> GgufHeader:
    """Refuse a shard: the engine would open its sisters by itself, and nobody has checked those."""
    shards = header.metadata.get("split.count")
    if isinstance(shards, int) and shards > 1:
        raise UnsupportedModelError(
            f"{path.name} is one of {shards} shards",
            hint="join them first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf",
        )
    return header


def _unsupported(path: Path, version: int) -> VersionError:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, *VERSIONS):
        what = "is a big-endian GGUF file; only little-endian ones are read"
    else:
        what = f"has GGUF version {version}; versions 2 and 3 are read"
    return VersionError(f"{path.name} {what}", hint="convert the model again, or export it anew")


def _header(cursor: Cursor, version: int, size: int, whole: bool) -> GgufHeader:
    tensor_count, entry_count = cursor.number(_U64), cursor.number(_U64)
    if tensor_count > MAX_TENSORS or entry_count > MAX_ENTRIES:
        raise Malformed(f"announces {tensor_count} tensors and {entry_count} metadata entries")
    metadata, kinds = _Metadata(cursor).read(entry_count)
    _expect(kinds, "general.architecture", "str")
    _expect(kinds, "general.alignment", "u32")
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise Malformed(f"has the alignment {alignment}, not a power of two from 8 to 65536")
    gguf_vocab.check(metadata, kinds)
    relative = _tensors(cursor, tensor_count, alignment)
    data_offset = -(-cursor.position // alignment) * alignment
    tensors = _placed(relative, data_offset, size if whole else MAX_INT64)
    end = max((tensor.offset + tensor.size_bytes for tensor in tensors), default=data_offset)
    return GgufHeader(
        version=version,
        metadata=metadata,
        tensors=tensors,
        alignment=alignment,
        data_offset=data_offset,
        file_size=size if whole else max(size, end),
    )


def _expect(kinds: dict[str, str], key: str, kind: str) -> None:
    if kinds.get(key, kind) != kind:
        raise Malformed(f"{key} is {kinds[key]}, not {kind}")


def _strict(raw: bytes, what: str) -> str:
    """Text that means the same to an engine, which reads up to the first NUL."""
    if b"\0" in raw:
        raise Malformed(f"has a {what} with a NUL in it")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Malformed(f"has a {what} that is not UTF-8") from None


def _name(raw: bytes, what: str) -> str:
    """A key or a tensor's name, which people will see in tables: nothing but printable text."""
    name = _strict(raw, what)
    if not name.isprintable():
        raise Malformed(f"has the unprintable {what} {shown(name)}")
    return name


class _Metadata:
    """Reads the metadata entries, and counts what they add up to."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._elements = 0

    def read(self, count: int) -> tuple[dict[str, Any], dict[str, str]]:
        """The values, and the GGUF type of each."""
        values: dict[str, Any] = {}
        kinds: dict[str, str] = {}
        for _ in range(count):
            key = _name(self._cursor.text(MAX_KEY_BYTES), "key")
            if not key:
                raise Malformed("has a metadata entry with an empty key")
            if key in values:
                raise Malformed(f"has the metadata key {shown(key)} twice")
            try:
                kinds[key], values[key] = self._value(self._cursor.number(_U32))
            except Malformed as error:
                raise Malformed(f"{shown(key)} {error}") from None
        return values, kinds

    def _value(self, code: int) -> tuple[str, Any]:
        if code == _STRING:
            return "str", _strict(self._cursor.text(MAX_TEXT_BYTES), "text")
        if code == _ARRAY:
            return self._array(self._cursor.number(_U32), self._cursor.number(_U64))
        if code in _SCALARS:
            name, form = _SCALARS[code]
            return name, self._cursor.number(form)
        raise Malformed(f"has the unknown type {code}")

    def _array(self, code: int, count: int) -> tuple[str, list[Any]]:
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise Malformed(f"brings the array elements above {MAX_ELEMENTS}")
        if code == _STRING:
            raw = self._cursor.texts(count, MAX_TEXT_BYTES)
            return "[str]", [text.decode("utf-8", "surrogateescape") for text in raw]
        if code in _SCALARS:
            name, form = _SCALARS[code]
            packed = self._cursor.take(count * form.size)
            return f"[{name}]", list(struct.unpack(f"<{count}{form.format[1:]}", packed))
        raise Malformed(f"is an array of the type {code}")


def _tensors(cursor: Cursor, count: int, alignment: int) -> list[GgufTensor]:
    """The tensors with offsets that count from the start of the data, as the file gives them."""
    tensors: dict[str, GgufTensor] = {}
    for _ in range(count):
        name = _name(cursor.text(MAX_NAME_BYTES), "tensor name")
        if not name:
            raise Malformed("has a tensor without a name")
        if name in tensors:
            raise Malformed(f"has the tensor {shown(name)} twice")
        try:
            tensors[name] = _tensor(cursor, name, alignment)
        except Malformed as error:
            raise Malformed(f"tensor {shown(name)} {error}") from None
    return list(tensors.values())


def _tensor(cursor: Cursor, name: str, alignment: int) -> GgufTensor:
    dimensions = cursor.number(_U32)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise Malformed(f"has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.number(_U64) for _ in range(dimensions))
    if 0 in shape or math.prod(shape) > MAX_INT64:
        raise Malformed(f"has the impossible shape {shape}")
    code, offset = cursor.number(_U32), cursor.number(_U64)
    if code not in TYPES:
        raise Malformed(f"has the unknown type {code}")
    kind = TYPES[code]
    if shape[0] % kind.block_size:
        raise Malformed(f"has rows of {shape[0]}, no multiple of {kind.name}'s {kind.block_size}")
    if offset % alignment:
        raise Malformed(f"starts at {offset}, no multiple of {alignment}")
    return GgufTensor(name, shape, kind.name, offset, kind.size_bytes(math.prod(shape)))


def _placed(relative: list[GgufTensor], data_offset: int, size: int) -> tuple[GgufTensor, ...]:
    """The same tensors with offsets in the file, all inside it and none upon another."""
    end, last = 0, ""
    for tensor in sorted(relative, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise Malformed(f"tensors {shown(last)} and {shown(tensor.name)} overlap")
        end, last = tensor.offset + tensor.size_bytes, tensor.name
        if data_offset + end > size:
            raise Malformed(f"tensor {shown(last)} ends {data_offset + end - size} bytes too late")
    return tuple(
        GgufTensor(each.name, each.shape, each.type, data_offset + each.offset, each.size_bytes)
        for each in relative
    )
