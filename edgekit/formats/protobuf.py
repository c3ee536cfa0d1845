"""Walks through protobuf messages in a file: fields, numbers and texts, bounded, in any order.

Knows the wire format and no message; never holds more of the file than a window.

Encoding: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from edgekit.formats.foreign import Malformed

MAX_FIELDS = 1 << 21
MAX_TEXT_BYTES = 1 << 16
MAX_LIST = 1 << 16

VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT = struct.Struct("<f")
_WINDOW_BYTES = 1 << 16


class _Window:
    """Random access to a file through one small piece of it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._piece, self._start = b"", 0

    def take(self, at: int, count: int) -> bytes:
        """``count`` bytes from ``at`` on."""
        start = at - self._start
        if start < 0 or start + count > len(self._piece):
            if at + count > self._size:
                raise Malformed("ends early")
            self._file.seek(at)
            self._piece = self._file.read(max(count, _WINDOW_BYTES))
            self._start, start = at, 0
            if len(self._piece) < count:
                raise Malformed("shrank while it was read")
        return self._piece[start : start + count]

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The number that begins at ``at``, and where it ends."""
        raw = self.take(at, min(10, end - at))
        value = 0
        for i, byte in enumerate(raw):
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                if value >> 64:
                    break
                return value, at + i + 1
        raise Malformed("has a number that does not end")


def signed(value: int) -> int:
    """A varint as the two's complement number that it stands for."""
    return value - (1 << 64) if value >> 63 else value


@dataclass(slots=True)
class Field:
    """A field of a message: its number, its wire type, and a number, or where its bytes lie."""

    number: int
    wire: int
    value: int
    start: int
    end: int


class Messages:
    """The fields of nested messages. ``of`` and the like name the field that holds a message."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._window = _Window(file, size)
        self._fields = 0

    def fields(self, at: int, end: int) -> Iterator[Field]:
        """The fields between two places of the file."""
        varint = self._window.varint
        while at < end:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise Malformed(f"has more than {MAX_FIELDS} fields")
            key, at = varint(at, end)
            number, wire = key >> 3, key & 7
            start, value = at, 0
            if wire == VARINT:
                value, at = varint(at, end)
                stop = at
            elif wire == _BYTES:
                length, start = varint(at, end)
                at = stop = start + length
            elif wire in (_FIXED64, _FIXED32):
                at = stop = start + (8 if wire == _FIXED64 else 4)
            else:
                raise Malformed(f"has a field of the unknown kind {wire}")
            if at > end:
                raise Malformed("ends early")
            if number == 0:
                raise Malformed("has a field without a number")
            yield Field(number, wire, value, start, stop)

    def inside(self, of: Field) -> Iterator[Field]:
        """The fields of the message that a field holds."""
        if of.wire != _BYTES:
            raise Malformed("has a number where a message belongs")
        return self.fields(of.start, of.end)

    def number(self, of: Field) -> int:
        """A whole number, as it is written: see ``signed``."""
        if of.wire != VARINT:
            raise Malformed("has something else where a number belongs")
        return of.value

    def real(self, of: Field) -> float:
        """A float32."""
        if of.wire != _FIXED32:
            raise Malformed("has something else where a number belongs")
        return float(_FLOAT.unpack(self._window.take(of.start, 4))[0])

    def text(self, of: Field) -> str:
        """A text; bytes that are no UTF-8 become lone surrogates."""
        if of.wire != _BYTES:
            raise Malformed("has a number where text belongs")
        size = of.end - of.start
        if size > MAX_TEXT_BYTES:
            raise Malformed(f"has a text of {size} bytes, the limit is {MAX_TEXT_BYTES}")
        return self._window.take(of.start, size).decode("utf-8", "surrogateescape")

    def data(self, of: Field) -> bytes:
        """A few bytes."""
        size = of.end - of.start
        if of.wire != _BYTES or size > MAX_TEXT_BYTES:
            raise Malformed("has something else where bytes belong")
        return self._window.take(of.start, size)

    def numbers(self, of: Field) -> list[int]:
        """One of several whole numbers, or all of them packed."""
        if of.wire != _BYTES:
            return [signed(self.number(of))]
        self._check_list(of)
        found, at = [], of.start
        while at < of.end:
            value, at = self._window.varint(at, of.end)
            found.append(signed(value))
        return found

    def reals(self, of: Field) -> list[float]:
        """One of several float32, or all of them packed."""
        if of.wire != _BYTES:
            return [self.real(of)]
        self._check_list(of)
        raw = self._window.take(of.start, of.end - of.start)
        if len(raw) % _FLOAT.size:
            raise Malformed("has half a number")
        return [value for (value,) in _FLOAT.iter_unpack(raw)]

    @staticmethod
    def _check_list(of: Field) -> None:
        if of.end - of.start > 8 * MAX_LIST:
            raise Malformed(f"has a list of more than {MAX_LIST} numbers")
