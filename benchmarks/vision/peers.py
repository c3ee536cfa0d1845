"""Artifacts of edgekit against OpenVINO (float32, and int8 by NNCF's defaults) on the same inputs.

    benchmarks/vision/peers.py FLOAT_ARTIFACT ARTIFACT... [--peer-python PATH]

The peer runs in an environment of its own, which is made in the scratch folder unless
``--peer-python`` names one. It is given the float artifact's graph, calibrated on the inputs that
edgekit calibrates on, and judged on those that edgekit's receipt is judged on. All sides take turns
of a second; ratios compare turns beside each other. Agreement is with the float graph.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import edgekit
from edgekit import intervals, sample_inputs
from edgekit.artifact import Artifact
from edgekit.preprocess import beside
from edgekit.runtimes import pooling

PACKAGES = ("openvino==2026.4.1", "nncf==3.4.0")
_SIDE = Path(__file__).parent / "openvino_side.py"
_SAMPLES = 128


class Ours:
    """An artifact, in this process."""

    def __init__(self, path: Path, threads: int, samples: list[dict[str, Any]]) -> None:
        self.name = f"edgekit {path.name}"
        self.bytes = Artifact.open(path).model_path.stat().st_size
        self._session = edgekit.load(path, n_threads=threads)
        self._feed = samples[0]
        first = self._session.outputs[0].name
        self.answers = [self._session.run(feed)[first] for feed in samples]

    def turn(self, seconds: float) -> list[float]:
        """Seconds of each run."""
        runs: list[float] = []
        ends = time.perf_counter() + seconds
        while (started := time.perf_counter()) < ends:
            self._session.run(self._feed)
            runs.append(time.perf_counter() - started)
        return runs


class Peer:
    """OpenVINO, in a process of its own environment."""

    def __init__(self, python: Path, kind: str, files: Sequence[Path], options: list[str]) -> None:
        model, calibration, held_out, out = files
        self.name = f"OpenVINO {kind}"
        threads, family = options
        argv = [python, _SIDE, model, calibration, held_out, threads, kind, family, out]
        self._process = subprocess.Popen(
            [str(part) for part in argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        while (line := self._line()) != "ready":
            if not line and self._process.poll() is not None:
                raise SystemExit("OpenVINO's side ended early")
        with np.load(f"{out}.npz") as stored:
            self.answers = [stored[name] for name in stored.files]
        weights = Path(f"{out}.bin")
        self.bytes = (weights if weights.exists() else model).stat().st_size

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def turn(self, seconds: float) -> list[float]:
        """Seconds of each run."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        found: list[float] = json.loads(self._line())
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def environment(scratch: Path) -> Path:
    """The interpreter of an environment with the peer."""
    folder = scratch / "openvino-environment"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        (folder / "complete").touch()
    return python


def inputs(reference: Path, part: Any, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Inputs as edgekit's receipt and calibration take them, and the file that has them all.

    Texts are cut and padded to one length, which a stacked array needs.
    """
    model = Artifact.open(reference).model_path
    steps = beside(model)
    with edgekit.load(reference) as session:
        specs = session.inputs
    found = sample_inputs.samples(
        steps, specs, folder=reference, data=None, count=_SAMPLES, part=part
    ).feeds
    if steps.text:
        found = [feed for feed in found if next(iter(feed.values())).shape[1] >= 2]
        length = 64
        found = [{n: _to_length(v, length) for n, v in feed.items()} for feed in found]
    path = folder / f"{part}.npz"
    np.savez(path, **{name: np.stack([feed[name] for feed in found]) for name in found[0]})
    return path, found


def _to_length(values: Any, length: int) -> Any:
    """Cut, or padded with zeros: the id of padding, and no attention."""
    return np.pad(values[:, :length], ((0, 0), (0, max(0, length - values.shape[1]))))


def agreement(side: Any, truth: Any, samples: list[dict[str, Any]], model: Path) -> dict[str, Any]:
    """Mean cosine, and the share of equal top classes or equal nearest neighbours."""
    steps = beside(model)
    mine, theirs = (_vectors(each.answers, samples, steps) for each in (side, truth))
    cosines = (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
    sort = _nearest if steps.text else _top
    same = sort(mine) == sort(theirs)
    return {"cosine": float(cosines.mean()), "same": float(same.mean())}


def _vectors(answers: list[Any], samples: list[dict[str, Any]], steps: Any) -> Any:
    rows = []
    for answer, feed in zip(answers, samples, strict=True):
        row = pooling.vectors(answer, feed, steps) if steps.text else answer
        rows.append(np.asarray(row, np.float64).reshape(-1))
    return np.stack(rows)


def _top(vectors: Any) -> Any:
    return vectors.argmax(1)


def _nearest(vectors: Any) -> Any:
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = units @ units.T
    np.fill_diagonal(alike, -1)
    return alike.argmax(1)


def main() -> None:
    """Measure, and print one table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path, metavar="ARTIFACT")
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    python = options.peer_python or environment(options.scratch)
    reference = options.artifacts[0]
    model = Artifact.open(reference).model_path
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        calibration, _ = inputs(reference, "calibration", folder)
        held_out, samples = inputs(reference, "held-out", folder)
        ours = [Ours(path, options.threads, samples) for path in options.artifacts]
        family = "transformer" if beside(model).text or _has_attention(model) else "cnn"
        peers = [
            Peer(
                python,
                kind,
                (model, calibration, held_out, folder / kind),
                [str(options.threads), family],
            )
            for kind in ("f32", "int8")
        ]
        sides: list[Any] = [*ours, *peers]
        seconds: list[list[float]] = [[] for _ in sides]
        for turn in range(options.turns):
            order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
            for number in order:
                seconds[number].append(statistics.median(sides[number].turn(1.0)))
        for peer in peers:
            peer.close()
    rows = []
    best = min(seconds[len(ours) :], key=statistics.median)
    for side, times in zip(sides, seconds, strict=True):
        ratio = intervals.mean([mine / other for mine, other in zip(times, best, strict=True)])
        row = {"side": side.name, "MB": side.bytes / 1e6, "ms": 1e3 * statistics.median(times)}
        row |= {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
        rows.append(row | agreement(side, ours[0], samples, model))
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        return
    what = "same neighbour" if beside(model).text else "same class"
    print(
        f"\n| side | MB | ms | against the best peer | cosine | {what} |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
        ends = f"{row['cosine']:.4f} | {row['same']:.1%} |"
        print(f"| {row['side']} | {row['MB']:.1f} | {row['ms']:.2f} | {ratio} | {ends}")


def _has_attention(model: Path) -> bool:
    from edgekit.formats import onnx

    return any(node.op_type in ("MultiHeadAttention", "Softmax") for node in onnx.read(model).nodes)


if __name__ == "__main__":
    main()
