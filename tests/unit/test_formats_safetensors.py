"""The safetensors header reader, checked against files that the safetensors package writes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgekit.errors import CorruptArtifactError, SourceError, UnsafePathError
from edgekit.formats import safetensors


def _file(tmp_path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def _entry(start: int, end: int, *shape: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_a_real_file_is_read_to_the_byte(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "wide": rng.normal(size=(3, 5)).astype(np.float32),
        "half": rng.normal(size=(2, 3, 4)).astype(np.float16),
        "ids": np.arange(7, dtype=np.int64),
        "mask": np.array([True, False]),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "np"})
    header = safetensors.read(path)
    assert header.metadata == {"format": "np"}
    assert header.tensors.keys() == arrays.keys()
    raw = path.read_bytes()
    for name, array in arrays.items():
        tensor = header.tensors[name]
        assert tensor.shape == array.shape
        assert tensor.elements == array.size
        assert raw[tensor.offset : tensor.offset + tensor.size_bytes] == array.tobytes()
    assert {name: tensor.dtype for name, tensor in header.tensors.items()} == {
        "wide": "F32",
        "half": "F16",
        "ids": "I64",
        "mask": "BOOL",
        "scalar": "F64",
        "empty": "F32",
    }


@pytest.mark.parametrize("dtype", sorted(safetensors.DTYPES))
def test_every_type_has_the_size_that_the_safetensors_package_gives_it(
    dtype: str, tmp_path: Path
) -> None:
    size = safetensors.DTYPES[dtype]
    path = _file(tmp_path, {"a": _entry(0, size, 8, dtype=dtype)}, bytes(size))
    assert safetensors.read(path).tensors["a"].size_bytes == size
    with safe_open(path, "np") as other:
        assert other.get_slice("a").get_shape() == [8]


HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": _entry(0, 4, 4), "b": _entry(2, 6, 4)}, bytes(6), "overlaps"),
    "hole": ({"a": _entry(0, 4, 4), "b": _entry(5, 9, 4)}, bytes(9), "hole"),
    "hole at the start": ({"a": _entry(1, 5, 4)}, bytes(5), "hole"),
    "past the end": ({"a": _entry(0, 4, 4)}, bytes(3), "should have"),
    "bytes left over": ({"a": _entry(0, 4, 4)}, bytes(5), "should have"),
    "backwards": ({"a": _entry(4, 0, 4)}, bytes(4), "size of its shape"),
    "negative": ({"a": _entry(-4, 0, 4)}, bytes(4), "not described"),
    "wrong size": ({"a": _entry(0, 4, 3)}, bytes(4), "size of its shape"),
    "wrapping shape": ({"a": _entry(0, 4, 1 << 32, 1 << 32, 4)}, bytes(4), "impossible shape"),
    "half a byte": ({"a": _entry(0, 2, 3, dtype="F4")}, bytes(2), "size of its shape"),
    "huge number": ({"a": _entry(0, 10**30, 4)}, bytes(4), "not described"),
    "float offset": ({"a": {**_entry(0, 4, 4), "data_offsets": [0, 4.0]}}, bytes(4), "described"),
    "boolean shape": ({"a": {**_entry(0, 1), "shape": [True]}}, bytes(1), "not described"),
    "unknown type": ({"a": _entry(0, 4, 4, dtype="Q4")}, bytes(4), "unknown type 'Q4'"),
    "unknown key": ({"a": {**_entry(0, 4, 4), "x": 1}}, bytes(4), "not described"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, bytes(4), "not described"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "metadata"),
    "a list": ([], b"", "not an object"),
    "not json": (b"{{", b"", "not JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "UTF-8"),
    "nested": (b'{"a":' * 50_000, b"", "nested"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(name: str, tmp_path: Path) -> None:
    header, data, says = HOSTILE[name]
    with pytest.raises(CorruptArtifactError, match=says) as caught:
        safetensors.read(_file(tmp_path, header, data))
    assert caught.value.message.startswith("model.safetensors: ")


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - {"unknown key", "metadata of numbers"}))
def test_the_safetensors_package_refuses_the_same(name: str, tmp_path: Path) -> None:
    header, data, _ = HOSTILE[name]
    with pytest.raises(SafetensorError):
        safe_open(_file(tmp_path, header, data), "np")


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    entry = json.dumps(_entry(0, 4, 4))
    path = _file(tmp_path, f'{{"a": {entry}, "a": {entry}}}'.encode(), bytes(4))
    with pytest.raises(CorruptArtifactError, match="twice"):
        safetensors.read(path)


@pytest.mark.parametrize("length", [65, 100_000_001, 1 << 62, (1 << 64) - 1])
def test_a_header_longer_than_the_file_or_the_limit_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 62)
    with pytest.raises(CorruptArtifactError, match=r"ends early|limit"):
        safetensors.read(path)


@pytest.mark.parametrize("size", range(10))
def test_a_cut_file_is_refused(size: int, tmp_path: Path) -> None:
    path = _file(tmp_path, {"a": _entry(0, 4, 4)}, bytes(4))
    os.truncate(path, size)
    with pytest.raises(CorruptArtifactError):
        safetensors.read(path)


def test_an_index_names_the_shard_of_each_tensor(tmp_path: Path) -> None:
    shards = {"a.weight": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": shards}))
    assert safetensors.read_index(path) == shards


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "C:b.safetensors",
        ".safetensors",
        "..safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "a" * 300 + ".safetensors",
        "pytorch_model.bin",
        "",
        7,
        None,
    ],
)
def test_an_index_that_leaves_its_folder_is_refused(shard: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UnsafePathError):
        safetensors.read_index(path)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}'])
def test_an_index_without_a_map_is_corrupt(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(raw)
    with pytest.raises(CorruptArtifactError):
        safetensors.read_index(path)


def test_what_is_not_a_file_is_a_source_error(tmp_path: Path) -> None:
    for read in (safetensors.read, safetensors.read_index):
        with pytest.raises(SourceError):
            read(tmp_path)
