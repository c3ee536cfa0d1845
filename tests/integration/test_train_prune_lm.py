"""The recipe prune-lm at toy length: what it leaves, compares and refuses, and that it exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from training_data import prose, toy_llama

import edgekit
from edgekit.errors import RecipeError
from edgekit.registry import RECIPES
from edgekit.training import pretrained, wanda
from edgekit.training.recipe import train
from edgekit.training.settings import with_pairs


def trained(recipe: str, out: Path, *pairs: str) -> dict[str, Any]:
    return train(recipe, pairs, out, resume=False, say=lambda status: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prose.txt"
    path.write_text(prose())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    return toy_llama(tmp_path_factory.mktemp("models") / "llama", text)


def pairs_of(model: Path, text: Path, *more: str) -> list[str]:
    sizes = ("layers=0.5", "inner=0.5", "groups=0.5", "calibration=16", "length=64")
    return [f"model={model}", f"text={text}", *sizes, "held_tokens=2000", "threads=1", *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "width"
    methods = "methods=width,depth,wanda,wanda-2-of-4"
    trained("prune-lm", out, *pairs_of(model, text, methods, "latency=no"))
    return out


def rows(folder: Path) -> dict[str, dict[str, float]]:
    body = json.loads((folder / "training.json").read_text())
    return {row["name"]: row["figures"] for row in body["results"]}


def test_each_way_stands_beside_one_as_large_that_looked_at_no_text(run: Path) -> None:
    found = rows(run)
    assert next(iter(found)) == "width" and list(found)[-1] == "unpruned"
    for one, other in (
        ("width", "width-by-size"),
        ("depth", "depth-evenly"),
        ("wanda", "magnitude"),
        ("wanda-2-of-4", "magnitude-2-of-4"),
    ):
        assert found[one]["parameters"] == found[other]["parameters"]
        assert found[one]["zeros_share"] == pytest.approx(found[other]["zeros_share"], abs=0.01)
        assert found["unpruned"]["loss"] < found[one]["loss"] < found[other]["loss"] + 0.05
    assert found["width"]["loss"] < found["width-by-size"]["loss"]
    assert found["wanda"]["zeros_share"] == found["wanda-2-of-4"]["zeros_share"] == 0.5
    remarks = json.loads((run / "training.json").read_text())["remarks"]
    (told,) = (each for each in remarks if each.startswith("width loses"))
    lost, low, high, more, least, most = map(float, re.findall(r"-?\d+\.\d+", told))
    assert lost == pytest.approx(found["width"]["loss"] - found["unpruned"]["loss"], abs=6e-4)
    more_loss = found["width-by-size"]["loss"] - found["width"]["loss"]
    assert more == pytest.approx(more_loss, abs=6e-4)
    assert low < lost < high and least < more < most
    assert found["width"]["parameters"] < found["unpruned"]["parameters"]


def test_the_folder_has_the_first_and_every_format_takes_it(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (64, 1)
    assert (config["num_attention_heads"], config["head_dim"]) == (2, 16)
    small = pretrained.model(edgekit.source(run), "AutoModelForCausalLM").eval()
    assert sum(each.numel() for each in small.parameters()) == rows(run)["width"]["parameters"]
    for kind, type_ in (("gguf", "F16"), ("onnx", "F32")):
        artifact = edgekit.export(run, kind, type=type_, out=tmp_path / kind)
        assert artifact.receipt["status"] == "proven"
        assert artifact.receipt["quality"]["mean_kl"]["value"] < 1e-3


def test_zeros_are_in_the_folder_and_stay_there_in_tuning(
    model: Path, text: Path, tmp_path: Path
) -> None:
    more = ("methods=wanda", "tune=yes", "steps=20", "batch=8", "lr=3e-3", "precision=fp32")
    pairs = pairs_of(model, text, *more, "latency=no")
    trained("prune-lm", tmp_path / "out", *pairs)
    found = rows(tmp_path / "out")
    assert list(found) == ["wanda-tuned", "magnitude-tuned", "wanda", "magnitude", "unpruned"]
    remarks = json.loads((tmp_path / "out" / "training.json").read_text())["remarks"]
    gained = found["wanda-tuned"]["loss"] - found["unpruned"]["loss"]
    assert any(each.startswith(f"wanda-tuned loses {gained:.3f} [") for each in remarks)
    assert found["wanda-tuned"]["loss"] < found["wanda"]["loss"]
    tuned = pretrained.model(edgekit.source(tmp_path / "out"), "AutoModelForCausalLM")
    assert wanda.zeros_share(tuned) == found["wanda-tuned"]["zeros_share"] == 0.5


def test_layers_go_by_what_was_asked_for(model: Path, text: Path, tmp_path: Path) -> None:
    for by in ("influence", "loss"):
        out = tmp_path / by
        trained(
            "prune-lm", out, *pairs_of(model, text, "methods=depth", f"depth_by={by}", "latency=no")
        )
        assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
        remarks = json.loads((out / "training.json").read_text())["remarks"]
        assert any(f"chosen by {by}" in remark for remark in remarks)


@pytest.mark.slow
def test_speeds_are_measured_in_llama_cpp(model: Path, text: Path, tmp_path: Path) -> None:
    trained("prune-lm", tmp_path / "out", *pairs_of(model, text, "methods=depth,wanda"))
    found = rows(tmp_path / "out")
    assert all(found[name]["decode_tok_s"] > 0 for name in ("depth", "wanda", "unpruned"))
    assert found["depth"]["gguf_bytes"] < found["unpruned"]["gguf_bytes"]
    assert found["wanda"]["gguf_bytes"] == pytest.approx(found["unpruned"]["gguf_bytes"], rel=0.01)
    remarks = json.loads((tmp_path / "out" / "training.json").read_text())["remarks"]
    assert sum("skip no zeros" in remark for remark in remarks) == 1


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("methods=depth,breadth", "methods are some of depth, width"),
        ("layers=1.5", "shares above 0"),
        ("sparsity=1", "sparsity is a share"),
        ("calibration=0", "1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(pair: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        with_pairs(RECIPES.load("prune-lm").settings, [pair])
