"""Vision models, encoders, torch modules and ONNX files become ONNX artifacts that do what they
did, and say so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_torch
import torch
from PIL import Image

import edgekit
from edgekit.artifact import Artifact
from edgekit.errors import (
    ExportError,
    GateError,
    ParityError,
    RecipeError,
    SourceError,
    UnsupportedModelError,
    UsageError,
)
from edgekit.export_again import repeat, reprove
from edgekit.exporter import export
from edgekit.receipt import Gates

PROGRAM = """
    import pathlib
    import torch

    def make():
        with open(pathlib.Path(__file__).with_name("calls"), "a") as calls:
            calls.write(".")
        torch.manual_seed(0)
        layers = torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)
        return torch.nn.Sequential(*layers), (torch.zeros(1, 8),)

    def nothing():
        return None

    def broken():
        raise RuntimeError("no weights here")
"""


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_torch.vit_folder(tmp_path_factory.mktemp("vit") / "model"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_torch.bert_folder(tmp_path_factory.mktemp("bert") / "model"))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return path


def test_a_float_export_computes_what_transformers_computes(vit: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    artifact = export(vit, "onnx", bits=32, out=tmp_path / "out", receipt=False)
    model = AutoModelForImageClassification.from_pretrained(vit).eval()
    size = model.config.image_size
    pixels = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).logits.numpy()
    with edgekit.load(artifact) as session:
        found = session.run({"pixel_values": pixels})["logits"]
    assert found == pytest.approx(expected, abs=1e-4)


def test_an_encoder_takes_any_batch_and_length(bert: Path, tmp_path: Path) -> None:
    artifact = export(bert, "onnx", bits=32, out=tmp_path / "out", receipt=False)
    with edgekit.load(artifact) as session:
        one = session.embed("a cat sits on the mat")
        several = session.embed(["a cat sits on the mat", "a much longer text, with many words"])
    assert several[0] == pytest.approx(one, abs=1e-4)
    assert np.linalg.norm(several[1]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "kind",
    ["dynamic_wi8_afp32", "static_wi8_ai8", "weight_only_wi4b32", "weight_only_wi4b64"],
)
def test_each_type_is_proved_and_smaller(vit: Path, tmp_path: Path, kind: str) -> None:
    artifact = export(vit, "onnx", type=kind, out=tmp_path / "out", chunks=_chunks(kind))
    assert artifact.receipt["status"] == "proven"
    assert artifact.receipt["agreement"]["cosine"]["value"] > 0.9
    whole = export(vit, "onnx", bits=32, out=tmp_path / "float", receipt=False)
    assert artifact.model_path.stat().st_size < 0.75 * whole.model_path.stat().st_size


def _chunks(kind: str) -> int | None:
    return 8 if kind.startswith("static") else None


def test_the_same_recipe_gives_the_same_bytes(vit: Path, tmp_path: Path) -> None:
    options = {"type": "static_wi8_ai8", "chunks": 8, "receipt": False}
    one = export(vit, "onnx", out=tmp_path / "one", **options)
    two = repeat(tmp_path / "one", out=tmp_path / "two")
    assert one.sha256 == two.sha256


def test_a_module_in_memory_is_exported(tmp_path: Path) -> None:
    module = tiny_torch.cnn_module()
    inputs = torch.zeros(1, 3, 32, 32)
    artifact = edgekit.export(
        module, "onnx", example_inputs=(inputs,), bits=32, out=tmp_path / "out"
    )
    with torch.no_grad():
        expected = module.eval()(inputs).numpy()
    with edgekit.load(artifact) as session:
        (name,) = (spec.name for spec in session.inputs)
        (found,) = session.run({name: inputs.numpy()}).values()
    assert found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(RecipeError, match="memory"):
        repeat(tmp_path / "out", out=tmp_path / "again")


def test_a_module_that_takes_images_classifies_them(tmp_path: Path) -> None:
    module = tiny_torch.cnn_module().eval()
    example = torch.randn(1, 3, tiny_torch.SIDE, tiny_torch.SIDE)
    labels = [f"class {number}" for number in range(module(example).shape[1])]
    steps = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "labels": labels}
    made = export(
        module, "onnx", bits=32, example_inputs=(example,), preprocess=steps, out=tmp_path / "out"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (*example.shape[2:], 3), dtype=np.uint8)
    with edgekit.load(made) as session:
        found = session.classify(Image.fromarray(pixels), top=1)
    image = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    assert found[0][0] == labels[int(module(image).argmax())]
    assert made.manifest.receipt["agreement"]["top1"] is not None  # images, and no noise


@pytest.mark.parametrize(
    "steps",
    [
        {"labels": "cat"},
        {"image_mean": [0.5]},
        {"size": {"height": 8, "width": 8}},
        {"image_std": [0, 0, 0]},
        {"rescale_factor": "x"},
    ],
)
def test_a_preprocessing_that_cannot_be_is_refused(tmp_path: Path, steps: dict[str, Any]) -> None:
    module = tiny_torch.cnn_module()
    example = torch.randn(1, 3, tiny_torch.SIDE, tiny_torch.SIDE)
    with pytest.raises(SourceError):
        given = {"example_inputs": (example,), "preprocess": steps}
        export(module, "onnx", bits=32, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_output_may_lie_where_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Linear(4, 2).train()
    export(module, "onnx", example_inputs=torch.zeros(1, 4), bits=8, out="build/net", receipt=False)
    assert module.training  # it goes on being trained


def test_a_receipt_of_the_users_own_data_is_measured_again_on_it(
    bert: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"the cat number {i} sits on a mat" for i in range(20)))
    export(bert, "onnx", bits=8, out=tmp_path / "out", eval_data=texts)
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.receipt["agreement"]["samples"] == 10  # every second one
    again, differing = reprove(artifact, eval_data=texts)
    assert differing == [] and again.agreement is not None
    assert any("data_sha256" in text for text in reprove(artifact)[1])


def test_a_function_of_the_users_own_is_exported(program: Path, tmp_path: Path) -> None:
    artifact = export(f"{program}:make", "onnx", bits=8, out=tmp_path / "out")
    assert artifact.manifest.source["kind"] == "python"
    assert artifact.manifest.recipe.type == "dynamic_wi8_afp32"  # matrices, no convolutions
    assert (tmp_path / "calls").read_text() == "."  # another call might give other weights


@pytest.mark.parametrize(
    ("function", "error"),
    [("absent", ExportError), ("nothing", ExportError), ("broken", ExportError)],
)
def test_a_function_that_gives_no_module_is_one_clear_error(
    program: Path, tmp_path: Path, function: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        export(f"{program}:{function}", "onnx", bits=32, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_onnx_file_is_a_source(vit: Path, tmp_path: Path) -> None:
    first = export(vit, "onnx", bits=32, out=tmp_path / "first", receipt=False)
    again = export(first.model_path, "onnx", bits=8, out=tmp_path / "again")
    assert again.manifest.source["kind"] == "onnx"
    assert again.receipt["status"] == "proven"


def test_fusion_is_told_and_can_be_left_out(vit: Path, tmp_path: Path) -> None:
    fused = export(vit, "onnx", bits=32, out=tmp_path / "fused", receipt=False)
    plain = export(vit, "onnx", bits=32, fusion="none", out=tmp_path / "plain", receipt=False)
    assert sum(fused.manifest.details["passes"].values()) > 0
    assert plain.manifest.details["passes"] == {}


def test_a_failed_gate_keeps_nothing(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError):
        export(vit, "onnx", bits=8, out=tmp_path / "out", gates=Gates(max_size_bytes=10))
    assert list(tmp_path.iterdir()) == []


def test_a_branch_that_tracing_loses_is_found(tmp_path: Path) -> None:
    """The larger batch takes the other way, which the traced graph does not have."""

    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] == 1 else x * 3

    with pytest.raises(ParityError):
        export(
            Branching(), "onnx", example_inputs=(torch.ones(1, 4),), bits=32, out=tmp_path / "out"
        )


def test_what_cannot_be_exported_says_what_can(tmp_path: Path, program: Path) -> None:
    with pytest.raises(SourceError) as missing:
        export(program, "onnx", out=tmp_path / "out")
    assert "FUNCTION" in missing.value.hint
    with pytest.raises(UsageError):
        export(torch.nn.Linear(2, 2), "onnx", out=tmp_path / "out")
    with pytest.raises(UnsupportedModelError):
        export(f"{program}:make", "gguf", out=tmp_path / "out")
    with pytest.raises(UsageError, match="ONNX graphs alone"):
        export(f"{program}:make", "tflite", out=tmp_path / "out", explain_loss=True)


def test_weights_that_are_missing_are_not_made_up(vit: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(vit, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"classifier\.weight"):
        export(folder, "onnx", bits=32, out=tmp_path / "out", receipt=False)


def test_the_command_line_exports_shows_and_classifies(vit: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    out = tmp_path / "out"
    options = ["--format", "onnx", "--type", "F32", "--min-cosine", "0.999", "--out", str(out)]
    done = _edgekit("export", vit, *options)
    assert done.returncode == 0, done.stderr
    assert "same class" in done.stdout and "attention" in done.stdout
    shown = _edgekit("inspect", out)
    assert "MultiHeadAttention" in shown.stdout and "pixel_values: float32" in shown.stdout
    ran = _edgekit("run", out, picture, "--top", "2", "--json")
    classes = json.loads(ran.stdout)["classes"]
    assert len(classes) == 2 and classes[0]["label"] in tiny_torch.LABELS
    planned = json.loads(_edgekit("plan", out, "--device", "rpi5", "--json").stdout)
    assert planned["latency_ms"]["mid"] > 0 and planned["fits"]
    away = _edgekit("run", out, picture, "--device", "local", "--top", "1")
    assert away.returncode == 0 and away.stdout.startswith(classes[0]["label"])
    broken = _edgekit("run", out, vit / "config.json")
    assert (broken.returncode, broken.stdout) == (2, "")
    assert "is no image" in broken.stderr


def _edgekit(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "edgekit", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)
