"""Hostile models: pickles that would run, configs that would import, paths that would leave.

Each payload writes a sentinel file if anything executes it, and none ever does.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import EdgekitError, UnsafeModelError
from edgekit.source import source

_HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
WEIGHTS = struct.pack("<Q", len(_HEADER)) + _HEADER + b"\0" * 4
LIMIT_S = 2.0


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


class _Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self._command = f"touch {sentinel}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


def _pickled(sentinel: Path, protocol: int = 2) -> bytes:
    return pickle.dumps(_Payload(sentinel), protocol=protocol)


def _zipped(data: bytes, name: str = "archive/data.pkl") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def _disguised(sentinel: Path) -> bytes:
    """A pickle whose first eight bytes read like the length of a safetensors header."""
    return struct.pack("<Q", 40) + b"{" + _pickled(sentinel)


Place = Callable[[Path, Path], Path]


def _in_folder(name: str, build: Callable[[Path], bytes]) -> Place:
    def place(folder: Path, sentinel: Path) -> Path:
        (folder / name).write_bytes(build(sentinel))
        return folder

    return place


def _as_file(name: str, build: Callable[[Path], bytes]) -> Place:
    def place(folder: Path, sentinel: Path) -> Path:
        (folder / name).write_bytes(build(sentinel))
        return folder / name

    return place


def _as_shard(folder: Path, sentinel: Path) -> Path:
    name = "model-00001-of-00001.safetensors"
    (folder / name).write_bytes(_pickled(sentinel, 4))
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _index_to_pickle(folder: Path, sentinel: Path) -> Path:
    (folder / "pytorch_model.bin").write_bytes(_pickled(sentinel))
    index = {"weight_map": {"a": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


PICKLES: dict[str, Place] = {
    "pytorch_model.bin": _in_folder("pytorch_model.bin", _pickled),
    "zip as pytorch_model.bin": _in_folder("pytorch_model.bin", lambda s: _zipped(_pickled(s))),
    "model.pt": _as_file("model.pt", _pickled),
    "model.pth": _as_file("model.pth", lambda s: _zipped(_pickled(s))),
    "model.ckpt": _as_file("model.ckpt", lambda s: _pickled(s, 0)),
    "zip without a telling name": _as_file("weights", lambda s: _zipped(_pickled(s))),
    "renamed to safetensors": _in_folder("model.safetensors", lambda s: _pickled(s, 4)),
    "zip renamed to safetensors": _in_folder("model.safetensors", lambda s: _zipped(_pickled(s))),
    "text protocol as safetensors": _in_folder("model.safetensors", lambda s: _pickled(s, 0)),
    "behind a safetensors length": _in_folder("model.safetensors", _disguised),
    "renamed to gguf": _as_file("model.gguf", lambda s: _pickled(s, 5)),
    "renamed to a shard": _as_shard,
    "index that names a pickle": _index_to_pickle,
    "joblib": _as_file("model.joblib", _pickled),
}


def _refused(spec: Path, sentinel: Path) -> EdgekitError:
    start = time.monotonic()
    with pytest.raises(EdgekitError) as caught:
        source(spec)
    assert time.monotonic() - start < LIMIT_S
    assert caught.value.exit_code == 4
    assert "\n" not in caught.value.message
    assert not sentinel.exists()
    return caught.value


def test_the_payload_works(tmp_path: Path, sentinel: Path) -> None:
    """Without this, an absent sentinel would prove nothing."""
    data = base64.b64encode(_pickled(sentinel)).decode()
    code = f"import base64, pickle; pickle.loads(base64.b64decode({data!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sentinel.exists()


@pytest.mark.parametrize("place", PICKLES.values(), ids=PICKLES)
def test_a_poisoned_pickle_never_runs(folder: Path, sentinel: Path, place: Place) -> None:
    assert _refused(place(folder, sentinel), sentinel).hint


def test_a_pickle_beside_safetensors_is_not_even_opened(folder: Path, sentinel: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "pytorch_model.bin").write_bytes(_pickled(sentinel))
    os.chmod(folder / "pytorch_model.bin", 0)
    assert "pytorch_model.bin" not in source(folder).files
    assert not sentinel.exists()


CONFIGS: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
    "auto_map of another repository": {"auto_map": {"AutoConfig": "evil/repo--config.Evil"}},
    "trust_remote_code inside a nested config": {
        "keypoint_detector_config": {"model_type": "x", "trust_remote_code": True}
    },
    "attention kernel from a repository": {"_attn_implementation": "evil/kernel"},
    "the internal name of it": {"_attn_implementation_internal": "evil/kernel@main:attention"},
    "the public name of it, nested": {"attn_implementation": {"text": {"": "evil/kernel"}}},
    "paged kernel": {"attn_implementation": "paged|evil/kernel"},
    "experts kernel": {"experts_implementation": "evil/kernel"},
    "custom_generate": {"custom_generate": "evil/repo"},
    "custom pipelines": {"custom_pipelines": {"x": {"impl": "pipeline.Evil", "pt": []}}},
    "quantization that imports": {
        "quantization_config": {"quant_method": "x", "modules_to_import": ["evil"]}
    },
    "quantization by a file": {
        "quantization_config": {"quant_method": "x", "quantizer": "quantizer.py"}
    },
    "hydra target": {"head": {"_target_": "os.system", "command": "touch it-ran"}},
    "class of another repository": {"tokenizer_class": "evil/repo--tokenizer.Evil"},
    "module path as a class": {"backbone_class": "evil.module.Class"},
    "python file as a value": {"activation": "activations.py::evil"},
    "kernel mapping": {"kernel_config": {"RMSNorm": "evil/kernel:Norm"}},
    "plugin in a list": {"stages": [{"plugins": ["evil"]}]},
    "redirected weights": {"transformers_weights": "../../pytorch_model.bin"},
    "deeply nested": json.loads('{"a":' * 200 + '{"auto_map": "x"}' + "}" * 200),
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("extra", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_asks_for_code_is_refused(
    folder: Path, sentinel: Path, extra: dict[str, Any], name: str
) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    for module in ("modeling", "pipeline", "tokenizer", "quantizer", "activations", "evil"):
        (folder / f"{module}.py").write_text(f"open({str(sentinel)!r}, 'w')")
    (folder / name).write_text(json.dumps({"model_type": "llama"} | extra))
    error = _refused(folder, sentinel)
    assert isinstance(error, UnsafeModelError) or "nested" in error.message
    assert error.hint


def test_ordinary_configs_pass(folder: Path) -> None:
    """Keys of real models that look a little like code, and are not."""
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "_name_or_path": "acme/base",
        "_attn_implementation": "sdpa",
        "trust_remote_code": False,
        "conv_kernel": 4,
        "use_mamba_kernels": True,
        "attn_implementation": None,
        "hidden_act": "gelu_pytorch_tanh",
        "torch_dtype": "bfloat16",
        "id2label": {"0": "LABEL_0"},
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
        "transformers_version": "4.57.1",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{% for m in messages %}{{ m.content }} main.py {% endfor %}",
        "added_tokens_decoder": {"0": {"content": "<|im_start|>", "special": True}},
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert source(folder).family == "llama"


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/../../outside.safetensors",
        "..\\outside.safetensors",
        "sub/model.safetensors",
        "model.bin",
        "\0.safetensors",
        ".safetensors",
    ],
)
def test_a_shard_outside_its_folder_is_refused(folder: Path, sentinel: Path, shard: str) -> None:
    (folder.parent / "outside.safetensors").write_bytes(WEIGHTS)
    index = {"weight_map": {"a": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeModelError, match="not a file beside it"):
        source(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_in_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    outside = folder.parent / "outside"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(UnsafeModelError, match="symbolic link") as caught:
        source(folder)
    assert "cp -rL" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_for_a_file_does_not_block(folder: Path, sentinel: Path, name: str) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    _refused(folder, sentinel)


def test_a_huge_config_is_refused_unread(folder: Path, sentinel: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    _refused(folder, sentinel)


@pytest.mark.parametrize("place", [PICKLES["pytorch_model.bin"], PICKLES["renamed to gguf"]])
def test_the_command_ends_with_exit_code_4(
    cli: Callable[..., Any], folder: Path, sentinel: Path, place: Place
) -> None:
    ran = cli("export", place(folder, sentinel), "--out", "out")
    assert ran.code == 4
    assert ran.stdout == "" and "pickle" in ran.stderr and "Traceback" not in ran.stderr
    assert not sentinel.exists() and not (folder.parent / "out").exists()


def test_a_config_trick_ends_the_command_with_exit_code_4(
    cli: Callable[..., Any], folder: Path, sentinel: Path
) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    config = {"model_type": "llama", "_attn_implementation_internal": "evil/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    ran = cli("export", folder, "--out", "out")
    assert ran.code == 4 and "hint:" in ran.stderr
    assert not (folder.parent / "out").exists()
