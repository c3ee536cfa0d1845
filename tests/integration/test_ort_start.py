"""A later start of ONNX Runtime takes what its optimizer made; a damaged copy is replaced."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_torch

from edgekit import machine
from edgekit.exporter import export
from edgekit.runtime import load
from edgekit.runtimes import compiled_cache, ort_start


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("start")
    vit, net = tiny_torch.vit_folder(folder / "vit"), tiny_torch.resnet_folder(folder / "net")
    made = {
        "static": (net, {"type": "static_wi8_ai8", "chunks": 8}),
        "dynamic": (vit, {"type": "dynamic_wi8_afp32", "chunks": 8}),
        "blocks": (vit, {"type": "weight_only_wi4b32"}),
    }
    return {
        name: export(source, "onnx", out=folder / name, receipt=False, **options).path
        for name, (source, options) in made.items()
    }


def _answer(path: Path) -> Any:
    side = tiny_torch.SIDE
    images = np.random.default_rng(0).standard_normal((2, 3, side, side), np.float32)
    with load(path, n_threads=1) as session:
        return next(iter(session.run({"pixel_values": images}).values()))


def _entry(home: Path) -> Path:
    (folder,) = (home / "cache" / "compiled").iterdir()
    return folder / "model.ort"


@pytest.mark.parametrize("kind", ["static", "dynamic", "blocks"])
def test_the_kept_graph_gives_the_same_answers(
    models: dict[str, Path], home: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ort_start, "_MOST_BYTES", 0)
        first = _answer(models[kind])
    assert not (home / "cache" / "compiled").exists()
    assert np.array_equal(_answer(models[kind]), first)
    assert compiled_cache.find(_entry(home).parent.name) is not None
    optimized = ort_start._optimized
    taken: list[Path] = []
    monkeypatch.setattr(
        ort_start, "_optimized", lambda path, n: taken.append(path) or optimized(path, n)
    )
    monkeypatch.setattr(ort_start, "_session", None)  # nothing is optimized again
    assert np.array_equal(_answer(models[kind]), first)
    assert taken == [_entry(home)]


def test_no_graph_of_floats_is_kept(tmp_path: Path, home: Path) -> None:
    source = tiny_torch.resnet_folder(tmp_path / "net")
    made = export(source, "onnx", type="F32", out=tmp_path / "out", receipt=False)
    _answer(made.path)
    assert not (home / "cache" / "compiled").exists()


@pytest.mark.parametrize("harm", ["cut", "changed", "nothing", "gone"])
def test_a_damaged_copy_is_made_again(
    models: dict[str, Path], home: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = _answer(models["static"])
    file = _entry(home)
    whole = file.read_bytes()
    if harm == "cut":
        os.truncate(file, len(whole) // 2)
    elif harm == "changed":
        file.write_bytes(whole[:100] + b"\xff" * 64 + whole[164:])
    elif harm == "nothing":  # of the right size and time, and still no model of the engine's
        with caplog.at_level(logging.INFO, "edgekit.runtime"):
            compiled_cache.keep(file.parent.name, lambda into: _write(into, b"no model"))
            assert np.array_equal(_answer(models["static"]), first)
        assert "of no use" in caplog.text
    else:
        file.unlink()
    assert np.array_equal(_answer(models["static"]), first)
    assert compiled_cache.find(_entry(home).parent.name) is not None
    assert ort_start._optimized(_entry(home), 1).get_inputs()[0].name == "pixel_values"


def _write(folder: Path, data: bytes) -> None:
    (folder / "model.ort").write_bytes(data)


def test_the_key_holds_for_one_file_engine_processor_and_setting(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models["static"] / "model.onnx"
    key = ort_start.key([path])
    copy = tmp_path / "model.onnx"
    copy.write_bytes(path.read_bytes())
    assert ort_start.key([copy]) == key
    model = onnx.load(path)
    model.producer_version = "2"
    onnx.save(model, str(copy))
    keys = {key, ort_start.key([copy])}
    with monkeypatch.context() as patch:
        patch.setattr(ort_start, "version", lambda name: "9.9")
        keys.add(ort_start.key([path]))
    with monkeypatch.context() as patch:
        patch.setattr(ort_start, "SLOW_FUSIONS", ())
        keys.add(ort_start.key([path]))
    with monkeypatch.context() as patch:
        cpu = machine.cpu(machine.root())
        other = type(cpu)(**vars(cpu) | {"features": ("another",)})
        patch.setattr(machine, "cpu", lambda root: other)
        keys.add(ort_start.key([path]))
    assert len(keys) == 5


def test_where_nothing_can_be_kept_it_starts_as_ever(
    models: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _answer(models["dynamic"])
    kept = home / "cache" / "compiled"
    for file in kept.rglob("*"):
        if file.is_file():
            file.unlink()
    monkeypatch.setattr(compiled_cache, "MOST_BYTES", 10)
    assert np.array_equal(_answer(models["dynamic"]), first)
    assert not list(kept.rglob("*.ort"))
    monkeypatch.setattr(ort_start, "_MOST_BYTES", 10)
    assert np.array_equal(_answer(models["dynamic"]), first)
