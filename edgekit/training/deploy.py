"""What a trained model is worth here: exported, and timed in turn with what it is compared to.

Knows exports and benches by their public functions; never how a model was trained.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from edgekit import _fs, latency, preprocess
from edgekit.bench import bench
from edgekit.exporter import export
from edgekit.training.run import Run

Fill = Callable[[Path], None]
_TURNS = 5


def figures(
    run: Run,
    models: Mapping[str, Fill],
    *,
    types: Mapping[str, str] | None = None,
    turns: int = _TURNS,
) -> dict[str, dict[str, float]]:
    """For each of ``models`` (a name, and what fills its folder): ``onnx_bytes``, and the median
    ``latency_ms`` of one input on one thread of ONNX Runtime, all models in turn. ``types`` are
    other types of the artifact than F32; each has ``turns`` of a second. Only the main process
    measures; others get nothing.
    """
    if not run.main:
        return {}
    artifacts = {}
    for name, fill in models.items():
        folder, out = run.work / f"deploy-{name}", run.work / f"deploy-{name}-onnx"
        _fs.remove_tree(folder)
        folder.mkdir(parents=True)
        fill(folder)
        kind = (types or {}).get(name, "F32")
        artifacts[name] = export(folder, "onnx", out=out, type=kind, receipt=False)
    report = latency.latency(
        *artifacts.values(), threads=(1,), repetitions=turns, probe_limits=False
    )
    found = {}
    for (name, artifact), row in zip(artifacts.items(), report.rows, strict=True):
        runs = [each for turn in row.turns_ms for each in turn]
        found[name] = {
            "onnx_bytes": float(artifact.size_bytes),
            "latency_ms": statistics.median(runs),
        }
    return found


def tower_figures(run: Run, fill: Fill) -> dict[str, float]:
    """Of a model of two encoders: ``onnx_bytes`` of both, and the median ``image_ms`` of one image
    and ``text_ms`` of one text on one thread of ONNX Runtime, in turn. Call it on the main process.
    """
    folder = run.work / "deploy"
    _fs.remove_tree(folder)
    folder.mkdir(parents=True)
    fill(folder)
    out = run.work / "deploy-onnx"
    artifact = export(folder, "onnx", out=out, type="F32", receipt=False)
    matching = preprocess.beside(artifact.model_path).matching
    assert matching is not None
    # By itself: beside its preprocessing the file stands for both encoders.
    alone = run.work / "deploy-image"
    _fs.remove_tree(alone)
    alone.mkdir()
    for path in artifact.path.glob(f"{artifact.model_path.name}*"):
        shutil.copy(path, alone)
    report = latency.latency(
        *(alone / artifact.model_path.name, artifact.path / matching.text_model),
        names=("image", "text"),
        threads=(1,),
        repetitions=_TURNS,
        probe_limits=False,
    )
    medians = {
        f"{row.model}_ms": statistics.median(each for turn in row.turns_ms for each in turn)
        for row in report.rows
    }
    return {"onnx_bytes": float(artifact.size_bytes), **medians}


def gguf_figures(run: Run, fill: Fill) -> dict[str, float]:
    """``gguf_figures_of`` one model."""
    (found,) = gguf_figures_of(run, {"model": fill}).values()
    return found


def gguf_figures_of(run: Run, models: Mapping[str, Fill]) -> dict[str, dict[str, float]]:
    """For each of ``models`` (a name, and what fills its folder): ``gguf_bytes`` of the F16 file of
    a language model, and its median ``decode_tok_s`` on one thread of llama.cpp, all models in
    turn. Call it on the main process.
    """
    artifacts = {}
    for name, fill in models.items():
        folder = run.work / "deploy"
        _fs.remove_tree(folder)
        folder.mkdir(parents=True)
        fill(folder)
        out = run.work / f"deploy-{name}-gguf"
        artifacts[name] = export(folder, "gguf", out=out, type="F16", receipt=False)
    report = bench(
        *artifacts.values(),
        names=list(artifacts),
        threads=(1,),
        prompts=(),
        answers=(64,),
        repetitions=3,
        sessions=False,
        probe=False,
    )
    return {
        name: {
            "gguf_bytes": float(artifact.size_bytes),
            "decode_tok_s": statistics.median(
                speed for row in report.rows if row.model == name for speed in row.speeds
            ),
        }
        for name, artifact in artifacts.items()
    }
