"""Tiny models of every family and their float GGUF files, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

import edgekit
from edgekit import exporter
from edgekit.exporters import hf_to_gguf
from edgekit.source import source


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model in ``tiny.MODELS``; never write to it."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            tiny.make(name, root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: Callable[[str], Path]) -> Callable[[str], Path]:
    """The F32 GGUF file of a model in ``tiny.MODELS``; never write to it."""

    def path(name: str) -> Path:
        folder = tiny_model(name)
        out = folder.with_suffix(".gguf")
        if not out.exists():
            hf_to_gguf.write(source(folder), out, "F32")
        return out

    return path


@pytest.fixture(scope="session")
def float_model(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], edgekit.Artifact]:
    """The F32 artifact of a model in ``tiny.MODELS``; never write to it."""
    root, made = tmp_path_factory.mktemp("onnx"), dict[str, edgekit.Artifact]()

    def artifact(name: str) -> edgekit.Artifact:
        if name not in made:
            out = root / name
            made[name] = exporter.export(tiny_model(name), "onnx", bits=32, receipt=False, out=out)
        return made[name]

    return artifact
