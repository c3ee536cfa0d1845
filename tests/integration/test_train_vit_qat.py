"""vit-qat: from pictures to a file of 4-bit weights that answers as the trained network does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from training_data import picture_folder

import edgekit
from edgekit.errors import RecipeError
from edgekit.exporter import export
from edgekit.training.recipe import train

TOY = (
    *("side=8", "channels=1", "patch=2", "width=32", "depth=1", "heads=2", "hidden=64"),
    *("steps=80", "tune_steps=40", "batch=16", "lr=3e-3", "tune_lr=1e-3", "calibration=32"),
    *("flip=no", "shift=1", "threads=1", "log_every=20", "eval_every=40"),
)


def trained(folder: Path, data: Path, *pairs: str) -> dict[str, Any]:
    own = {pair.partition("=")[0] for pair in pairs}
    toy = [pair for pair in TOY if pair.partition("=")[0] not in own]
    return train(
        *("vit-qat", [f"data={data}", *toy, *pairs], folder),
        resume=False,
        say=lambda status: None,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("data") / "pictures", each=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "bars"
    trained(out, pictures, "formats=w4a4", "latency=no")
    return out


def test_the_report_sets_each_format_beside_the_control_and_its_rivals(run: Path) -> None:
    body = json.loads((run / "training.json").read_text())
    names = [row["name"] for row in body["results"]]
    assert names[:3] == ["w4a4", "control", "float"]
    methods = ("min-max", "least error", "least error, means corrected")
    assert names[3:] == [f"w4a4 of the control, {how}" for how in methods]
    figures = {row["name"]: row["figures"] for row in body["results"]}
    assert figures["control"]["accuracy"] > 0.9 and figures["w4a4"]["accuracy"] > 0.8
    assert {phase["name"]: phase["steps"] for phase in body["phases"]} == {
        **{"float": 80, "control": 40},
        "w4a4": 40,
    }
    assert sum("paired bootstrap" in remark for remark in body["remarks"]) == 2


@pytest.mark.slow
def test_the_report_has_the_exported_files_size_speed_and_accuracy(
    pictures: Path, tmp_path: Path
) -> None:
    body = trained(tmp_path / "run", pictures, "formats=w4a4,w2a4", "latency=yes")
    figures = {row["name"]: row["figures"] for row in body["results"]}
    for name in ("w4a4", "w2a4", "control"):
        mine = figures[name]
        assert mine["onnx_accuracy"] == pytest.approx(mine["accuracy"], abs=0.1)
        assert mine["latency_ms"] > 0
        assert mine["onnx_bytes"] <= figures["control"]["onnx_bytes"]


def test_the_file_has_4_bit_weights_and_the_receipt_proves_it(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    four = export(run, "onnx", type="weight_only_wi4_afp32", out=tmp_path / "four")
    graph = onnx.load(four.path / "model.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 6  # query, key, value, out, and the two of the MLP
    packed = {tensor.name: tensor for tensor in graph.initializer}
    for node in products:
        sides = {each.name: each.i for each in node.attribute}
        assert sides["bits"] == 4
        assert len(packed[node.input[1]].raw_data) == sides["N"] * sides["K"] // 2
    # The embedding and the head were not asked for.
    assert len(four.manifest.details["kept_float"]) == 2
    assert four.receipt["status"] == "proven"
    assert four.receipt["agreement"]["cosine"]["value"] > 0.99
    with edgekit.load(four) as model:
        answers = [
            model.classify(path)[0][0] == path.parent.name
            for path in sorted(pictures.rglob("*.png"))
        ]
    assert np.mean(answers) > 0.8


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("litert_torch") is None, reason="litert-torch is not installed"
)
@pytest.mark.parametrize(
    ("kind", "cosine"), [("weight_only_wi4_afp32", 0.9999), ("dynamic_wi4_afp32", 0.98)]
)
def test_tflite_holds_the_same_4_bits_and_answers_as_the_trained_network(
    run: Path, pictures: Path, tmp_path: Path, kind: str, cosine: float
) -> None:
    from edgekit.formats import tflite

    four = export(run, "tflite", type=kind, out=tmp_path / "four")
    assert four.receipt["status"] == "proven"
    assert four.receipt["agreement"]["cosine"]["value"] > cosine
    assert four.manifest.details["matrices"] == 6
    assert len(four.manifest.details["kept_float"]) == 2
    packed = [each for each in tflite.read(four.model_path).constants if each.dtype == "int4"]
    assert len(packed) == 6
    onnx_file = export(run, "onnx", type="weight_only_wi4_afp32", out=tmp_path / "onnx")
    files = sorted(pictures.rglob("*.png"))
    with edgekit.load(four) as ours, edgekit.load(onnx_file) as theirs:
        answers = [(ours.classify(path)[0][0], theirs.classify(path)[0][0]) for path in files]
    right = np.mean(
        [one == path.parent.name for (one, _), path in zip(answers, files, strict=True)]
    )
    assert right > 0.8 and np.mean([one == other for one, other in answers]) > 0.95


def test_the_ends_get_4_bits_too_where_asked(pictures: Path, tmp_path: Path) -> None:
    short = ("steps=4", "tune_steps=4", "latency=no", "formats=w4a8", "ends=yes")
    trained(tmp_path / "run", pictures, *short)
    found = export(
        *(tmp_path / "run", "onnx"),
        type="weight_only_wi4_afp32",
        out=tmp_path / "four",
        receipt=False,
    )
    assert found.manifest.details["matrices"] == 8 and not found.manifest.details["kept_float"]


def test_float_weights_are_refused_with_a_way_out(run: Path, tmp_path: Path) -> None:
    from edgekit.training import vit

    config = json.loads((run / "network.json").read_text())["config"]
    network = vit.build(config | {"activation_bits": 0})
    import torch

    with pytest.raises(RecipeError) as caught:
        export(
            *(network, "onnx"),
            example_inputs=(torch.zeros(1, 1, 8, 8),),
            type="weight_only_wi4_afp32",
            out=tmp_path / "four",
        )
    assert "weight_only_wi4b32" in str(caught.value.hint)
    assert not (tmp_path / "four").exists()


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("formats=w5a4", "formats"),
        ("formats=", "formats"),
        ("formats=w4a4,w4a4", "formats"),
        ("heads=3", "heads"),
        ("distill=1.5", "distill"),
        ("patch=3", "patches of 3"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    pictures: Path, tmp_path: Path, pair: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        trained(tmp_path / "out", pictures, pair)
