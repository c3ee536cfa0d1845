"""OpenVINO beside ONNX Runtime: the same answers, batches too, and a quick second load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_torch

from edgekit import _fs
from edgekit.errors import UsageError
from edgekit.exporter import export
from edgekit.latency import latency
from edgekit.registry import RUNTIMES
from edgekit.runtime import load
from edgekit.runtimes import compiled_cache

pytestmark = pytest.mark.skipif(not RUNTIMES.installed("openvino"), reason="openvino is missing")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ViT in the types that OpenVINO has kernels for."""
    folder = tmp_path_factory.mktemp("openvino")
    tiny_torch.vit_folder(folder / "vit")
    return {
        kind: export(folder / "vit", "onnx", type=kind, out=folder / kind, receipt=False).path
        for kind in ("F32", "static_wi8_ai8", "weight_only_wi8_afp32")
    }


def _images(count: int) -> dict[str, Any]:
    side = tiny_torch.SIDE
    images = np.random.default_rng(0).standard_normal((count, 3, side, side), np.float32)
    return {"pixel_values": images}


@pytest.mark.parametrize(
    ("kind", "least"),
    [("F32", 0.99999), ("static_wi8_ai8", 0.995), ("weight_only_wi8_afp32", 0.995)],
)
@pytest.mark.parametrize("count", [1, 3])
def test_both_engines_answer_alike(
    vit: dict[str, Path], kind: str, least: float, count: int
) -> None:
    answers = []
    for runtime in ("ort", "openvino"):
        with load(vit[kind], runtime=runtime, n_threads=1) as session:
            (found,) = session.run(_images(count)).values()
            again = next(iter(session.run(_images(count)).values()))
        assert found.shape == (count, len(tiny_torch.LABELS))
        assert np.allclose(found, again)
        answers.append(found.ravel())
    one, other = answers
    assert float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)) > least


def test_an_answer_is_the_callers_own(vit: dict[str, Path]) -> None:
    with load(vit["F32"], runtime="openvino", n_threads=1) as session:
        first = next(iter(session.run(_images(1)).values()))
        kept = first.copy()
        session.run({"pixel_values": -_images(1)["pixel_values"]})
    assert np.array_equal(first, kept)


def test_a_later_load_takes_the_compiled_model_and_survives_a_broken_one(
    vit: dict[str, Path], home: Path
) -> None:
    with load(vit["F32"], runtime="openvino", n_threads=1) as session:
        wanted = next(iter(session.run(_images(1)).values()))
    (entry,) = (home / "cache" / "compiled").iterdir()
    assert compiled_cache.find(entry.name) == entry
    compiled_cache.keep(
        entry.name, lambda folder: _fs.write_atomic(folder / "model.blob", b"no model")
    )
    with load(vit["F32"], runtime="openvino", n_threads=1) as session:
        assert np.allclose(next(iter(session.run(_images(1)).values())), wanted)


def test_bench_rows_name_the_runtime(vit: dict[str, Path]) -> None:
    found = latency(
        vit["F32"],
        runtimes=["ort", "openvino"],
        threads=[1],
        repetitions=1,
        probe_limits=False,
        profile=True,
    )
    assert [row.runtime for row in found.rows] == ["ort", "openvino"]
    assert (found.engine.name, *(each.name for each in found.other_engines)) == ("ort", "openvino")
    with pytest.raises(UsageError, match="opnvino"):
        latency(vit["F32"], runtimes=["opnvino"])
