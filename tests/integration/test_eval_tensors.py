"""`edgekit eval` of tensors names the layer that breaks; labelled data give an accuracy; and two
artifacts of one model are held against each other, whatever form their tensors have.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_torch
import torch
from onnx import numpy_helper
from PIL import Image

import edgekit
from edgekit import agreement
from edgekit.artifact import Artifact
from edgekit.errors import UsageError
from edgekit.export_again import reprove
from edgekit.exporter import export
from edgekit.exporters import onnx_graph
from edgekit.receipt import Receipt
from edgekit.runtime import TensorSpec
from edgekit.runtimes.aligned import Aligned


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vit")
    source = tiny_torch.vit_folder(folder / "model", num_hidden_layers=3)
    for name, options in {
        "float": {"bits": 32, "fusion": "none"},
        "static": {"type": "static_wi8_ai8", "chunks": 8, "fusion": "none"},
        "dynamic": {"bits": 8, "chunks": 8},
    }.items():
        export(source, "onnx", out=folder / name, receipt=False, **options)
    return {name: folder / name for name in ("model", "float", "static", "dynamic")}


def _layers(path: Path) -> list[tuple[str, str, bool]]:
    """Name of every operator with weights in 8 bits, of the scale of those, and whether what it
    makes is another value on purpose.
    """
    graph = onnx_graph.Graph(onnx_graph.load(path))
    found = []
    for node in graph.nodes:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            weights = graph.maker(node.input[1], "DequantizeLinear")
            if weights is not None and graph.constant(weights.input[0]) is not None:
                moved = node.output[0].endswith(".moved")
                found.append((node.name, weights.input[1], moved))
    return found


def test_the_layer_with_a_spoilt_scale_is_named(vit: dict[str, Path], tmp_path: Path) -> None:
    """Planted: the scale of one layer's weights is three times what it should be."""
    path = vit["static"] / "model.onnx"
    layers = _layers(path)
    assert len(layers) >= 18
    for name, scale, moved in layers[:: len(layers) // 4]:
        model = onnx_graph.load(path)
        (tensor,) = (each for each in model.graph.initializer if each.name == scale)
        tensor.CopyFrom(numpy_helper.from_array(3 * numpy_helper.to_array(tensor), scale))
        shutil.copy(path.with_name("preprocess.json"), tmp_path)
        onnx_graph.save(model, tmp_path / "model.onnx")
        (found,) = agreement.compare(tmp_path / "model.onnx", vit["float"], layers=True)
        assert found.layers is not None and found.layers.first is not None
        if moved:  # it is seen where the values meet again: in the same attention, or MLP
            assert found.layers.first.layer.startswith(name.rsplit("/", 2)[0] + "/")
        else:
            assert found.layers.first.layer == name


def test_a_sound_model_has_no_layer_that_stands_out(vit: dict[str, Path]) -> None:
    (found,) = agreement.compare(vit["dynamic"], vit["float"], layers=True)
    assert found.layers is not None and found.layers.first is None
    assert found.layers.shared > 20
    assert all(each.snr_db > 15 for each in found.layers.layers)


def test_the_command_line_compares_two_artifacts(vit: dict[str, Path]) -> None:
    told = _edgekit("eval", vit["dynamic"], "--against", vit["float"], "--explain-loss", "--json")
    assert told.returncode == 0, told.stderr
    (part,) = json.loads(told.stdout)["parts"]
    assert part["agreement"]["cosine"]["value"] > 0.99
    assert part["layers"]["shared"] == len(part["layers"]["layers"])


@pytest.mark.slow
def test_the_command_line_shows_the_layers_against_the_source(vit: dict[str, Path]) -> None:
    shown = _edgekit("eval", vit["dynamic"], "--explain-loss")
    assert shown.returncode == 0, shown.stderr
    assert "loses most" in shown.stdout and "SNR, dB" in shown.stdout
    wrong = _edgekit("eval", vit["dynamic"], "--needle")
    assert (wrong.returncode, wrong.stdout) == (2, "") and "--needle" in wrong.stderr
    bare = _edgekit("eval", vit["float"] / "model.onnx")
    assert bare.returncode == 2 and "--against" in bare.stderr


def test_a_receipt_explains_its_loss_on_demand(vit: dict[str, Path], tmp_path: Path) -> None:
    made = export(vit["model"], "onnx", bits=8, chunks=8, out=tmp_path / "out", explain_loss=True)
    layers = Receipt.from_dict(made.receipt).layers
    assert layers is not None and layers.samples == 8 and len(layers.layers) == layers.shared


def _pictures(folder: Path, session: Any, count: int, *, wrong: int) -> None:
    """Images in folders by the class that the model sees in them, but for ``wrong`` of them."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        label = session.classify(pixels, top=10)[9 if number < wrong else 0][0]
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / label / f"{number}.png")


def test_folders_of_classes_give_an_accuracy_with_its_bounds(
    vit: dict[str, Path], tmp_path: Path
) -> None:
    with edgekit.load(vit["float"], n_threads=1) as session:
        _pictures(tmp_path / "right", session, 24, wrong=0)
        _pictures(tmp_path / "mixed", session, 24, wrong=24)
    out = tmp_path / "out"
    made = export(vit["model"], "onnx", bits=8, out=out, eval_data=tmp_path / "right")
    found = Receipt.from_dict(made.receipt).accuracy
    assert found is not None and 8 <= found.samples <= 14
    assert found.reference.value == 1 and found.product.value > 0.7
    assert found.difference.low <= found.product.value - 1 <= found.difference.high
    assert reprove(Artifact.open(out), eval_data=tmp_path / "right")[1] == []
    again = reprove(Artifact.open(out), eval_data=tmp_path / "mixed")[0]
    assert again.accuracy is not None and again.accuracy.reference.value == 0


def test_lines_of_texts_or_images_are_labelled_data_too(
    vit: dict[str, Path], tmp_path: Path
) -> None:
    with edgekit.load(vit["float"], n_threads=1) as session:
        _pictures(tmp_path / "photos", session, 12, wrong=0)
    lines = [
        {"image": f"photos/{path.parent.name}/{path.name}", "label": path.parent.name.upper()}
        for path in (tmp_path / "photos").rglob("*.png")
    ]
    data = tmp_path / "photos.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    made = export(vit["model"], "onnx", bits=32, out=tmp_path / "out", eval_data=data)
    assert made.receipt["accuracy"]["product"]["value"] == 1
    assert made.receipt["agreement"]["samples"] == 6


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[1]",
        '{"image": "a.png"}',
        '{"image": "../a.png", "label": "cat"}',
        '{"text": "a cat", "label": "cat"}',
        '{"image": "a.png", "label": "zebra"}',
        '{"image": "missing.png", "label": "cat"}',
        "{",
    ],
)
def test_a_broken_line_is_one_clear_error(vit: dict[str, Path], tmp_path: Path, line: str) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text("\n".join([line] * 2))
    with pytest.raises(UsageError) as error:
        reprove(Artifact.open(vit["float"]), eval_data=data)
    assert "\n" not in error.value.message


class _ChannelsLast:
    """A session of a format that has channels last, and other names."""

    task = "image-classification"

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = (TensorSpec("serving_in:0", "float32", (1, 32, 32, 3)),)
        self.outputs = (TensorSpec("out:0", "float32", (1, 10)),)

    def run(self, inputs: Any) -> dict[str, Any]:
        pixels = inputs["serving_in:0"]
        assert pixels.shape[1:] == (32, 32, 3)
        found = self._session.run({"pixel_values": pixels.transpose(0, 3, 1, 2)})
        return {"out:0": found["logits"]}


def test_another_layout_and_other_names_are_no_other_answer(vit: dict[str, Path]) -> None:
    pixels = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    with edgekit.load(vit["float"], n_threads=1) as session:
        other: Any = Aligned(_ChannelsLast(session), session)  # type: ignore[arg-type]
        expected = session.run({"pixel_values": pixels})["logits"]
        assert (other.run({"pixel_values": pixels})["logits"] == expected).all()
        two: Any = type("Two", (), {"inputs": session.inputs * 2, "outputs": session.outputs})()
        with pytest.raises(UsageError):
            Aligned(two, session)


def test_models_of_another_shape_are_refused(vit: dict[str, Path], tmp_path: Path) -> None:
    other = edgekit.export(
        torch.nn.Linear(4, 2),
        "onnx",
        example_inputs=(torch.zeros(1, 4),),
        bits=32,
        receipt=False,
        out=tmp_path / "other",
    )
    with pytest.raises(UsageError):
        agreement.compare(vit["float"], other.path)


def _edgekit(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "edgekit", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)
