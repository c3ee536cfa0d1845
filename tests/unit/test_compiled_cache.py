"""What engines keep on disk: found as it was written, made again when it was not, bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgekit import _fs
from edgekit.runtimes import compiled_cache


def _keep(name: str, data: bytes) -> None:
    compiled_cache.keep(name, lambda folder: _fs.write_atomic(folder / "blob", data))


def test_an_entry_is_found_as_it_was_written() -> None:
    assert compiled_cache.find("a") is None
    _keep("a", b"bytes")
    folder = compiled_cache.find("a")
    assert folder is not None and (folder / "blob").read_bytes() == b"bytes"
    _keep("a", b"other")
    assert (folder / "blob").read_bytes() == b"other" and compiled_cache.find("a") == folder


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "facts"])
def test_a_damaged_entry_is_none(harm: str) -> None:
    _keep("a", b"bytes")
    folder = compiled_cache.find("a")
    assert folder is not None
    if harm == "cut":
        os.truncate(folder / "blob", 2)
    elif harm == "changed":
        (folder / "blob").write_bytes(b"BYTES")
        os.utime(folder / "blob", ns=(1, 1))
    elif harm == "gone":
        (folder / "blob").unlink()
    else:
        (folder / "entry.json").write_text("{")
    assert compiled_cache.find("a") is None


def test_the_oldest_go_when_there_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_cache, "MOST_BYTES", 3000)
    for number, name in enumerate("abc"):
        _keep(name, b"x" * 900)
        folder = compiled_cache.find(name)
        assert folder is not None
        os.utime(folder, ns=(number + 1, number + 1))
    assert compiled_cache.find("a") is not None  # used: now the youngest
    _keep("d", b"x" * 900)
    left = {name for name in "abcd" if compiled_cache.find(name)}
    assert "a" in left and "d" in left and "b" not in left
    _keep("e", b"x" * 4000)
    assert compiled_cache.find("e") is None


def test_a_home_that_cannot_be_written_costs_nothing(home: Path) -> None:
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "compiled").write_text("a file where the folder belongs")
    _keep("a", b"bytes")
    assert compiled_cache.find("a") is None


def test_the_key_tells_files_and_engines_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "model.onnx", tmp_path / "copy" / "model.onnx"
    two.parent.mkdir()
    one.write_bytes(b"a")
    two.write_bytes(b"a")
    key = compiled_cache.key([one], "engine 1")
    assert key == compiled_cache.key([two], "engine 1") != compiled_cache.key([one], "engine 2")
    two.write_bytes(b"b")
    assert compiled_cache.key([two], "engine 1") != key
