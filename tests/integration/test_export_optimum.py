"""optimum-cli: a folder that it made is a source, and ``--via optimum`` lets it make the graph."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_torch
import torch

import edgekit
from edgekit.errors import RecipeError, SourceError, UnsafeModelError
from edgekit.export_again import repeat, reprove
from edgekit.exporter import export
from edgekit.exporters import torch_model, torch_to_onnx
from edgekit.source import source


def _as_optimum(folder: Path, out: Path) -> Path:
    """What optimum-cli leaves: the graph, and the folder's JSON files beside it."""
    out.mkdir()
    torch_to_onnx.write(torch_model.build(source(folder)), out / "model.onnx")
    for path in folder.glob("*.json"):
        shutil.copy(path, out)
    return out


@pytest.mark.parametrize("family", [pytest.param("vit", marks=pytest.mark.slow), "bert"])
def test_it_keeps_what_makes_the_inputs(family: str, tmp_path: Path) -> None:
    folder = getattr(tiny_torch, f"{family}_folder")(tmp_path / "model")
    made = _as_optimum(folder, tmp_path / "optimum")
    first = export(folder, "onnx", bits=32, receipt=False, out=tmp_path / "first")
    second = export(made, "onnx", bits=32, out=tmp_path / "second")
    assert second.manifest.source["kind"] == "onnx" and second.receipt["status"] == "proven"
    preprocess = [(art.path / "preprocess.json").read_bytes() for art in (first, second)]
    assert preprocess[0] == preprocess[1]
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    answers = []
    for artifact in (first, second):
        with edgekit.load(artifact, n_threads=1) as session:
            if family == "vit":
                answers.append([share for _, share in session.classify(picture, top=10)])
            else:
                answers.append(session.embed("a cat sits on the mat"))
    assert answers[0] == pytest.approx(answers[1], abs=1e-5)
    assert reprove(second)[1] == []


def test_what_cannot_be_such_a_folder_is_refused(tmp_path: Path) -> None:
    made = _as_optimum(tiny_torch.vit_folder(tmp_path / "model"), tmp_path / "optimum")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "m.Net"}}))
    with pytest.raises(UnsafeModelError):
        source(made)
    (made / "config.json").write_text(json.dumps(config))
    graph = (made / "model.onnx").read_bytes()
    (made / "model.onnx").write_bytes(graph[: len(graph) // 2])
    with pytest.raises(SourceError):
        source(made)
    (made / "model.onnx").unlink()
    (made / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(UnsafeModelError):
        source(made)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_optimum_cli_writes_the_graph_in_an_environment_of_its_own(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For real: its packages are fetched, a BERT is exported, and its graph held against torch."""
    folder = tiny_torch.bert_folder(tmp_path / "model")
    made = export(folder, "onnx", bits=8, via="optimum", chunks=8, out=tmp_path / "made")
    assert made.manifest.recipe.via == "optimum" and made.manifest.source["kind"] == "hf"
    assert made.receipt["status"] == "proven" and made.manifest.details["traced_error"] < 1e-4
    assert [value["name"] for value in made.manifest.details["outputs"]] == ["last_hidden_state"]
    (root,) = (each for each in (home / "cache" / "optimum").iterdir())
    own = export(folder, "onnx", bits=32, out=tmp_path / "own", receipt=False)
    other = export(folder, "onnx", bits=32, via="optimum", out=tmp_path / "other")
    assert other.receipt["agreement"]["cosine"]["value"] > 0.99999
    vectors = []
    for artifact in (own, other):
        with edgekit.load(artifact, n_threads=1) as session:
            vectors.append(session.embed(["a cat sits on the mat", "a dog"]))
    assert np.array(vectors[0]) == pytest.approx(np.array(vectors[1]), abs=1e-5)
    assert repeat(other.path, out=tmp_path / "again").sha256 == other.sha256
    vit = tiny_torch.vit_folder(tmp_path / "vit")
    seen = export(vit, "onnx", bits=32, via="optimum", out=tmp_path / "seen")
    assert seen.manifest.details["inputs"][0]["shape"] == ["batch", 3, 32, 32]
    assert [root] == list((home / "cache" / "optimum").iterdir())
    assert reprove(seen)[1] == []


@pytest.mark.slow
def test_offline_via_optimum_is_one_clear_line(tmp_path: Path, home: Path) -> None:
    folder = tiny_torch.bert_folder(tmp_path / "model")
    asked = ["--format", "onnx", "--json", "--via", "optimum", "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", "export", folder, *asked],
        env={"EDGEKIT_HOME": str(home), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4 and not done.stdout and not (tmp_path / "out").exists()
    assert "torch==2.13.0" in done.stderr and "without --via nothing is fetched" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_optimum_is_not_asked_for_is_refused(tmp_path: Path) -> None:
    bert, clip = tiny_torch.bert_folder(tmp_path / "b"), tiny_torch.clip_folder(tmp_path / "c")
    with pytest.raises(RecipeError, match="ONNX graphs of Hugging Face folders"):
        export(bert, "gguf", via="optimum", out=tmp_path / "out")
    with pytest.raises(RecipeError, match="ONNX graphs of Hugging Face folders"):
        given = {"example_inputs": torch.zeros(1, 4), "via": "optimum"}
        export(torch.nn.Linear(4, 2), "onnx", out=tmp_path / "out", **given)
    with pytest.raises(RecipeError, match="one encoder"):
        export(clip, "onnx", via="optimum", out=tmp_path / "out")
    with pytest.raises(RecipeError, match="via must be"):
        export(bert, "onnx", via="nobody", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
