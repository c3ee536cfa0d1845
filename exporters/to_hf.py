"""Turns a GGUF file into a Hugging Face folder: dequantized weights, config and tokenizer.

Knows how the folder is written; what a family or a tokenizer is, others know. Runs no engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf as ggml
import numpy as np

from edgekit import __version__, _fs
from edgekit.errors import UnsupportedModelError
from edgekit.exporter import Progress
from edgekit.exporters.hf_weights import from_float32, stored_type
from edgekit.exporters.to_hf_families import layout
from edgekit.exporters.to_hf_layout import Array, Destination, Layout
from edgekit.exporters.to_hf_tokenizer import GgufTokenizer
from edgekit.formats import gguf
from edgekit.model_folder import WEIGHTS
from edgekit.source import ModelSource

MARKER = "edgekit_convert.json"

_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BLOCK_VALUES = 4 << 20  # dequantized at a time, where no change needs the whole tensor


@dataclass(frozen=True)
class _Tensor:
    """One tensor on its way: ``shape`` is the one in the folder."""

    stored: gguf.GgufTensor
    destination: Destination
    shape: tuple[int, ...]


def write(found: ModelSource, out: Path, dtype: str | None, *, progress: Progress) -> None:
    """Write the GGUF source ``found`` as the Hugging Face folder ``out``.

    ``dtype`` is "F32", "F16", "BF16", or None for what the file holds ("F32" if that is no float).
    Raises what ``edgekit.converter.convert`` says.
    """
    header = gguf.read(found.path)
    stored = header.main_type()
    kind = dtype or (stored if stored in _TORCH_NAMES else "F32")
    with found.path.open("rb") as file:
        family = layout(header, lambda name: _whole(file, header.tensor(name)))
        tensors = _plan(header, family)
        texts = _texts(header, family, kind)
        size_bytes = sum(tensor.stored.elements for tensor in tensors) * _value_bytes(kind)
        _fs.require_space(out, size_bytes + sum(map(len, texts.values())))
        with _fs.staged(out, owns=lambda folder: (folder / MARKER).is_file()) as folder:
            texts[MARKER] = _json_bytes(_provenance(found, stored, kind, progress))
            for name, text in texts.items():
                (folder / name).write_bytes(text)
            _write_weights(folder / WEIGHTS, file, tensors, kind, progress)


def config(found: ModelSource) -> dict[str, Any]:
    """The config.json that ``write`` would write, less what the tokenizer adds to it."""
    header = gguf.read(found.path)
    with found.path.open("rb") as file:
        return layout(header, lambda name: _whole(file, header.tensor(name))).config()


def _provenance(found: ModelSource, stored: str, kind: str, progress: Progress) -> dict[str, Any]:
    total, done = found.size_bytes, 0

    def hashed(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        progress("hash", done, total)

    return {
        "edgekit": __version__,
        "file": found.path.name,
        "sha256": found.hashes(hashed)[found.path.name],
        "type": stored,
        "dtype": kind,
    }


def _value_bytes(kind: str) -> int:
    return int(stored_type(kind).itemsize)


def _json_bytes(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _texts(header: gguf.GgufHeader, family: Layout, kind: str) -> dict[str, bytes]:
    """Every file but the weights."""
    tokenizer = GgufTokenizer(header)
    ends = tokenizer.end_ids
    ids = {
        "bos_token_id": tokenizer.special("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.special("padding"),
    }
    name = _TORCH_NAMES[kind]
    # transformers 5 reads dtype, 4.x torch_dtype.
    config = family.config() | ids | {"dtype": name, "torch_dtype": name}
    context_length = family.integer("context_length")
    return {
        "config.json": _json_bytes(config),
        "generation_config.json": _json_bytes({k: v for k, v in ids.items() if v is not None}),
        "tokenizer.json": _json_bytes(tokenizer.tokenizer_json()),
        "tokenizer_config.json": _json_bytes(tokenizer.tokenizer_config(context_length)),
    }


def _plan(header: gguf.GgufHeader, family: Layout) -> list[_Tensor]:
    tensors = []
    for stored in header.tensors:
        destination = family.destination(stored.name)
        if destination is None:
            continue
        if not hasattr(ggml.GGMLQuantizationType, stored.type) or not _can_dequantize(stored):
            raise UnsupportedModelError(f"tensors of the type {stored.type} cannot be dequantized")
        shape = tuple(reversed(stored.shape))
        tensors.append(
            _Tensor(stored, destination, shape[::-1] if destination.transposed else shape)
        )
    if absent := family.missing_layers():
        raise UnsupportedModelError(f"the GGUF file has no tensors of layer {min(absent)}")
    return tensors


def _can_dequantize(stored: gguf.GgufTensor) -> bool:
    kind = gguf.TYPES[ggml.GGMLQuantizationType[stored.type].value]
    try:
        _dequantize(bytes(kind.type_size), stored.type, 1)
    except NotImplementedError:
        return False
    return True


def _dequantize(raw: bytes, kind: str, rows: int) -> Array:
    """Float32 [rows, row length] of packed rows."""
    packed = np.frombuffer(raw, dtype=np.uint8).reshape(rows, -1)
    values: Array = ggml.dequantize(packed, ggml.GGMLQuantizationType[kind])
    return values.astype(np.float32, copy=False)


def _blocks(file: BinaryIO, tensor: gguf.GgufTensor, values: int) -> Iterator[Array]:
    """The rows of a tensor, about ``values`` values at a time."""
    rows = tensor.elements // tensor.shape[0]
    row_bytes = tensor.size_bytes // rows
    step = max(1, values // tensor.shape[0])
    for start in range(0, rows, step):
        count = min(step, rows - start)
        file.seek(tensor.offset + start * row_bytes)
        yield _dequantize(file.read(count * row_bytes), tensor.type, count)


def _whole(file: BinaryIO, tensor: gguf.GgufTensor) -> Array:
    """All of a tensor, rows first."""
    blocks = list(_blocks(file, tensor, tensor.elements))
    return np.concatenate(blocks).reshape(tuple(reversed(tensor.shape)))


def _write_weights(
    path: Path, file: BinaryIO, tensors: list[_Tensor], kind: str, progress: Progress
) -> None:
    """One safetensors file, a block at a time: https://github.com/huggingface/safetensors#format."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.stored.elements * _value_bytes(kind)
        entries[tensor.destination.name] = {
            "dtype": kind,
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("xb") as weights:
        weights.write(len(header).to_bytes(8, "little") + header)
        done = 0
        for tensor in tensors:
            for block in _changed(file, tensor):
                bits = from_float32(block, kind, tensor.stored.name)
                weights.write(bits.reshape(-1).view(np.uint8).data)
                done += bits.nbytes
                progress("dequantize", done, end)


def _changed(file: BinaryIO, tensor: _Tensor) -> Iterator[Array]:
    if tensor.destination.change is None:
        yield from _blocks(file, tensor.stored, _BLOCK_VALUES)
    else:
        yield tensor.destination.change(_whole(file, tensor.stored))
