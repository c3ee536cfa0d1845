"""Walks through the tables of a flatbuffer in a file: numbers, texts and lists, bounded, in any
order.

Knows the encoding and no schema; never holds more of the file than a few pages, and never follows
an offset out of it.

Encoding: https://flatbuffers.dev/internals/.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from edgekit.formats.foreign import Malformed

# Tables may be shared, so a small file can hold a graph of any size: what counts is what is read.
MAX_READS = 1 << 19
MAX_TEXT_BYTES = 1 << 16
MAX_LIST = 1 << 18

_PAGE_BYTES = 1 << 16
_PAGES = 16
_LIST_PRICE = 64  # numbers of a list that cost as much as one read
_KINDS = {form: struct.Struct(f"<{form}") for form in "bBhHiIqQfd"}


class Flatbuffer:
    """A file of ``size`` bytes, of which single values are read. Raises Malformed."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._pages: dict[int, bytes] = {}
        self._reads = 0

    def root(self, identifier: bytes) -> Table:
        """The outermost table; the file must carry the four bytes of ``identifier``."""
        if self._size < 8 or self.take(4, 4) != identifier:
            raise Malformed(f"is not a flatbuffer of the kind {identifier.decode()}")
        return self.table(self.number("I", 0))

    def table(self, at: int) -> Table:
        """The table that begins at ``at``."""
        return Table(self, at)

    def take(self, at: int, count: int) -> bytes:
        """``count`` bytes from ``at`` on."""
        self.pay(1)
        if at < 0 or at + count > self._size:
            raise Malformed("has an offset that leads out of the file")
        number, start = divmod(at, _PAGE_BYTES)
        found = self._page(number)[start : start + count]
        while len(found) < count:
            number += 1
            found += self._page(number)[: count - len(found)]
        return found

    def pay(self, reads: int) -> None:
        """Count reads against the limit."""
        self._reads += reads
        if self._reads > MAX_READS:
            raise Malformed("has more values than a real model, or the same ones again and again")

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            self._file.seek(number * _PAGE_BYTES)
            page = self._file.read(_PAGE_BYTES)
            if len(page) < min(_PAGE_BYTES, self._size - number * _PAGE_BYTES):
                raise Malformed("shrank while it was read")
            if len(self._pages) >= _PAGES:
                del self._pages[next(iter(self._pages))]
            self._pages[number] = page
        return page

    def number(self, form: str, at: int) -> Any:
        """The value at ``at``; ``form`` is a letter of ``struct``."""
        kind = _KINDS[form]
        return kind.unpack(self.take(at, kind.size))[0]

    def numbers(self, form: str, at: int, count: int) -> tuple[Any, ...]:
        """``count`` values that lie side by side."""
        if count > MAX_LIST:
            raise Malformed(f"has a list of {count} numbers, the limit is {MAX_LIST}")
        self.pay(count // _LIST_PRICE)
        return struct.unpack(f"<{count}{form}", self.take(at, count * _KINDS[form].size))

    def holds(self, at: int, count: int) -> bool:
        """Whether ``count`` bytes from ``at`` on lie in the file."""
        return at >= 0 and count >= 0 and at + count <= self._size


class Table:
    """One table. Fields go by their number in the schema's order; a union takes two of them."""

    __slots__ = ("_at", "_buffer", "_places")

    def __init__(self, buffer: Flatbuffer, at: int) -> None:
        self._buffer, self._at = buffer, at
        places = at - buffer.number("i", at)
        size, own = buffer.numbers("H", places, 2)
        if size < 4 or size % 2:
            raise Malformed("has a table without fields' places")
        if not buffer.holds(at, own):
            raise Malformed("has a table that leads out of the file")
        self._places = buffer.numbers("H", places + 4, size // 2 - 2)
        if any(place > own for place in self._places):
            raise Malformed("has a field beyond the end of its table")

    def _place(self, field: int) -> int | None:
        """Where a field's value lies; None where the table leaves it out."""
        place = self._places[field] if field < len(self._places) else 0
        return self._at + place if place else None

    def has(self, field: int) -> bool:
        """Whether the table has the field."""
        return self._place(field) is not None

    def number(self, field: int, form: str, default: int = 0) -> Any:
        """A number, or ``default`` where the file leaves it out."""
        at = self._place(field)
        return default if at is None else self._buffer.number(form, at)

    def _target(self, field: int) -> int | None:
        """Where the offset in a field leads."""
        at = self._place(field)
        return None if at is None else at + int(self._buffer.number("I", at))

    def table(self, field: int) -> Table | None:
        """A table inside this one."""
        at = self._target(field)
        return None if at is None else Table(self._buffer, at)

    def extent(self, field: int, width: int = 1) -> tuple[int, int]:
        """Where a list of values of ``width`` bytes begins, and how many there are: all of them lie
        in the file.
        """
        at = self._target(field)
        if at is None:
            return 0, 0
        count = self._buffer.number("I", at)
        if not self._buffer.holds(at + 4, count * width):
            raise Malformed(f"has a list of {count} values that leads out of the file")
        return at + 4, count

    def tables(self, field: int, most: int) -> Iterator[Table]:
        """The tables of a list, of which there may be ``most``."""
        start, count = self.extent(field, 4)
        if count > most:
            raise Malformed(f"has a list of {count} parts, the limit is {most}")
        for at in range(start, start + 4 * count, 4):
            yield Table(self._buffer, at + int(self._buffer.number("I", at)))

    def numbers(self, field: int, form: str) -> tuple[Any, ...]:
        """The numbers of a list."""
        start, count = self.extent(field, _KINDS[form].size)
        return self._buffer.numbers(form, start, count) if count else ()

    def text(self, field: int) -> str:
        """A text; bytes that are no UTF-8 become lone surrogates."""
        start, count = self.extent(field)
        if count > MAX_TEXT_BYTES:
            raise Malformed(f"has a text of {count} bytes, the limit is {MAX_TEXT_BYTES}")
        self._buffer.pay(count // _LIST_PRICE)
        return self._buffer.take(start, count).decode("utf-8", "surrogateescape") if count else ""
