"""The artifact: a folder of model files and the manifest that commits to every byte of them.

Knows hashes, sizes and the manifest's form; never what a format's bytes mean, and it never writes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from edgekit import _fs
from edgekit.errors import CorruptArtifactError, ManifestError, UsageError, VersionError
from edgekit.recipe import Recipe

MANIFEST = "manifest.json"
SCHEMA = 1
_UNPROVEN = {"status": "unproven"}
_MAX_MANIFEST_BYTES = 16 << 20
_KEYS = {
    "schema",
    "format",
    "recipe",
    "source",
    "files",
    "details",
    "versions",
    "receipt",
    "sha256",
}


@dataclass(frozen=True)
class ArtifactFile:
    """A file of an artifact. ``role`` is "model" (what a runtime loads), "adapter" or "imatrix"."""

    role: str
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and how it was made. No clock time and no machine name in here, so that
    the same recipe on the same source gives the same bytes; measured figures live in ``receipt``,
    which is no part of ``identity``.
    """

    format: str
    recipe: Recipe
    source: dict[str, Any]
    files: tuple[ArtifactFile, ...]
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=lambda: dict(_UNPROVEN))

    @property
    def identity(self) -> str:
        """The hash of what was exported and how: of this manifest with no receipt in it."""
        bare = replace(self, receipt=dict(_UNPROVEN))
        return hashlib.sha256(bare.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Canonical JSON with the hash of itself: a changed bit anywhere in it shows."""
        body = {
            "schema": SCHEMA,
            "format": self.format,
            "recipe": self.recipe.to_dict(),
            "source": self.source,
            "files": [vars(file) for file in self.files],
            "details": self.details,
            "versions": self.versions,
            "receipt": self.receipt,
        }
        body["sha256"] = hashlib.sha256(_canonical(body)).hexdigest()
        return _canonical(body)

    @classmethod
    def from_bytes(cls, raw: bytes, *, origin: str) -> Manifest:
        """Raises VersionError for a newer schema, ManifestError for anything but canonical JSON."""
        try:
            body = json.loads(raw)
            schema = body["schema"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ManifestError(f"{origin} is not a manifest of edgekit") from None
        if isinstance(schema, int) and schema > SCHEMA:
            raise VersionError(
                f"{origin} has schema {schema}, this edgekit knows up to {SCHEMA}",
                hint="upgrade edgekit",
            )
        if set(body) != _KEYS or schema != SCHEMA:
            raise ManifestError(f"{origin} does not have the keys of a manifest")
        claimed = body.pop("sha256")
        try:
            intact = (
                claimed == hashlib.sha256(_canonical(body)).hexdigest()
                and _canonical(body | {"sha256": claimed}) == raw
            )
        except (ValueError, RecursionError):  # text that no UTF-8 can hold, or a bomb of brackets
            intact = False
        if not intact:
            raise ManifestError(f"{origin} was changed after edgekit wrote it")
        try:
            _check_types(body)
            return cls(
                format=body["format"],
                recipe=Recipe.from_dict(body["recipe"]),
                source=body["source"],
                files=tuple(_artifact_file(file) for file in body["files"]),
                details=body["details"],
                versions=body["versions"],
                receipt=body["receipt"],
            )
        except (TypeError, UsageError) as error:
            raise ManifestError(f"{origin}: {error}") from None


_TYPES = {"format": str, "source": dict, "files": list, "details": dict, "receipt": dict}
_SOURCE_KEYS = {"spec", "kind", "family", "revision", "quantized", "sha256"}


def _check_types(body: dict[str, Any]) -> None:
    for key, kind in _TYPES.items():
        if not isinstance(body[key], kind):
            raise TypeError(f"{key} must be a {kind.__name__}")
    if set(body["source"]) != _SOURCE_KEYS or not isinstance(body["source"]["spec"], str):
        raise TypeError(f"source must have the keys {', '.join(sorted(_SOURCE_KEYS))}")
    if not isinstance(body["receipt"].get("status"), str):
        raise TypeError("receipt must have a status")


def _artifact_file(body: dict[str, Any]) -> ArtifactFile:
    file = ArtifactFile(**body)
    texts = (file.role, file.path, file.sha256)
    if not all(isinstance(text, str) for text in texts) or type(file.size_bytes) is not int:
        raise TypeError("a file's role, path and sha256 must be text, its size a whole number")
    return file


def _canonical(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def is_artifact(path: Path) -> bool:
    """Whether ``path`` is a folder with a manifest: ours to open, or to replace."""
    return os.path.isfile(path / MANIFEST)


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. Opening reads only the manifest; ``verify`` reads every byte."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Raises ManifestError (missing, changed or malformed manifest) or VersionError."""
        folder = Path(path)
        if folder.name == MANIFEST:
            folder = folder.parent
        try:
            # Without O_NONBLOCK a pipe of that name would wait for a writer for ever.
            descriptor = os.open(folder / MANIFEST, os.O_RDONLY | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                raw = file.read(_MAX_MANIFEST_BYTES + 1) or b""
        except (OSError, ValueError):
            what = f"is not an artifact: it has no {MANIFEST}"
            raise ManifestError(
                f"{folder} {what if os.path.exists(folder) else 'does not exist'}",
                hint="edgekit export MODEL --out DIR makes one",
            ) from None
        if len(raw) > _MAX_MANIFEST_BYTES:
            raise ManifestError(f"{folder / MANIFEST} is larger than {_MAX_MANIFEST_BYTES} bytes")
        return cls(folder, Manifest.from_bytes(raw, origin=str(folder / MANIFEST)))

    @property
    def format(self) -> str:
        return self.manifest.format

    @property
    def receipt(self) -> dict[str, Any]:
        return self.manifest.receipt

    @property
    def size_bytes(self) -> int:
        """All files of the artifact, without the manifest."""
        return sum(file.size_bytes for file in self.manifest.files)

    @property
    def model_path(self) -> Path:
        """The file that a runtime loads."""
        for file in self.manifest.files:
            if file.role == "model":
                return _fs.contained(self.path, file.path)
        raise ManifestError(f"{self.path} has no model file")

    @cached_property
    def sha256(self) -> str:
        """One hash for the whole artifact: that of its manifest, which holds the others.

        Without the receipt: times vary, and exports of the same bytes are the same artifact.
        """
        return self.manifest.identity

    def verify_sizes(self) -> None:
        """A cheap check before every load: each file is there, regular, and of the right size."""
        for file in self.manifest.files:
            path = _fs.contained(self.path, file.path)
            if not os.path.isfile(path):
                raise CorruptArtifactError(f"{path} is missing")
            if path.stat().st_size != file.size_bytes:
                raise CorruptArtifactError(
                    f"{path} has {path.stat().st_size} bytes, the manifest says {file.size_bytes}"
                )

    def verify(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Hash every file against the manifest, and find files that the manifest does not know.

        ``on_bytes`` hears how many bytes were read, for progress. Raises CorruptArtifactError.
        """
        self.verify_sizes()
        known = {MANIFEST, *(file.path for file in self.manifest.files)}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if (path.is_symlink() or not path.is_dir()) and name not in known:
                raise CorruptArtifactError(f"{path} does not belong to the artifact")
        for file in self.manifest.files:
            path = _fs.contained(self.path, file.path)
            try:
                found = _fs.sha256_file(path, on_bytes)
            except OSError as error:
                raise CorruptArtifactError(f"cannot read {path}: {error.strerror}") from None
            if found != file.sha256:
                raise CorruptArtifactError(
                    f"{path} differs from what was exported (SHA-256)", hint="export it again"
                )
