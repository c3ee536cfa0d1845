"""`edgekit bench` of ONNX files, for real: runs in turn, batches, operators, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_torch

from edgekit.errors import UsageError
from edgekit.exporter import export
from edgekit.latency import latency


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ViT in float32 and in int8."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_torch.vit_folder(folder / "vit")
    for kind in ("F32", "dynamic_wi8_afp32"):
        export(folder / "vit", "onnx", type=kind, out=folder / kind, receipt=False)
    return folder / "F32", folder / "dynamic_wi8_afp32"


def test_models_batches_and_threads_take_turns(artifacts: tuple[Path, Path]) -> None:
    found = latency(*artifacts, threads=[1], batches=[1, 4], repetitions=2)
    assert [(row.model, row.batch) for row in found.rows] == [
        (path.name, batch) for path in artifacts for batch in (1, 4)
    ]
    for row in found.rows:
        assert len(row.turns_ms) == 2 and len(row.turns_ms[0]) >= 3
        assert row.flops and row.peak_rss_bytes and row.n_threads == 1 and row.load_s > 0
    assert found.models[0].type == "F32" and found.models[1].size_bytes < found.models[0].size_bytes
    assert {verdict.model for verdict in found.verdicts} == {path.name for path in artifacts}


def test_the_command_shows_and_writes(artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    arguments = ["bench", *map(str, artifacts), "-r", "1", "-t", "1", "--profile", "--no-probe"]
    done = _edgekit(*arguments, "--out", str(out), "--out", str(tmp_path / "r.png"))
    assert done.returncode == 0, done.stderr
    assert "p95" in done.stdout and "MultiHeadAttention" in done.stdout
    body = json.loads(out.read_text())
    operators = [row for row in body["operators"] if row["model"] == artifacts[0].name]
    assert sum(row["share"] for row in operators) == pytest.approx(1)
    assert {"Conv", "MultiHeadAttention"} <= {row["operator"] for row in operators}
    assert (tmp_path / "r.png").stat().st_size > 5000


def test_what_does_not_hold_is_one_clear_line(artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    path = str(artifacts[0])
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    for arguments, words in (
        ([path, "-p", "32"], "have no tokens"),
        ([path, str(gguf)], "no figure in common"),
        ([path, "--device", "local", "-p", "32"], "have no tokens"),
        ([path, "--batch", "5000"], "must lie between"),
    ):
        done = _edgekit("bench", *arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_a_fixed_batch_is_told(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(UsageError, match="batches of 2, not of 1"):
        latency(tmp_path / "m.onnx", repetitions=1)
    assert latency(tmp_path / "m.onnx", batches=[2], repetitions=1).rows[0].batch == 2


def _edgekit(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "edgekit", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
