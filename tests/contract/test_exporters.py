"""What every exporter on the shelf promises, whatever its format."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_folder
import pytest
import tiny_torch

from edgekit import export_again, exporter
from edgekit.artifact import Artifact
from edgekit.errors import EdgekitError, RecipeError, UsageError
from edgekit.recipe import Recipe
from edgekit.registry import EXPORTERS

CHUNKS = 2  # of the builtin calibration text
# What else an export to a format is asked for.
OPTIONS: dict[str, dict[str, Any]] = {"gguf": {"chunks": CHUNKS}, "onnx": {}, "tflite": {}}
MODELS = {
    "gguf": hf_folder.make,
    "onnx": tiny_torch.vit_folder,
    "tflite": tiny_torch.vit_folder,
}
# Of an ONNX file's operators, of which its plan knows nothing, and of what stays float in the end.
GRAPH_BYTES = 200_000


def _param(name: str) -> Any:
    """A trace to TFLite takes seconds, and 1.2 GB of packages that not everybody has."""
    if name != "tflite":
        return name
    missing = importlib.util.find_spec("litert_torch") is None
    skip = pytest.mark.skipif(missing, reason="litert-torch is not installed")
    return pytest.param(name, marks=[pytest.mark.slow, skip])


@pytest.fixture(params=[_param(name) for name in EXPORTERS])
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(format: str, tmp_path: Path) -> Path:
    """A small model that the format takes, as a Hugging Face folder: a llama, or a ViT."""
    return MODELS[format](tmp_path / "model")


def _export(model: Path, format: str, out: Path, **options: object) -> Artifact:
    chosen = {"bits": 4, "receipt": False} | OPTIONS[format] | options
    return exporter.export(model, format, out=out, **chosen)


def _files(folder: Path) -> Iterator[str]:
    yield from sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_an_export_is_an_artifact_that_verifies(format: str, model: Path, tmp_path: Path) -> None:
    artifact = _export(model, format, tmp_path / "out")
    artifact.verify()
    assert artifact.format == format
    assert artifact.model_path.is_file()
    assert artifact.size_bytes == sum(file.size_bytes for file in artifact.manifest.files) > 0


def test_nothing_but_the_artifact_is_left(format: str, model: Path, tmp_path: Path) -> None:
    before = list(_files(model))
    artifact = _export(model, format, tmp_path / "out")
    committed = sorted(["manifest.json", *(file.path for file in artifact.manifest.files)])
    assert list(_files(tmp_path / "out")) == committed
    assert list(_files(model)) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_the_same_recipe_gives_the_same_bytes(format: str, model: Path, tmp_path: Path) -> None:
    one = _export(model, format, tmp_path / "one")
    two = _export(model, format, tmp_path / "two")
    assert one.sha256 == two.sha256
    assert export_again.repeat(tmp_path / "one", out=tmp_path / "three").sha256 == one.sha256


def test_a_plan_foretells_the_size_and_writes_nothing(
    format: str, model: Path, tmp_path: Path
) -> None:
    options = exporter.ExportOptions(bits=4, **OPTIONS[format])
    plan = exporter.plan(model, format, options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    artifact = _export(model, format, tmp_path / "out")
    beyond = artifact.model_path.stat().st_size - plan.size_bytes
    assert beyond == 0 if format == "gguf" else abs(beyond) < GRAPH_BYTES
    # What is fused is decided by a race, on the way.
    assert replace(artifact.manifest.recipe, fusion=plan.recipe.fusion) == plan.recipe


def test_a_recipe_survives_the_manifest(format: str, model: Path, tmp_path: Path) -> None:
    recipe = _export(model, format, tmp_path / "out").manifest.recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_progress_never_goes_back_within_a_stage(format: str, model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    _export(model, format, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert seen
    done: dict[str, int] = {}
    for stage, now, total in seen:
        assert done.get(stage, 0) <= now <= total
        done[stage] = now


@pytest.mark.parametrize("options", [{"bits": 7}, {"type": "Q4_9"}, {"bits": 4, "type": "Q4_K_M"}])
def test_a_recipe_that_cannot_be_is_one_clear_error(
    format: str, model: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    with pytest.raises(RecipeError) as error:
        exporter.export(model, format, out=tmp_path / "out", **options)
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_the_models_own_folder_is_no_place_for_the_output(format: str, model: Path) -> None:
    before = list(_files(model))
    with pytest.raises(UsageError, match="own folder"):
        _export(model, format, model / "out")
    assert list(_files(model)) == before


def test_a_broken_model_leaves_an_older_artifact_as_it_was(
    format: str, model: Path, tmp_path: Path
) -> None:
    older = _export(model, format, tmp_path / "out")
    (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(EdgekitError):
        _export(model, format, tmp_path / "out")
    Artifact.open(tmp_path / "out").verify()
    assert Artifact.open(tmp_path / "out").sha256 == older.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
