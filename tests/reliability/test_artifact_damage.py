"""Whatever happens to an artifact's bytes, `verify` finds it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_artifact import build

from edgekit.artifact import MANIFEST, Artifact, ArtifactFile, Manifest
from edgekit.errors import ArtifactError, CorruptArtifactError, ManifestError, VersionError


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return build(tmp_path / "artifact")


def damage(artifact: Artifact, change: Callable[[bytearray], None], name: str) -> None:
    path = artifact.path / name
    whole = path.read_bytes()
    data = bytearray(whole)
    change(data)
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        Artifact.open(artifact.path).verify()
    path.write_bytes(whole)


NAMES = (MANIFEST, "model.gguf", "imatrix.gguf")


def test_1000_single_bit_flips_are_all_found(artifact: Artifact) -> None:
    draw = random.Random(1)
    for number in range(1000):
        name = NAMES[number % 3]
        position = draw.randrange((artifact.path / name).stat().st_size)

        def flip(data: bytearray, position: int = position) -> None:
            data[position] ^= 1 << draw.randrange(8)

        damage(artifact, flip, name)
    artifact.verify()


def test_200_truncations_are_all_found(artifact: Artifact) -> None:
    draw = random.Random(2)
    for number in range(200):
        name = NAMES[number % 3]
        length = draw.randrange((artifact.path / name).stat().st_size)

        def cut(data: bytearray, length: int = length) -> None:
            del data[length:]

        damage(artifact, cut, name)
    artifact.verify()


def test_missing_added_and_linked_files_are_found(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "extra").write_text("x")
    with pytest.raises(CorruptArtifactError, match="does not belong"):
        artifact.verify()
    (artifact.path / "extra").unlink()
    shutil.move(artifact.model_path, tmp_path / "elsewhere")
    with pytest.raises(CorruptArtifactError, match="is missing"):
        artifact.verify()
    (artifact.path / "model.gguf").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="symbolic link"):
        artifact.verify()


def forge(artifact: Artifact, **changes: Any) -> None:
    """A manifest that is consistent with itself, as an attacker would write it."""
    fields = {name: getattr(artifact.manifest, name) for name in Manifest.__dataclass_fields__}
    (artifact.path / MANIFEST).write_bytes(Manifest(**(fields | changes)).to_bytes())


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a\\b", "", "C:x"])
def test_paths_that_leave_the_artifact_are_refused(artifact: Artifact, name: str) -> None:
    forge(artifact, files=(ArtifactFile("model", name, 1, "00" * 32),))
    forged = Artifact.open(artifact.path)
    with pytest.raises(ArtifactError, match="unsafe path"):
        forged.verify()
    with pytest.raises(ArtifactError, match="unsafe path"):
        _ = forged.model_path


@pytest.mark.parametrize(
    "files",
    [
        ({"role": "model"},),
        ("model.gguf",),
        ({"role": 1, "path": "a", "size_bytes": 1, "sha256": "x"},),
        ({"role": "model", "path": "a", "size_bytes": True, "sha256": "x"},),
    ],
)
def test_manifests_with_strange_rows_are_refused(artifact: Artifact, files: Any) -> None:
    class Row:
        def __init__(self, body: Any) -> None:
            self.__dict__ = body if isinstance(body, dict) else {}

    forge(artifact, files=tuple(Row(row) for row in files))
    with pytest.raises(ManifestError):
        Artifact.open(artifact.path)


def test_a_manifest_from_the_future_is_named_as_such(artifact: Artifact) -> None:
    path = artifact.path / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"schema": 1', b'"schema": 2'))
    with pytest.raises(VersionError, match="schema 2"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"schema": 1}', b"1" * 10_000]
)
def test_what_is_no_manifest_is_refused(artifact: Artifact, raw: bytes) -> None:
    (artifact.path / MANIFEST).write_bytes(raw)
    with pytest.raises(ManifestError):
        Artifact.open(artifact.path)


def test_text_that_utf8_cannot_hold_is_refused(artifact: Artifact) -> None:
    path = artifact.path / MANIFEST
    path.write_bytes(path.read_bytes().replace(b"smollm2-135m", b"\\ud800"))
    with pytest.raises(ManifestError):
        Artifact.open(artifact.path)


def test_the_command_says_what_differs(artifact: Artifact, cli: Callable[..., Any]) -> None:
    ran = cli("verify", artifact.path)
    assert ran.code == 0 and "2 files" in ran.stdout and "intact" in ran.stdout
    data = bytearray((artifact.path / "model.gguf").read_bytes())
    data[100] ^= 1
    (artifact.path / "model.gguf").write_bytes(data)
    ran = cli("verify", artifact.path, "--json")
    assert ran.code == 5 and ran.stdout == ""
    assert "model.gguf differs" in ran.stderr and "hint: export it again" in ran.stderr


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", {}),
        ("source", []),
        ("receipt", {}),
        ("details", None),
        ("format", 1),
        ("source", {"a": "[" * 10}),
    ],
)
def test_manifests_with_strange_fields_are_refused(
    artifact: Artifact, field: str, value: Any
) -> None:
    forge(artifact, **{field: value})
    with pytest.raises(ManifestError):
        Artifact.open(artifact.path)


def test_a_pipe_in_the_place_of_the_manifest_blocks_nobody(artifact: Artifact) -> None:
    (artifact.path / MANIFEST).unlink()
    os.mkfifo(artifact.path / MANIFEST)
    with pytest.raises(ManifestError):
        Artifact.open(artifact.path)


def test_a_linked_folder_in_an_artifact_is_found(artifact: Artifact, tmp_path: Path) -> None:
    (artifact.path / "folder").symlink_to(tmp_path)
    with pytest.raises(CorruptArtifactError, match="does not belong"):
        artifact.verify()
