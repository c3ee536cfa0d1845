"""The GGUF header reader on real files, checked against the gguf package and against ggml."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest

from edgekit.errors import CorruptArtifactError, SourceError, VersionError
from edgekit.formats import gguf

TOKENS = "tokenizer.ggml.tokens"


def _vocabulary(llama_source: Path, name: str = "*") -> list[Path]:
    return sorted(llama_source.glob(f"vendor/llama.cpp/models/ggml-vocab-{name}.gguf"))


def _reference_value(field: reference.ReaderField) -> Any:
    if field.types[-1] != reference.GGUFValueType.STRING:
        return field.contents()
    raw = [bytes(field.parts[index]) for index in field.data]
    values = [each.decode("utf-8", "surrogateescape") for each in raw]
    return values if field.types[0] == reference.GGUFValueType.ARRAY else values[0]


def _assert_same_as_the_reference(path: Path) -> None:
    header, other = gguf.read(path), reference.GGUFReader(path)
    fields = {key: f for key, f in other.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, field in fields.items():
        assert header.metadata[key] == _reference_value(field), key
    mine = [(t.name, t.shape, t.type, t.offset, t.size_bytes) for t in header.tensors]
    assert mine == [
        (t.name, tuple(map(int, t.shape)), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in other.tensors
    ]


def test_a_real_model_reads_as_the_gguf_package_reads_it(smollm2_gguf: Path) -> None:
    _assert_same_as_the_reference(smollm2_gguf)


def test_a_real_model_is_described(smollm2_gguf: Path) -> None:
    header = gguf.read(smollm2_gguf)
    assert header.architecture == "llama"
    assert header.parameters == 134_515_008
    assert header.types() == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert header.main_type() == "Q4_1"
    assert 5.5 < header.bits_per_weight < 6.5
    assert header.tensor("token_embd.weight").shape == (576, 49152)
    assert header.tensor("token_embd.weight").elements == 576 * 49152
    last = header.tensors[-1]
    assert last.offset + last.size_bytes <= header.file_size == smollm2_gguf.stat().st_size
    assert header.data_offset % header.alignment == 0
    with pytest.raises(CorruptArtifactError, match="no tensor 'head'"):
        header.tensor("head")


def test_a_49k_vocabulary_is_read_in_a_third_of_a_second(smollm2_gguf: Path) -> None:
    times_s = []
    for _ in range(3):
        start = time.process_time()
        assert len(gguf.read(smollm2_gguf).metadata[TOKENS]) == 49152
        times_s.append(time.process_time() - start)
    assert min(times_s) < 0.3


def test_reading_leaves_the_weights_on_the_disk(smollm2_gguf: Path, tmp_path: Path) -> None:
    """The same header before 60 GB of sparse weights costs no more memory."""
    header = gguf.read(smollm2_gguf)
    large = tmp_path / "large.gguf"
    with smollm2_gguf.open("rb") as file:
        large.write_bytes(file.read(header.data_offset))
    os.truncate(large, 60 << 30)
    program = (
        "import re, sys; from pathlib import Path; from edgekit.formats import gguf\n"
        "gguf.read(Path(sys.argv[1]))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(large)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 80 << 10


def test_every_vocabulary_of_llama_cpp_is_read(llama_source: Path) -> None:
    paths = _vocabulary(llama_source)
    assert len(paths) > 10
    for path in paths:
        start = time.process_time()
        header = gguf.read(path)
        assert time.process_time() - start < 1.5, path.name
        assert header.bits_per_weight == 0.0
        with pytest.raises(CorruptArtifactError, match="no weights"):
            header.main_type()


@pytest.mark.parametrize("name", ["llama-spm", "bert-bge"])
def test_a_vocabulary_of_llama_cpp_reads_as_the_gguf_package_reads_it(
    name: str, llama_source: Path
) -> None:
    (path,) = _vocabulary(llama_source, name)
    _assert_same_as_the_reference(path)


def test_every_type_has_the_block_that_the_gguf_package_gives_it() -> None:
    sizes = dict(reference.GGML_QUANT_SIZES)
    # gguf 0.19 gives Q8_1 the two floats that it had once; in ggml they are two halves.
    assert sizes.pop(reference.GGMLQuantizationType.Q8_1) == (32, 40)
    for kind, (block_size, type_size) in sizes.items():
        ours = gguf.TYPES[kind.value]
        assert (ours.name, ours.block_size, ours.type_size) == (kind.name, block_size, type_size)


def test_every_type_has_the_block_that_ggml_gives_it() -> None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    found = sorted((Path(spec.origin).parent / "lib").glob("libggml-base.so*"))
    assert found
    ggml = ctypes.CDLL(str(found[0]))
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_type_name.restype = ctypes.c_char_p
    for code, ours in gguf.TYPES.items():
        assert ggml.ggml_type_name(code).decode().upper() == ours.name
        assert ggml.ggml_blck_size(code) == ours.block_size, ours.name
        assert ggml.ggml_type_size(code) == ours.type_size, ours.name
    unused = [code for code in range(64) if code not in gguf.TYPES and code < max(gguf.TYPES)]
    assert all(ggml.ggml_blck_size(code) == 0 for code in unused)


def _written(path: Path, add: Any, version: int = 3) -> Path:
    writer = reference.GGUFWriter(path, "llama")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = bytearray(path.read_bytes())
    raw[4] = version
    path.write_bytes(raw)
    return path


def _every_kind(writer: reference.GGUFWriter) -> None:
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        lowest = 0 if name[0] == "u" else -100
        getattr(writer, f"add_{name}")(f"a.{name}", lowest + 17)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "käse 🧀")
    writer.add_array("a.list", [1, -2, 3])
    writer.add_array("a.truths", [True, False])
    writer.add_array("a.texts", ["", "x", "käse"])


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_value_is_read(version: int, tmp_path: Path) -> None:
    metadata = gguf.read(_written(tmp_path / "a.gguf", _every_kind, version)).metadata
    assert [metadata[f"a.{name}"] for name in ("uint8", "int8", "uint64", "int64")] == [
        17,
        -83,
        17,
        -83,
    ]
    assert (metadata["a.float32"], metadata["a.float64"]) == (0.5, 0.1)
    assert metadata["a.bool"] is True
    assert metadata["a.string"] == "käse 🧀"
    assert metadata["a.list"] == [1, -2, 3]
    assert metadata["a.truths"] == [True, False]
    assert metadata["a.texts"] == ["", "x", "käse"]


def test_a_token_that_is_not_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    def add(writer: reference.GGUFWriter) -> None:
        writer.add_token_list([b"\xe2\x96", b"fine"])

    token = gguf.read(_written(tmp_path / "a.gguf", add)).metadata[TOKENS][0]
    assert token.encode("utf-8", "surrogateescape") == b"\xe2\x96"


def test_another_alignment_is_respected(tmp_path: Path) -> None:
    def add(writer: reference.GGUFWriter) -> None:
        writer.add_custom_alignment(256)
        writer.add_tensor("a", np.ones((3, 5), np.float32))
        writer.add_tensor("b", np.ones((2, 32), np.float16))

    header = gguf.read(_written(tmp_path / "a.gguf", add))
    assert header.alignment == 256
    assert [(t.shape, t.offset % 256) for t in header.tensors] == [((5, 3), 0), ((32, 2), 0)]
    assert header.parameters == 79
    assert header.bits_per_weight == pytest.approx((15 * 32 + 64 * 16) / 79)
    assert header.main_type() == "F16"


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (b"\x01\0\0\0", "version 1"),
        (b"\x04\0\0\0", "version 4"),
        (b"\0\0\0\x03", "big-endian"),
    ],
)
def test_another_version_is_a_version_error(version: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + version + bytes(64))
    with pytest.raises(VersionError, match=says) as caught:
        gguf.read(path)
    assert caught.value.hint


def test_a_file_of_another_format_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(64))
    with pytest.raises(CorruptArtifactError, match=r"a\.gguf: is not a GGUF file"):
        gguf.read(path)


def test_what_is_not_a_file_is_a_source_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "pipe", tmp_path / "nul\0"):
        with pytest.raises(SourceError):
            gguf.read(path)


def test_importing_the_readers_loads_no_numpy() -> None:
    program = "import sys, edgekit.formats.gguf; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
