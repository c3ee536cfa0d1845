"""Opens files that come from outside: regular files only, sized first, read forward in pieces.

Knows no format; never maps a file, for a file that shrinks under a map kills the process.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from edgekit.errors import SourceError

_PIECE_BYTES = 1 << 20
_LENGTH = struct.Struct("<Q")


class Malformed(ValueError):
    """Bytes break the rules of their format. A reader turns it into an EdgekitError."""


def shown(text: str) -> str:
    """Foreign text that is safe to print inside a one-line message."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size in bytes.

    Raises SourceError where the path is not a regular file, or the system refuses to open or read
    it. A named pipe does not block.
    """
    if "\0" in str(path):
        raise SourceError(f"{shown(str(path))} is not the name of a file")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise SourceError(f"{path} is not a file")
            yield file, status.st_size
    except IsADirectoryError:
        raise SourceError(f"{path} is not a file") from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error


def read_whole(path: Path, max_bytes: int) -> bytes:
    """All bytes of a small file; SourceError when it holds more than ``max_bytes``."""
    with opened(path) as (file, size):
        if size > max_bytes:
            raise SourceError(f"{path} has {size} bytes, more than the {max_bytes} allowed")
        return Cursor(file, size).take(size)


class Cursor:
    """Moves forward through ``size`` bytes of a file.

    Every length is compared with the bytes that are left before any memory is reserved for it;
    Malformed where they do not suffice. Holds one piece of the file, or one item if that is longer.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._unread = size
        self._piece = b""
        self._at = 0

    @property
    def remaining(self) -> int:
        """Bytes between here and the end of the file."""
        return self._unread + len(self._piece) - self._at

    @property
    def position(self) -> int:
        """Bytes between the start of the file and here."""
        return self._size - self.remaining

    def _hold(self, count: int) -> None:
        """Have at least ``count`` bytes in the piece."""
        if count > self.remaining:
            raise Malformed(f"ends early: {count} bytes announced, {self.remaining} left")
        held = self._piece[self._at :]
        parts, missing = [held], count - len(held)
        while missing > 0:
            part = self._file.read(min(self._unread, max(missing, _PIECE_BYTES)))
            if not part:
                raise Malformed("shrank while it was read")
            parts.append(part)
            missing -= len(part)
            self._unread -= len(part)
        self._piece, self._at = b"".join(parts), 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self._at + count
        if end > len(self._piece):
            self._hold(count)
            end = count
        taken = self._piece[self._at : end]
        self._at = end
        return taken

    def number(self, form: struct.Struct) -> Any:
        """The next value of a one-value struct."""
        return form.unpack(self.take(form.size))[0]

    def text(self, max_bytes: int) -> bytes:
        """The next string: eight bytes of length, then that many bytes."""
        length = self.number(_LENGTH)
        if length > max_bytes:
            raise Malformed(f"has a string of {length} bytes, the limit is {max_bytes}")
        return self.take(length)

    def texts(self, count: int, max_bytes: int) -> list[bytes]:
        """The next ``count`` strings, ``max_bytes`` at most in each."""
        if count > self.remaining // _LENGTH.size:
            raise Malformed(f"announces {count} strings with {self.remaining} bytes left")
        found: list[bytes] = []
        while len(found) < count:
            found.append(self.text(max_bytes))
            # The same again for all strings that lie whole in the piece, without a call for each.
            piece, at, unpack = self._piece, self._at, _LENGTH.unpack_from
            last = len(piece) - _LENGTH.size
            for _ in range(count - len(found)):
                if at > last:
                    break
                start = at + _LENGTH.size
                length = unpack(piece, at)[0]
                end = start + length
                if end > len(piece) or length > max_bytes:
                    break
                found.append(piece[start:end])
                at = end
            self._at = at
        return found
