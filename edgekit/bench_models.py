"""The models of a benchmark: opened, checked, hashed and named.

Knows artifacts and headers; never what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit import _fs, language_header
from edgekit.artifact import Artifact
from edgekit.errors import UsageError
from edgekit.exporter import Progress
from edgekit.formats import gguf
from edgekit.registry import RUNTIME_OF_FORMAT
from edgekit.report import ModelFacts

_OF_ONNX = RUNTIME_OF_FORMAT["onnx"]
_UNTOLD_CONTEXT = 1 << 20  # of a header that tells none: the engine will judge


@dataclass(frozen=True)
class Model:
    """A model to measure: its file, what a user loads, and what its header says."""

    path: Path
    given: Path
    header: gguf.GgufHeader
    facts: ModelFacts
    adapters: bool
    runtime: str

    @property
    def longest(self) -> int:
        """Tokens of the context that the model was trained for."""
        trained = self.header.metadata.get(f"{self.header.architecture}.context_length")
        return trained if isinstance(trained, int) and trained > 0 else _UNTOLD_CONTEXT

    def kv_types(self, asked: Sequence[str]) -> tuple[str, ...]:
        """The types of the KV cache to measure. Raises UsageError for what the engine cannot do."""
        if self.runtime != _OF_ONNX:
            return tuple(asked)
        if not set(asked) <= {"f16", "f32"}:
            raise UsageError(f"{self.facts.name} keeps its KV cache in f32, and no other type")
        return ("f32",)  # whatever was asked for, the default included


def opened(
    models: Sequence[Artifact | str | Path], progress: Progress, names: Sequence[str] = ()
) -> list[Model]:
    """The models, each with a name of its own, which ``names`` may give.

    Raises ArtifactError, SourceError, UsageError.
    """
    if names and len(names) != len(models):
        raise UsageError("names must be as many as models")
    found: list[Model] = []
    for number, given in enumerate(models):
        artifact, shown, path = _located(given)
        header = language_header.read(path)
        called = names[number] if names else shown.resolve().name
        name = unique(called, [model.facts.name for model in found])
        kind = artifact.manifest.recipe.type if artifact else header.main_type()
        found.append(
            Model(
                path=path.absolute(),
                given=shown.absolute(),
                header=header,
                facts=ModelFacts(
                    name=name,
                    sha256=hashed(path, name, progress),
                    size_bytes=header.file_size,
                    type=kind,
                    architecture=header.architecture,
                    parameters=header.parameters,
                ),
                adapters=artifact is not None
                and any(file.role == "adapter" for file in artifact.manifest.files),
                runtime=_OF_ONNX if language_header.is_onnx(path) else RUNTIME_OF_FORMAT["gguf"],
            )
        )
    return found


def file_of(given: Artifact | str | Path) -> Path:
    """The model's file. Raises ArtifactError, UsageError."""
    return _located(given)[2]


def _located(given: Artifact | str | Path) -> tuple[Artifact | None, Path, Path]:
    """The artifact if it is one, what to call the model by, and its file."""
    if not isinstance(given, Artifact):
        if Path(given).is_file():
            return None, Path(given), Path(given)
        given = Artifact.open(given)
    if given.format != "gguf" and not language_header.is_onnx(given.model_path):
        raise UsageError(
            f"{given.path} is no language model",
            hint="edgekit bench A B measures such models together; from Python latency.latency()",
        )
    given.verify_sizes()
    return given, given.path, given.model_path


def unique(name: str, taken: Sequence[str]) -> str:
    """A printable name that no other model of the report has."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name} ({number})"
    return found


def hashed(path: Path, name: str, progress: Progress) -> str:
    """The SHA-256 of a model's file."""
    done, total = 0, path.stat().st_size

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(f"hash {name}", done, total)

    return _fs.sha256_file(path, on_bytes)
