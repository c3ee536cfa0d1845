"""Reads IDX files, plain or gzipped: the images and labels of MNIST and its kin.

Must never reserve more memory than the file's own header promises, within limits; knows no image.

Format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database", at the end: two zero bytes, the type,
the number of axes, their lengths as big-endian uint32, the values.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

from edgekit.errors import SourceError
from edgekit.formats.foreign import Malformed, read_whole

_UNSIGNED_BYTES = 0x08
_MAX_FILE_BYTES = 1 << 30
_MAX_VALUES = 1 << 31
_MAX_AXES = 4
_HEAD = struct.Struct(">HBB")


def read(path: Path) -> tuple[tuple[int, ...], bytes]:
    """Shape and values of a file of unsigned bytes, the last axis fastest.

    Raises SourceError for what is no such file, or holds more or fewer values than it says.
    """
    data = read_whole(path, _MAX_FILE_BYTES)
    try:
        if data[:2] == b"\x1f\x8b":
            return _parsed(_unpacked(data))
        return _parsed(data)
    except Malformed as error:
        raise SourceError(f"{path} {error}", hint="fetch the data again") from None


def _unpacked(data: bytes) -> bytes:
    limit = _MAX_VALUES + 64
    try:
        head = zlib.decompressobj(wbits=31)
        found = head.decompress(data, limit)
    except zlib.error:
        raise Malformed("is no gzip file") from None
    if not head.eof:
        raise Malformed("is cut off, or too large")
    return found


def _parsed(data: bytes) -> tuple[tuple[int, ...], bytes]:
    if len(data) < _HEAD.size:
        raise Malformed("is no IDX file")
    zero, kind, axes = _HEAD.unpack_from(data)
    if zero or kind != _UNSIGNED_BYTES or not 0 < axes <= _MAX_AXES:
        raise Malformed("is no IDX file of unsigned bytes")
    start = _HEAD.size + 4 * axes
    if len(data) < start:
        raise Malformed("is cut off")
    shape = struct.unpack_from(f">{axes}I", data, _HEAD.size)
    if math.prod(shape) != len(data) - start:
        raise Malformed(f"says {shape} and holds {len(data) - start} values")
    return tuple(shape), data[start:]
