"""`edgekit export --optimize-for`: variants measured, the best one kept and remembered."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_torch

from edgekit import tune
from edgekit.artifact import MANIFEST, Artifact
from edgekit.errors import ConnectError, GateError, UsageError
from edgekit.intervals import Interval
from edgekit.latency_report import LatencyRow
from edgekit.receipt import Gates, Receipt, Tuning, Variant
from edgekit.registry import RUNTIMES
from edgekit.runtime import load, runtime_of

_OPENVINO = RUNTIMES.installed("openvino")


def _variant(kind: str, runtime: str, **changed: object) -> Variant:
    whole = Interval(2.0, 1.9, 2.1)
    base = Variant(kind, runtime, 1000, 1.0, whole, 0.999, 0.99)
    return dataclasses.replace(base, **changed)  # type: ignore[arg-type]


def test_latency_takes_the_fastest_that_keeps_enough() -> None:
    variants = [
        _variant("F32", "ort", ms=5.0, size_bytes=4000, cosine=1.0),
        _variant("static_wi8_ai8", "ort", ms=1.0, why_not="cosine 0.9 is below 0.995"),
        _variant("dynamic_wi8_afp32", "openvino", ms=2.0),
        _variant("weight_only_wi4b32", "ort", ms=9.0, size_bytes=500, slower=True),
    ]
    best = tune.best(variants, "latency")
    assert best is not None and (best.type, best.runtime) == ("dynamic_wi8_afp32", "openvino")
    smallest = tune.best(variants, "size")
    assert smallest is not None and smallest.type == "weight_only_wi4b32"
    closest = tune.best(variants, "accuracy")
    assert closest is not None and closest.type == "dynamic_wi8_afp32"


def test_float_wins_where_nothing_is_faster() -> None:
    variants = [
        _variant("F32", "ort", cosine=1.0),
        _variant("dynamic_wi8_afp32", "ort", ms=3.0, slower=True),
    ]
    for goal in ("latency", "accuracy"):
        best = tune.best(variants, goal)
        assert best is not None and best.type == "F32"
    assert tune.best([_variant("F32", "ort", why_not="too large")], "latency") is None


def test_the_table_marks_the_winner_and_names_what_is_slower() -> None:
    variants = (
        _variant("F32", "ort", ms=2.0),
        _variant("static_wi8_ai8", "ort", ms=3.0, slower=True),
        _variant("static_wi8_ai8", "openvino", ms=1.0),
    )
    lines = tune.table(Tuning("latency", "openvino", 2, "CPU", variants))
    assert [line[0] for line in lines] == ["", "", "*"]
    assert [line[-1] for line in lines] == ["", "SLOWER than float", ""]


def test_a_pass_that_is_slower_on_the_board_is_left_out() -> None:
    def row(*turns_ms: float) -> LatencyRow:
        turns = tuple((each,) for each in turns_ms)
        return LatencyRow("", 1, 1, turns, 0.1, None, None, 1, None, None, None)

    whole = row(10.0, 10.1, 9.9, 10.0)
    lacking = {
        "worth": row(12.0, 12.1, 11.9, 12.0),  # without it the graph is slower
        "harmful": row(8.0, 8.1, 7.9, 8.0),
        "little": row(9.9, 10.0, 9.8, 9.9),  # surely, but only by 1%
        "noisy": row(7.0, 12.0, 7.0, 12.0),
    }
    assert tune.slower_passes(whole, lacking) == {"harmful"}


def test_a_goal_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="optimize-for"):
        tune.tune(tmp_path, "speed", out=tmp_path / "out")


def test_a_board_that_is_not_there_is_told_before_the_work(tmp_path: Path) -> None:
    vit, stages = tiny_torch.vit_folder(tmp_path / "vit"), []
    with pytest.raises(ConnectError):
        tune.tune(
            *(vit, "latency"),
            out=tmp_path / "out",
            device="nobody.invalid",
            progress=lambda stage, done, total: stages.append(stage),
        )
    assert not stages and [path.name for path in tmp_path.iterdir()] == ["vit"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("tune")
    vit = tiny_torch.vit_folder(folder / "vit")
    return tune.tune(vit, "latency", out=folder / "out", gates=Gates(min_cosine=0.9))


@pytest.mark.slow
def test_the_artifact_holds_the_table_and_loads_in_its_runtime(tuned: Artifact) -> None:
    tuning = Receipt.from_dict(tuned.receipt).tuning
    assert tuning is not None and tuning.goal == "latency"
    tried = {(each.type, each.runtime) for each in tuning.variants}
    runtimes = {"ort", "openvino"} if _OPENVINO else {"ort"}
    assert {("F32", name) for name in runtimes} <= tried
    assert {("static_wi8_ai8", name) for name in runtimes} <= tried
    best = min((v for v in tuning.variants if not v.why_not and not v.slower), key=lambda v: v.ms)
    assert (tuned.manifest.recipe.type, tuning.runtime) == (best.type, best.runtime)
    assert runtime_of(tuned) == best.runtime
    picture = np.zeros((40, 40, 3), np.uint8)
    with load(tuned) as session:
        assert len(session.classify(picture)) == 5


@pytest.mark.slow
def test_nothing_is_left_beside_it_and_gates_hold(tuned: Artifact, tmp_path: Path) -> None:
    assert sorted(path.name for path in tuned.path.parent.iterdir()) == ["out", "vit"]
    with pytest.raises(GateError, match="no variant passes"):
        tune.tune(
            tuned.path.parent / "vit", "size", out=tmp_path / "o", gates=Gates(max_size_bytes=10)
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(not _OPENVINO, reason="openvino is missing")
def test_a_manifest_names_only_runtimes_of_its_format(tmp_path: Path) -> None:
    from edgekit.exporter import export

    tuning = Tuning("latency", "openvino", 1, "CPU", (_variant("F32", "openvino"),))
    artifact = export(
        tiny_torch.vit_folder(tmp_path / "vit"),
        "onnx",
        type="F32",
        out=tmp_path / "out",
        tuning=tuning,
    )
    assert runtime_of(artifact) == "openvino"
    with load(artifact, n_threads=1) as session:
        assert type(session).__name__ == "OpenVinoSession"
    with load(artifact, n_threads=1, runtime="ort") as session:
        assert type(session).__name__ == "OrtSession"
    body = json.loads((artifact.path / MANIFEST).read_bytes())
    assert body["receipt"]["tuning"]["runtime"] == "openvino"
    stranger = dataclasses.replace(
        artifact.manifest,
        receipt=artifact.receipt | {"tuning": artifact.receipt["tuning"] | {"runtime": "echo"}},
    )
    (artifact.path / MANIFEST).write_bytes(stranger.to_bytes())
    assert runtime_of(Artifact.open(artifact.path)) == "ort"
