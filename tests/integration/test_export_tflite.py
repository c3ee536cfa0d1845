"""Vision models, encoders and torch modules become TFLite artifacts that do what they did."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_torch
import torch
from PIL import Image

import edgekit
from edgekit.errors import (
    ExportError,
    GateError,
    ParityError,
    RecipeError,
    UnsupportedModelError,
)
from edgekit.exporter import export
from edgekit.receipt import Gates

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("litert_torch") is None, reason="litert-torch is not installed"
    ),
]
EXAMPLE = torch.zeros(1, 3, tiny_torch.SIDE, tiny_torch.SIDE)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_torch.vit_folder(tmp_path_factory.mktemp("vit") / "model"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_torch.bert_folder(tmp_path_factory.mktemp("bert") / "model"))


def test_a_float_export_computes_what_transformers_computes(vit: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    artifact = export(vit, "tflite", bits=32, out=tmp_path / "out")
    assert artifact.receipt["status"] == "proven"
    pixels = np.random.default_rng(0).standard_normal((2, *EXAMPLE.shape[1:])).astype(np.float32)
    with torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(vit).eval()
        expected = model(torch.from_numpy(pixels)).logits.numpy()
    with edgekit.load(artifact) as session:
        found = session.run({"pixel_values": pixels})["logits"]
    assert found == pytest.approx(expected, abs=1e-4)


def test_an_encoder_pads_texts_to_its_length(bert: Path, tmp_path: Path) -> None:
    artifact = export(bert, "tflite", bits=32, out=tmp_path / "out", receipt=False)
    onnx = export(bert, "onnx", bits=32, out=tmp_path / "onnx", receipt=False)
    texts = ["a cat sits on the mat", "a much longer text, with many words"]
    with edgekit.load(artifact) as ours, edgekit.load(onnx) as theirs:
        assert np.allclose(ours.embed(texts), theirs.embed(texts), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("F16", 0.9999),
        ("dynamic_wi8_afp32", 0.99),
        ("weight_only_wi8_afp32", 0.99),
        ("weight_only_wi4b32", 0.8),
    ],
)
def test_every_type_is_smaller_and_proven(
    kind: str, least: float, vit: Path, tmp_path: Path
) -> None:
    artifact = export(vit, "tflite", type=kind, out=tmp_path / "out")
    assert artifact.receipt["status"] == "proven"
    assert artifact.receipt["agreement"]["cosine"]["value"] > least
    assert artifact.model_path.stat().st_size < 300_000  # 401,412 in float


def test_static_ranges_are_measured_and_sensitive_layers_kept(tmp_path: Path) -> None:
    module = tiny_torch.cnn_module()
    with torch.no_grad():  # one channel that needs 200 times the range of its neighbours
        module[3].weight[0] *= 200
        module[6].weight[:, 0] /= 200
    artifact = export(
        module, "tflite", bits=8, chunks=16, example_inputs=EXAMPLE, out=tmp_path / "out"
    )
    details = artifact.manifest.details
    assert artifact.manifest.recipe.type == "static_wi8_ai8"
    assert details["calibration_loss"] <= details["calibration_loss_all_int8"]
    assert details["calibrator"] in ("MinMax", "Percentile", "MSE")
    whole = export(
        module,
        "tflite",
        type="static_wi8_ai8",
        overrides=((".*", "F32"),),
        chunks=16,
        example_inputs=EXAMPLE,
        out=tmp_path / "whole",
    )
    assert whole.receipt["agreement"]["cosine"]["value"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "least"), [("weight_only_wi4_afp32", 0.999999), ("dynamic_wi4_afp32", 0.999)]
)
def test_weights_on_a_grid_are_stored_in_4_bits_as_they_are(
    kind: str, least: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Flatten(),
        *(torch.nn.Linear(EXAMPLE.numel(), 48), torch.nn.ReLU(), torch.nn.Linear(48, 10)),
    )
    with torch.no_grad():
        weight = module[1].weight
        steps = torch.rand(48, 1) * 0.01 + 0.001
        weight.copy_(torch.randint(-8, 8, weight.shape) * steps)
    artifact = export(module, "tflite", type=kind, example_inputs=EXAMPLE, out=tmp_path / "out")
    assert artifact.manifest.details["matrices"] == 1
    assert len(artifact.manifest.details["kept_float"]) == 1  # the second lies on no grid
    assert artifact.receipt["agreement"]["cosine"]["value"] > least
    assert artifact.model_path.stat().st_size < EXAMPLE.numel() * 48 // 2 + 10_000
    with pytest.raises(RecipeError, match="grid"):
        export(
            module[3], "tflite", type=kind, example_inputs=torch.zeros(1, 48), out=tmp_path / "b"
        )
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_says_what_can(vit: Path, tmp_path: Path) -> None:
    onnx = export(vit, "onnx", bits=4, out=tmp_path / "onnx", receipt=False)
    with pytest.raises(UnsupportedModelError, match=r"com\.microsoft\.MatMulNBits"):
        export(onnx.model_path, "tflite", out=tmp_path / "out")
    with pytest.raises(RecipeError, match="fusion"):
        export(vit, "tflite", fusion="none", out=tmp_path / "out")
    with pytest.raises(GateError):
        export(vit, "tflite", bits=32, out=tmp_path / "out", gates=Gates(max_size_bytes=10))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
@pytest.mark.parametrize("kind", ["F32", "dynamic_wi8_afp32"])
def test_an_onnx_file_is_a_source_and_its_own_judge(name: str, kind: str, tmp_path: Path) -> None:
    source = getattr(tiny_torch, f"{name}_folder")(tmp_path / "source")
    onnx = export(source, "onnx", bits=32, fusion="none", receipt=False, out=tmp_path / "onnx")
    given = onnx.model_path
    if name == "bert":  # a folder as optimum-cli leaves it: what makes the inputs lies beside
        given.rename(source / "model.onnx")
        (source / "model.safetensors").unlink()
        given = source
    artifact = export(given, "tflite", type=kind, out=tmp_path / "out")
    assert artifact.receipt["reference"]["origin"] == "the source"
    least = 0.99999 if kind == "F32" else 0.99
    assert artifact.receipt["agreement"]["cosine"]["value"] > least
    pinned = {"batch": 1} | ({"sequence": 64} if name == "bert" else {})
    assert artifact.manifest.details["pinned"] == pinned
    if name == "bert":
        with edgekit.load(artifact) as session:
            assert np.shape(session.embed(["a cat sits", "on the mat"])) == (2, 64)
    done = _edgekit("verify", "--deep", tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_a_graph_that_is_no_copy_of_its_onnx_file_is_not_kept(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.exporters import torch_to_onnx

    onnx = export(vit, "onnx", bits=32, fusion="none", receipt=False, out=tmp_path / "onnx")
    monkeypatch.setitem(torch.nn.functional.__dict__, "gelu", lambda x, **_: torch.relu(x))
    with pytest.raises(ParityError, match="off by"):
        export(onnx.model_path, "tflite", bits=32, out=tmp_path / "out")
    # The receipt alone finds it, too.
    monkeypatch.setattr(torch_to_onnx, "check", lambda traced, path: 0.0)
    with pytest.raises(ParityError, match="does not answer as its source does"):
        export(onnx.model_path, "tflite", bits=32, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_engine_that_ends_its_process_is_one_clear_error(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LiteRT does so with the real all-MiniLM-L6-v2; here a child that ends itself plays it."""
    from edgekit.exporters import tflite_quantizer

    monkeypatch.setattr(tflite_quantizer, "_OPEN", "tiny_torch:end_the_process")
    with pytest.raises(ExportError, match="cannot run static int8"):
        export(vit, "tflite", type="static_wi8_ai8", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_exports_shows_classifies_and_verifies(vit: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    out = tmp_path / "out"
    done = _edgekit(
        "export", vit, "--format", "tflite", "--type", "F32", "--min-cosine", ".999", "--out", out
    )
    assert done.returncode == 0, done.stderr
    assert "same class" in done.stdout and "XNNPACK" not in done.stderr
    shown = _edgekit("inspect", out).stdout
    assert "FULLY_CONNECTED" in shown and "pixel_values: float32 [1, 3, 32, 32]" in shown
    ran = _edgekit("run", out, picture, "--top", "2", "--json")
    assert len(json.loads(ran.stdout)["classes"]) == 2
    assert _edgekit("verify", "--deep", out).returncode == 0


def test_formats_of_one_model_stand_in_one_table(vit: Path, tmp_path: Path) -> None:
    outs = [tmp_path / format for format in ("onnx", "tflite")]
    for out in outs:
        export(vit, out.name, bits=32, out=out, receipt=False)
    done = _edgekit("bench", *outs, "-r", "2", "-t", "1", "--no-probe", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["runtime"] for row in rows] == ["ort", "litert"]
    assert all(row["flops"] for row in rows)
    assert rows[0]["flops"] == pytest.approx(rows[1]["flops"], rel=0.05)
    assert rows[1]["summary"]["times_faster"][0] > 0


def _edgekit(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "edgekit", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)
