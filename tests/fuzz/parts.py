"""A GGUF file taken apart, so that a test can lie in one place and put it together again.

Knows the format by itself and trusts its input: it reads only files that the tests made. It must
not import edgekit, or it would check the reader with the reader.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

STRING, ARRAY, U32, I32, F32, U64 = 8, 9, 4, 5, 6, 10
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(raw: bytes | str) -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return u64(len(raw)) + raw


def texts(*raw: bytes | str) -> bytes:
    """The payload of an array of strings."""
    return u32(STRING) + u64(len(raw)) + b"".join(text(each) for each in raw)


def numbers(code: int, form: str, *values: float) -> bytes:
    """The payload of an array of numbers of the GGUF type ``code``."""
    return u32(code) + u64(len(values)) + struct.pack(f"<{len(values)}{form}", *values)


@dataclass
class Entry:
    key: bytes
    code: int
    payload: bytes

    def build(self) -> bytes:
        return text(self.key) + u32(self.code) + self.payload


@dataclass
class Tensor:
    name: bytes
    shape: tuple[int, ...]
    code: int
    offset: int

    def build(self) -> bytes:
        shape = b"".join(u64(each) for each in self.shape)
        return text(self.name) + u32(len(self.shape)) + shape + u32(self.code) + u64(self.offset)


@dataclass
class Parts:
    """``places`` holds (offset, width) of every number in the header that was read."""

    version: int = 3
    entries: list[Entry] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    data: bytes = b""
    entry_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32
    places: list[tuple[int, int]] = field(default_factory=list)

    def build(self) -> bytes:
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        entries = len(self.entries) if self.entry_count is None else self.entry_count
        head = b"GGUF" + u32(self.version) + u64(tensors) + u64(entries)
        head += b"".join(each.build() for each in self.entries)
        head += b"".join(each.build() for each in self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data

    def entry(self, key: str) -> Entry:
        return next(each for each in self.entries if each.key == key.encode())

    def set(self, key: str, code: int, payload: bytes) -> None:
        """Replace an entry, or add it."""
        self.entries = [each for each in self.entries if each.key != key.encode()]
        self.entries.append(Entry(key.encode(), code, payload))

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


class _Walk:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 4
        self.places: list[tuple[int, int]] = []

    def number(self, width: int) -> int:
        self.places.append((self.at, width))
        value = int.from_bytes(self.raw[self.at : self.at + width], "little")
        self.at += width
        return value

    def text(self) -> bytes:
        length = self.number(8)
        self.at += length
        return self.raw[self.at - length : self.at]

    def entry(self) -> Entry:
        key, code = self.text(), self.number(4)
        start = self.at
        if code == ARRAY:
            inner, count = self.number(4), self.number(8)
        else:
            inner, count = code, 1
        if inner == STRING:
            for _ in range(count):
                self.text()
        else:
            self.at += count * _SIZES[inner]
        return Entry(key, code, self.raw[start : self.at])

    def tensor(self) -> Tensor:
        name, dimensions = self.text(), self.number(4)
        shape = tuple(self.number(8) for _ in range(dimensions))
        return Tensor(name, shape, self.number(4), self.number(8))


def take_apart(raw: bytes) -> Parts:
    """``take_apart(raw).build() == raw`` for a sound file with the default alignment."""
    walk = _Walk(raw)
    version, tensors, entries = walk.number(4), walk.number(8), walk.number(8)
    parts = Parts(version=version)
    parts.entries = [walk.entry() for _ in range(entries)]
    parts.tensors = [walk.tensor() for _ in range(tensors)]
    parts.data = raw[-(-walk.at // parts.alignment) * parts.alignment :]
    parts.places = walk.places
    return parts
