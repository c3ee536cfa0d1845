"""From a Hugging Face folder to a GGUF file of floats: metadata, tokenizer, tensors in rows.

Knows the order of the work and the layout of the file; never knows a family or a tokenizer, and
never holds more than one block of rows (a transposed matrix: one whole tensor).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from edgekit import _fs
from edgekit.errors import SourceError, UsageError
from edgekit.exporters import hf_weights, to_gguf_tokenizer
from edgekit.exporters.arch.family import Family, Placement, family_of
from edgekit.exporters.hf_weights import Weight
from edgekit.source import ModelSource

Patch = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]
Progress = Callable[[str, int, int], None]

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
}
_TENSOR_TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the new file: rows from the source (of several tensors, one after the other,
    where they are stacked), or an array that the family made.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weights: tuple[Weight, ...]
    placement: Placement | None
    made: NDArray[np.float32] | None = None

    @property
    def size_bytes(self) -> int:
        count = int(np.prod(self.shape, dtype=np.int64))
        return count * int(hf_weights.stored_type(self.dtype).itemsize)


def write(
    source: ModelSource,
    out: Path,
    dtype: str,
    *,
    progress: Progress | None = None,
    patch: Patch | None = None,
) -> None:
    """Write the model as one GGUF file of floats; the same source gives the same bytes.

    ``dtype`` is "F32", "F16", "BF16", or "native" for the type that each tensor of the source has;
    vectors, norms and position tables are F32 always, as llama.cpp wants them. ``progress`` hears
    (tensor name, bytes done, bytes in all). ``patch`` maps (name in the source, whole float32
    tensor) to a float32 tensor of the same shape, for adapters.
    Raises UnsupportedModelError for what GGUF cannot express, SourceError for a broken folder,
    ExportError for values that do not fit ``dtype``.
    """
    tensors, writer = _plan(source, dtype)
    total = sum(tensor.size_bytes for tensor in tensors)
    with _fs.disk_errors(out):
        _write_header(writer, out)
        done = 0
        with out.open("ab") as file:
            _pad(file)
            for tensor in tensors:
                for bits in _bits(tensor, patch):
                    file.write(bits.reshape(-1).view(np.uint8).data)
                    done += bits.nbytes
                    if progress:
                        progress(tensor.name, done, total)
                _pad(file)


def header_only(source: ModelSource, out: Path, dtype: str) -> None:
    """The file that ``write`` makes, with a hole in place of the tensor data.

    Same header, same size, no weight read and nearly no disk used: what a dry run quantizes.
    """
    tensors, writer = _plan(source, dtype)
    with _fs.disk_errors(out):
        _write_header(writer, out)
        with out.open("ab") as file:
            _pad(file)
            padded = sum(-(-tensor.size_bytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)
            file.truncate(file.tell() + padded)


def _plan(source: ModelSource, dtype: str) -> tuple[list[_Tensor], Any]:
    """What the file will hold: its tensors in order, and a writer that knows all metadata."""
    if dtype not in {*_FILE_TYPES, "native"}:
        raise UsageError(f"float type must be F32, F16, BF16 or native, not {dtype!r}")
    family = family_of(source)
    weights = hf_weights.find(source)
    tensors = _tensors(family, weights, dtype)
    writer = gguf.GGUFWriter(path=None, arch=family.architecture)
    main = _main_type(weights) if dtype == "native" else dtype
    writer.add_type(gguf.GGUFType.MODEL)
    for key, value in family.metadata().items():
        _add(writer, f"{family.architecture}.{key}", value)
    writer.add_file_type(_FILE_TYPES[main])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    to_gguf_tokenizer.add(writer, source, family)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            hf_weights.stored_type(tensor.dtype),
            tensor.size_bytes,
            raw_dtype=_TENSOR_TYPES[tensor.dtype],
        )
    return tensors, writer


def _main_type(weights: dict[str, Weight]) -> str:
    """The float type that most matrix values of the source have."""
    counts: Counter[str] = Counter({"F16": 0})
    for weight in weights.values():
        if len(weight.shape) > 1:
            counts[weight.dtype] += weight.rows * weight.row_elements
    return counts.most_common(1)[0][0]


def _tensors(family: Family, weights: dict[str, Weight], dtype: str) -> list[_Tensor]:
    """All tensors in the order of the file: by block, then by name, however they were sharded."""
    found: dict[str, _Tensor] = {}
    for name, made in family.extra_tensors().items():
        found[name] = _Tensor(name, "F32", made.shape, (), None, made)
    stacks: dict[str, dict[int, tuple[Weight, Placement]]] = {}
    for weight in weights.values():
        placement = family.place(weight.name, weight.shape)
        if placement is None:
            continue
        name, shape = placement.name, placement.shape or weight.shape
        if placement.stack:
            stacks.setdefault(name, {})[placement.stack[0]] = (weight, placement)
            continue
        if name in found:
            raise SourceError(f"two tensors of the source become '{name}'")
        kept = "F32" if _always_float32(name, shape) else dtype
        kept = weight.dtype if kept == "native" else kept
        found[name] = _Tensor(name, kept, shape, (weight,), placement)
    for name, parts in stacks.items():
        found[name] = _stacked(name, parts, dtype)
    _check_complete(family, found)
    return sorted(found.values(), key=lambda tensor: _natural(tensor.name))


def _stacked(name: str, parts: dict[int, tuple[Weight, Placement]], dtype: str) -> _Tensor:
    """The parts of a tensor in order. Raises SourceError unless they are all there, and alike."""
    first, placement = parts[min(parts)]
    count = placement.stack[1] if placement.stack else 0
    if missing := sorted(set(range(count)) - set(parts)):
        raise SourceError(f"the weights are incomplete: part {missing[0]} of '{name}' is missing")
    weights = tuple(parts[index][0] for index in range(count))
    for weight in weights:
        if (weight.shape, weight.dtype) != (first.shape, first.dtype):
            raise SourceError(f"'{weight.name}' and '{first.name}' differ in shape or type")
    kept = first.dtype if dtype == "native" else dtype
    return _Tensor(name, kept, (count, *first.shape), weights, placement)


def _always_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Vectors, norms and the table of positions: llama.cpp's operators take them as F32 only; and
    the router of experts, which is small and decides much, as llama.cpp's own conversion has it.
    """
    return (
        len(shape) == 1
        or name.endswith(".ffn_gate_inp.weight")
        or name.endswith("_norm.weight")
        or not name.endswith(".weight")
        or name == "position_embd.weight"
    )


def _check_complete(family: Family, found: dict[str, _Tensor]) -> None:
    """Every block has the same tensors, and the embedding has a row for every token."""
    parts: dict[int, set[str]] = {index: set() for index in range(family.layers)}
    for name in found:
        if name.startswith("blk."):
            _, block, part = name.split(".", 2)
            parts[int(block)].add(part)
    for index, names in parts.items():
        if lacking := sorted(parts[0] - names) or sorted(names - parts[0]):
            raise SourceError(
                f"the weights are incomplete: layer {index} differs from layer 0 in '{lacking[0]}'"
            )
    needed = {"token_embd.weight", "output_norm.weight"}
    if family.config.get("tie_word_embeddings") is False:
        needed.add("output.weight")
    if lacking := sorted(needed - set(found)):
        raise SourceError(f"the weights are incomplete: nothing becomes '{lacking[0]}'")
    rows = found["token_embd.weight"].shape[0]
    if rows != family.vocab_size:
        raise SourceError(f"the embedding has {rows} rows, but vocab_size is {family.vocab_size}")


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts block 10 after block 9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in _NUMBER.split(name)]


def _add(writer: Any, key: str, value: bool | int | float | str) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _write_header(writer: Any, out: Path) -> None:
    try:
        writer.write_header_to_file(path=out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _pad(file: BinaryIO) -> None:
    file.seek(0, os.SEEK_END)
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _bits(tensor: _Tensor, patch: Patch | None) -> Iterator[NDArray[Any]]:
    """The data of one tensor, block by block, as the file holds it."""
    if tensor.made is not None:
        yield np.ascontiguousarray(tensor.made)
        return
    for weight in tensor.weights:
        yield from _bits_of(weight, tensor, patch)


def _bits_of(weight: Weight, tensor: _Tensor, patch: Patch | None) -> Iterator[NDArray[Any]]:
    assert tensor.placement is not None
    change = tensor.placement.change
    together = 0 if patch else tensor.placement.rows_together
    for block in hf_weights.blocks(weight, together):
        if change is None and patch is None and weight.dtype == tensor.dtype:
            yield block
            continue
        values = hf_weights.to_float32(block, weight.dtype)
        if patch:
            values = patch(weight.name, values)
        if change:
            values = change(values)
        yield from _rounded(values, tensor)


def _rounded(values: NDArray[np.float32], tensor: _Tensor) -> Iterator[NDArray[Any]]:
    """A block in the type of the file; a large one in pieces, so that it is never held twice."""
    step = max(hf_weights.BLOCK_BYTES // max(values[:1].nbytes, 1), 1)
    for start in range(0, len(values), step):
        piece = values[start : start + step]
        yield hf_weights.from_float32(piece, tensor.dtype, tensor.name)
