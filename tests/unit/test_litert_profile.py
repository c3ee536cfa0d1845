"""Times of LiteRT's kernels, from the real engine; what another version of it may tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tflite

from edgekit import latency
from edgekit.runtimes import litert_profile

WIDTH = 1024  # a product of this side takes more than a microsecond anywhere


def built(*, rows: tuple[int, int] = (1, 1)) -> tiny_tflite.Builder:
    """A matrix to multiply by; ``rows`` of the other one, as built and as any (-1)."""
    rng = np.random.default_rng(0)
    build = tiny_tflite.Builder()
    given, out = (build.tensor(name, (rows[0], WIDTH)) for name in ("given", "out"))
    for number in (given, out):
        build.graph.tensors[number].shapeSignature = [rows[1], WIDTH]
    weights = build.constant("weights", rng.normal(0, 1, (WIDTH, WIDTH)).astype(np.float32))
    bias = build.constant("bias", np.zeros(WIDTH, np.float32))
    build.operator("FULLY_CONNECTED", [given, weights, bias], [out], "FullyConnectedOptions")
    build.ends({"x": given}, {"y": out})
    return build


def feed(rows: int) -> dict[str, Any]:
    return {"x": np.ones((rows, WIDTH), np.float32)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.tflite"
    path.write_bytes(built().build())
    return path


def test_xnnpacks_kernels_are_timed(path: Path) -> None:
    # Feeds are as a user has them: of a type that is made into the graph's.
    wide = {"x": feed(1)["x"].astype(np.float64)}
    kind, count, ms = litert_profile.operators(path, 1, wide)[0]
    assert "Fully Connected" in kind and "F32" in kind and count == 1 and 0 < ms < 100


def test_a_graph_for_one_input_runs_a_batch_one_by_one(path: Path) -> None:
    _, count, _ = litert_profile.operators(path, 1, feed(3))[0]
    assert count == 3


def test_a_graph_of_any_batch_takes_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(built(rows=(1, -1)).build())
    kind, count, _ = litert_profile.operators(path, 1, feed(3))[0]
    assert "Fully Connected" in kind and count == 1


def test_a_bench_shows_them(path: Path) -> None:
    found = latency.latency(path, profile=True, probe_limits=False, repetitions=1)
    first = found.operators[0]
    assert first.operator.startswith("Fully Connected") and first.share > 0.5 and first.ms > 0
    assert not any("profile" in each for each in found.remarks)


def test_the_main_graph_is_profiled_whatever_signature_comes_first(tmp_path: Path) -> None:
    build = built()
    other = tiny_tflite.Builder()
    given, out = other.tensor("given", (1, WIDTH)), other.tensor("out", (1, WIDTH))
    other.operator("TANH", [given], [out])
    other.ends({"x": given}, {"y": out})
    other.graph.operators[0].opcodeIndex = len(build.model.operatorCodes)
    build.model.operatorCodes += other.model.operatorCodes
    build.model.subgraphs.append(other.graph)
    (second,) = other.model.signatureDefs
    second.subgraphIndex, second.signatureKey = 1, "other"
    build.model.signatureDefs.insert(0, second)
    path = tmp_path / "model.tflite"
    path.write_bytes(build.build())
    assert "Fully Connected" in litert_profile.operators(path, 1, feed(1))[0][0]


def test_numbers_without_axes_and_graphs_without_inputs_are_profiled(tmp_path: Path) -> None:
    for name in ("scalar", "none"):
        build = tiny_tflite.Builder()
        number = build.tensor("x", ()) if name == "scalar" else build.constant("x", np.float32([2]))
        wide = build.constant("wide", np.ones((256, 4096), np.float32))
        out = build.tensor("y", (256, 4096))
        build.operator("MUL", [wide, number], [out], "MulOptions")
        build.ends({"x": number} if name == "scalar" else {}, {"y": out})
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(build.build())
        given = {"x": np.float32(2)} if name == "scalar" else {}
        found = litert_profile.operators(path, 1, given)
        assert found


@pytest.mark.parametrize(
    "library", ["none", "of another version", "without a profiler", "with events of another form"]
)
def test_another_version_tells_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    if library == "none":
        monkeypatch.setattr(litert_profile.importlib.util, "find_spec", lambda _name: None)
    elif library == "of another version":
        monkeypatch.setattr(litert_profile, "version", lambda _name: "2.4.0")
    elif library == "without a profiler":
        call = litert_profile._Library.call

        def without(self: Any, name: str, *given: Any) -> None:
            call(self, name.replace("StartProfiler", "StartNothing"), *given)

        monkeypatch.setattr(litert_profile._Library, "call", without)
    else:
        monkeypatch.setattr(litert_profile, "_KINDS_OF_EVENTS", set())
    assert litert_profile.operators(path, 1, feed(1)) == []
