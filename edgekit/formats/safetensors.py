"""Reads the header of a safetensors file, and the index of a sharded model.

Must never read tensor data, import numpy, or follow a name out of the model's folder.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import CorruptArtifactError, UnsafePathError
from edgekit.formats import json_file
from edgekit.formats.foreign import Cursor, Malformed, opened, read_whole, shown

MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 1 << 25
MAX_TENSORS = 1 << 18
MAX_DIMENSIONS = 8
MAX_INT64 = (1 << 63) - 1

# Bits of one value of each type.
DTYPES = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """One tensor. ``shape`` is row-major, ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a file says about its tensors, in the order of their bytes."""

    metadata: dict[str, str]
    tensors: dict[str, SafeTensor]


def read(path: Path) -> SafetensorsHeader:
    """The header of the safetensors file at ``path``.

    Raises SourceError if there is no regular file to read, CorruptArtifactError for a header over
    100 MB or not strict JSON, an unknown dtype, a size that is not dtype times shape, and tensors
    that leave the file, overlap, or leave a hole.
    """
    with opened(path) as (file, size):
        cursor = Cursor(file, size)
        try:
            length = cursor.number(_LENGTH)
            if length > MAX_HEADER_BYTES:
                raise Malformed(f"has a header of {length} bytes, the limit is {MAX_HEADER_BYTES}")
            return _header(json_file.parse(cursor.take(length)), cursor.position, size)
        except Malformed as error:
            raise _corrupt(path, error) from None


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of the shard that holds it, from a ``*.safetensors.index.json``.

    Raises SourceError if there is no regular file to read, CorruptArtifactError for anything but
    such an index, UnsafePathError for a shard that is not a plain name of a safetensors file.
    """
    try:
        index = json_file.parse(read_whole(path, MAX_INDEX_BYTES))
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise Malformed("has no weight_map")
    except Malformed as error:
        raise _corrupt(path, error) from None
    for shard in shards.values():
        if not (isinstance(shard, str) and _is_plain_name(shard)):
            raise UnsafePathError(
                f"{path.name} sends to {shown(str(shard))}, not a file beside it",
                hint="do not use this model",
            )
    return shards


def _corrupt(path: Path, error: Malformed) -> CorruptArtifactError:
    return CorruptArtifactError(f"{path.name}: {error}", hint="fetch the file again")


def _is_plain_name(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and not name.startswith(".")
        and len(name) <= 255
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def _header(entries: Any, data_offset: int, size: int) -> SafetensorsHeader:
    if not isinstance(entries, dict) or len(entries) > MAX_TENSORS:
        raise Malformed("has a header that is not an object of tensors")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Malformed("has metadata that is not text")
    tensors = [_tensor(name, entry, data_offset) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    end = data_offset
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the one before" if tensor.offset < end else "follows a hole"
            raise Malformed(f"tensor {shown(tensor.name)} {what}")
        end += tensor.size_bytes
    if end != size:
        raise Malformed(f"should have {end} bytes and has {size}")
    return SafetensorsHeader(metadata, {tensor.name: tensor for tensor in tensors})


def _tensor(name: str, entry: Any, data_offset: int) -> SafeTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if len(
            entry
        ) == 3 and all(_is_size(number) for number in [*shape, start, end]):
            pass
        case _:
            raise Malformed(f"tensor {shown(name)} is not described by dtype, shape, data_offsets")
    if dtype not in DTYPES:
        raise Malformed(f"tensor {shown(name)} has the unknown type {shown(dtype)}")
    elements = math.prod(shape) if len(shape) <= MAX_DIMENSIONS else MAX_INT64 + 1
    if elements > MAX_INT64:
        raise Malformed(f"tensor {shown(name)} has an impossible shape")
    if start > end or elements * DTYPES[dtype] != 8 * (end - start):
        raise Malformed(f"tensor {shown(name)} has not the size of its shape")
    return SafeTensor(name, dtype, tuple(shape), data_offset + start, end - start)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_INT64
