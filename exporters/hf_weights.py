"""The float weights of a Hugging Face folder, read in blocks of rows; and the three float types.

Knows where each tensor lies and how its bits are read; never knows what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ExportError, SourceError, UnsupportedModelError
from edgekit.formats import safetensors
from edgekit.model_folder import WEIGHTS, WEIGHTS_INDEX, as_source
from edgekit.source import ModelSource

BLOCK_BYTES = 4 << 20

# Bits as numpy holds them; numpy has no bfloat16, so those stay raw until they are widened.
_STORED: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True)
class Weight:
    """One tensor: its file, place, shape (rows first) and float type ("F32", "F16", "BF16")."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def rows(self) -> int:
        """Length of the first dimension."""
        return self.shape[0]

    @property
    def row_elements(self) -> int:
        """Values in one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64))


def stored_type(dtype: str) -> Any:
    """The numpy dtype that holds the bits of "F32", "F16" or "BF16"."""
    return _STORED[dtype]


def find(source: ModelSource) -> dict[str, Weight]:
    """Every tensor of a Hugging Face folder by name, from one safetensors file or its shards.

    Raises SourceError when the folder has none, or the index and its shards disagree;
    UnsupportedModelError for tensors that are not F32, F16 or BF16, and for scalars.
    """
    shard_of: dict[str, str] = {}
    if WEIGHTS_INDEX in source.files:
        with as_source(source.file_path(WEIGHTS_INDEX)):
            shard_of = safetensors.read_index(source.file_path(WEIGHTS_INDEX))
        names = sorted(set(shard_of.values()))
    elif WEIGHTS in source.files:
        names = [WEIGHTS]
    else:
        raise SourceError(
            f"{source.path} has no {WEIGHTS}",
            hint="save the model with save_pretrained(..., safe_serialization=True)",
        )
    found: dict[str, Weight] = {}
    for file_name in names:
        if file_name not in source.files:
            raise SourceError(f"{WEIGHTS_INDEX} names '{file_name}', which is not in {source.path}")
        path = source.file_path(file_name)
        with as_source(path):
            tensors = safetensors.read(path).tensors
        for tensor in tensors.values():
            if shard_of and shard_of.get(tensor.name) != file_name:
                raise SourceError(
                    f"{WEIGHTS_INDEX} does not say that {file_name} has '{tensor.name}'"
                )
            if tensor.dtype not in _STORED or not tensor.shape:
                raise UnsupportedModelError(
                    f"tensor '{tensor.name}' is {tensor.dtype} {list(tensor.shape)}, "
                    "not an array of F32, F16 or BF16",
                    hint="export from the model before it was quantized",
                )
            found[tensor.name] = Weight(
                tensor.name, path, tensor.dtype, tuple(tensor.shape), tensor.offset
            )
    if missing := sorted(set(shard_of) - set(found)):
        raise SourceError(f"tensor '{missing[0]}' of {WEIGHTS_INDEX} is in none of its shards")
    return found


def blocks(weight: Weight, rows_together: int = 1) -> Iterator[NDArray[Any]]:
    """The tensor in order, in blocks of about 4 MiB of whole rows, with the bits it has on disk.

    Every block holds a multiple of ``rows_together`` rows (0: the whole tensor in one block); the
    memory of a block is used again for the next.
    """
    stored = _STORED[weight.dtype]
    row_bytes = max(weight.row_elements * stored.itemsize, 1)
    group = rows_together or max(weight.rows, 1)
    if weight.rows % group:
        raise SourceError(f"'{weight.name}' has {weight.rows} rows, no multiple of {group}")
    step = min(max(BLOCK_BYTES // (row_bytes * group), 1) * group, max(weight.rows, 1))
    buffer = np.empty((step, *weight.shape[1:]), dtype=stored)
    try:
        with weight.path.open("rb", buffering=0) as file:
            file.seek(weight.offset)
            for start in range(0, weight.rows, step):
                block = buffer[: min(step, weight.rows - start)]
                _fill(file, block.reshape(-1).view(np.uint8).data, weight)
                yield block
    except OSError as error:
        raise SourceError(f"cannot read {weight.path}: {error.strerror}") from error


def _fill(file: Any, room: memoryview, weight: Weight) -> None:
    while len(room):
        count = file.readinto(room)
        if not count:
            raise SourceError(f"{weight.path} shrank while '{weight.name}' was read")
        room = room[count:]


def to_float32(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Exact float32 values of a block of "F32", "F16" or "BF16" bits."""
    if dtype == "BF16":
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return bits.astype(np.float32, copy=False)


def from_float32(values: NDArray[np.float32], dtype: str, name: str) -> NDArray[Any]:
    """The bits of float32 values as "F32", "F16" or "BF16", rounded to nearest, ties to even.

    Raises ExportError where a finite value leaves the range of F16; ``name`` is for its message.
    """
    if dtype == "F32":
        return np.ascontiguousarray(values)
    if dtype == "F16":
        try:
            with np.errstate(over="raise"):
                return np.ascontiguousarray(values).astype(np.float16)
        except FloatingPointError:
            raise ExportError(
                f"'{name}' holds values beyond the range of F16 (65504)",
                hint="choose BF16 or F32",
            ) from None
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Half of the dropped part, and one bit less when the kept part is even already.
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    not_a_number = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    rounded[not_a_number] = bits[not_a_number] | np.uint32(0x00400000)
    return (rounded >> 16).astype(np.uint16)
