"""A folder that optimum-cli made is a source like the folder that it was made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_torch

import edgekit
from edgekit.errors import SourceError, UnsafeModelError
from edgekit.exporter import export, reprove
from edgekit.exporters import torch_model, torch_to_onnx
from edgekit.source import source


def _as_optimum(folder: Path, out: Path) -> Path:
    """What optimum-cli leaves: the graph, and the folder's JSON files beside it."""
    out.mkdir()
    torch_to_onnx.write(torch_model.build(source(folder)), out / "model.onnx")
    for path in folder.glob("*.json"):
        shutil.copy(path, out)
    return out


@pytest.mark.parametrize("family", ["vit", "bert"])
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
