"""The recipe prune: from pictures to a network that is cut to a latency, beside its uncut twin."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import picture_folder

import edgekit
from edgekit import onnx_cost
from edgekit.device import load_profile
from edgekit.errors import DataError, RecipeError
from edgekit.formats import onnx
from edgekit.registry import RECIPES
from edgekit.training import images, prune, residual
from edgekit.training.convolution_time import Predicted, total_ms
from edgekit.training.recipe import train
from edgekit.training.settings import with_pairs
from edgekit.vision_predictor import predict_vision

ROOT = Path(__file__).resolve().parents[2]
TOY = ("side=8", "channels=1", "widths=8,12", "blocks=1,1", "flip=no", "shift=1", "threads=1")
MORE = ("steps=80", "batch=16", "eval_every=0", "lr=1e-2", "held_images=12", "chunk=2")
TUNE = ("tune_steps=60", "tune_lr=5e-3", "rounds=2", "speedup=2", "board=rpi5", "sparsity=0.5")


def pruned(out: Path, data: Path, *pairs: str) -> dict[str, Any]:
    settings = [f"data={data}", *TOY, *MORE, *TUNE, *pairs]
    return train("prune", settings, out, resume=False, say=lambda status: None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("data") / "pictures", each=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "bars"
    pruned(out, pictures, "latency=no")
    return out


def test_the_report_has_the_cut_network_beside_those_of_equal_training(run: Path) -> None:
    body = json.loads((run / "training.json").read_text())
    rows = {row["name"]: row["figures"] for row in body["results"]}
    assert list(rows) == ["pruned", "unpruned", "2-of-4", "unstructured"]
    assert rows["pruned"]["parameters"] < 0.7 * rows["unpruned"]["parameters"]
    assert rows["pruned"]["accuracy"] > 0.9
    assert 0.4 < rows["2-of-4"]["zeros_share"] <= 0.5 == rows["unpruned"]["zeros_share"] + 0.5
    assert rows["unstructured"]["zeros_share"] == pytest.approx(0.5, abs=0.02)
    steps = {phase["name"]: phase["steps"] for phase in body["phases"]}
    assert steps["round-1"] + steps["round-2"] == steps["unpruned"] == steps["2-of-4"] == 60


def test_a_network_that_was_left_is_cut_without_training_another(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    pairs = (f"base={run / 'unpruned'}", "latency=no", "sparse=no", "expand=3")
    body = pruned(tmp_path / "out", pictures, *pairs)
    assert [phase["name"] for phase in body["phases"]] == ["unpruned", "round-1", "round-2"]
    before, after = (
        json.loads((folder / "network.json").read_text())["config"]["stages"]
        for folder in (run / "unpruned", tmp_path / "out" / "unpruned")
    )
    assert before == after  # its own widths, not those of the settings


def test_the_board_is_predicted_to_be_as_fast_as_asked_for(run: Path) -> None:
    remarks = json.loads((run / "training.json").read_text())["remarks"]
    (told,) = [remark for remark in remarks if "predicted for rpi5" in remark]
    assert 2.0 <= float(told.split(", ")[1].split()[0]) < 2.6
    (criteria,) = [remark for remark in remarks if "before any tuning" in remark]
    assert all(name in criteria for name in ("l1", "taylor", "bn", "activation"))
    assert sum("paired bootstrap" in remark for remark in remarks) == 3


def test_what_answers_as_its_teacher_has_only_the_labels_to_learn(pictures: Path) -> None:
    data = images.load(str(pictures), side=8, channels=1)
    torch.manual_seed(0)
    teacher, other = (
        residual.build(residual.config(data.shape, 2, kind="basic", widths=(8,), blocks=(1,)))
        for _ in range(2)
    )
    batch = data.train.batch(torch.arange(16))
    losses = {}
    for answers in ("0", "1"):
        settings = with_pairs(RECIPES.load("prune").settings, [f"answers={answers}"])
        loss = prune.taught_by(teacher, data, settings)
        for name, model in (("same", teacher), ("other", other.eval())):
            losses[name, answers] = float(loss(model, batch).detach())
    assert losses["same", "1"] == pytest.approx(0, abs=1e-4) and losses["other", "1"] > 0.01
    assert losses["same", "0"] > 1


def test_the_uncut_network_is_trained_first_and_the_others_learn_from_it(run: Path) -> None:
    body = json.loads((run / "training.json").read_text())
    phases = [phase["name"] for phase in body["phases"]]
    assert phases == ["base", "unpruned", "round-1", "round-2", "2-of-4", "unstructured"]
    assert any("learned in tuning from its answers" in remark for remark in body["remarks"])


def test_both_networks_can_be_exported_and_the_cut_one_classifies(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    artifact = edgekit.export(run, "onnx", type="F32", out=tmp_path / "cut", receipt=False)
    whole = edgekit.export(
        run / "unpruned", "onnx", type="F32", out=tmp_path / "whole", receipt=False
    )
    assert artifact.size_bytes < whole.size_bytes
    for each, folder in ((artifact, run), (whole, run / "unpruned")):
        body = json.loads((folder / "network.json").read_text())
        layers = list(residual.convolutions(body["config"], tuple(body["input_shape"][1:])))
        exported = onnx_cost.cost(onnx.read(each.model_path)).cost
        assert math.fsum(layer.cost.flops for layer in layers) == exported.flops
        board = load_profile("rpi5")
        planned = predict_vision(exported, board, engine="ort").mid
        assert total_ms(Predicted(board), layers) == pytest.approx(planned, rel=0.1)
    with edgekit.load(artifact) as model:
        files = sorted(pictures.rglob("*.png"))
        right = [model.classify(path)[0][0] == path.parent.name for path in files]
    assert sum(right) / len(right) > 0.9


@pytest.mark.slow
def test_the_blocks_of_mobilenet_are_cut_for_a_board_and_exported(
    pictures: Path, tmp_path: Path
) -> None:
    few = {"steps": "40", "tune_steps": "30", "speedup": "1.5", "chunk": "4"}
    given = {pair.partition("=")[0]: pair for pair in (*TOY, *MORE, *TUNE)}
    given |= {name: f"{name}={value}" for name, value in few.items()}
    pairs = [f"data={pictures}", *given.values(), "kind=inverted", "expand=2", "sparse=no"]
    pairs.append("latency=no")
    body = train("prune", pairs, tmp_path / "run", resume=False, say=lambda status: None)
    rows = {row["name"]: row["figures"] for row in body["results"]}
    assert rows["pruned"]["parameters"] < rows["unpruned"]["parameters"]
    (told,) = [remark for remark in body["remarks"] if "predicted for rpi5" in remark]
    assert 1.5 <= float(told.split(", ")[1].split()[0]) < 2.2
    artifact = edgekit.export(
        tmp_path / "run", "onnx", type="F32", out=tmp_path / "onnx", receipt=False
    )
    with edgekit.load(artifact) as model:
        files = sorted(pictures.rglob("*.png"))
        right = [model.classify(path)[0][0] == path.parent.name for path in files]
    assert sum(right) / len(right) > 0.7


def test_the_scan_is_a_table_and_a_picture(run: Path) -> None:
    with (run / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    groups = {row["group"] for row in rows}
    assert len(groups) == 4 and {int(row["removed"]) for row in rows} >= {0, 2, 4, 6}
    assert (run / "sensitivity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_pruning_and_quantization_in_one_picture(run: Path, pictures: Path, tmp_path: Path) -> None:
    program = ROOT / "benchmarks" / "train" / "front_prune.py"
    folders = [f"whole={run / 'unpruned'}", f"cut={run}"]
    more = ["--data", pictures, "--side", "8", "--channels", "1", "--json"]
    command = [sys.executable, "-B", program, "--out", tmp_path / "front.png", *more, *folders]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert [(row["network"], row["type"]) for row in rows] == [
        (name, kind) for name in ("whole", "cut") for kind in ("F32", "static_wi8_ai8")
    ]
    assert rows[2]["size_bytes"] < rows[0]["size_bytes"]
    assert all(row["ms"] > 0 and row["accuracy"]["value"] > 0.8 for row in rows)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_is_measured_here_becomes_faster_here(pictures: Path, tmp_path: Path) -> None:
    wide = ("side=32", "widths=32,64", "blocks=1,1", "chunk=8", "board=", "steps=20", "sparse=no")
    pairs = [
        p for p in (*TOY, *MORE, *TUNE) if p.split("=")[0] not in {w.split("=")[0] for w in wide}
    ]
    body = train(
        "prune",
        [f"data={pictures}", *pairs, *wide],
        tmp_path / "out",
        resume=False,
        say=lambda status: None,
    )
    rows = {row["name"]: row["figures"] for row in body["results"]}
    assert rows["unpruned"]["latency_ms"] > 1.6 * rows["pruned"]["latency_ms"]


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (("speedup=1",), "speedup is more than 1"),
        (("sparsity=1",), "sparsity"),
        (("least=1",), "least are shares"),
        (("answers=1.5",), "answers and least"),
        (("rounds=4", "tune_steps=2"), "a round has no steps"),
        (("rounds=11",), "take no share, or all"),
        (("parallel=fsdp",), "zeros are not kept in shards"),
    ],
)
def test_settings_that_make_no_sense_are_refused(pairs: tuple[str, ...], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        with_pairs(RECIPES.load("prune").settings, pairs)


@pytest.mark.parametrize(
    ("pair", "kind", "words"),
    [
        ("held_images=5000", DataError, "cannot be held back"),
        ("widths=8,8,8,8", RecipeError, "as many"),
        ("speedup=500", RecipeError, "channels left everywhere"),
    ],
)
def test_what_cannot_be_done_ends_with_a_word(
    pictures: Path, tmp_path: Path, pair: str, kind: type[Exception], words: str
) -> None:
    pairs = [f"data={pictures}", *TOY, *MORE, *TUNE, "latency=no"]
    kept = [each for each in pairs if each.split("=")[0] not in (pair.split("=")[0], "steps")]
    with pytest.raises(kind, match=words):
        train("prune", [*kept, pair, "steps=5"], tmp_path / "out", resume=False, say=print)
    assert not (tmp_path / "out").exists()
