"""Pruning and quantization in one picture: accuracy over latency of several trained networks, each
as float32 and in 8 bits, exported by edgekit and run by ONNX Runtime on one thread.

    python benchmarks/train/front_prune.py --out front.png NAME=FOLDER...

The folders are those of ``edgekit train`` (prune leaves the uncut network in ``unpruned``).
Accuracy is that of the exported file on the whole test set of --data, with its interval of 95%;
latency is measured here, all files in turn. The 8-bit files are calibrated on 64 training images.
A row is on the front when no file that is as fast or faster is right as often.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

import edgekit
from edgekit import intervals, latency, plot
from edgekit.artifact import Artifact
from edgekit.cli.ending import ending
from edgekit.training import images
from edgekit.training.images import Labelled

TYPES = {"F32": ("float32", "o"), "static_wi8_ai8": ("8 bits", "s")}  # words, and a marker
SAMPLES, BATCH = 64, 500


@dataclass(frozen=True)
class Row:
    """A file: its network and type, a median latency, and its share of right answers."""

    network: str
    type: str
    size_bytes: int
    ms: float
    accuracy: intervals.Interval


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    words.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    words.add_argument("--data", default="fashion-mnist")
    words.add_argument("--side", type=int, default=32, help="of a folder's images")
    words.add_argument("--channels", type=int, default=3, help="of a folder's images")
    words.add_argument("--out", type=Path, required=True, help=".png or .svg")
    words.add_argument("--json", action="store_true", help="print rows as JSON")
    given = words.parse_args()
    if wrong := [pair for pair in given.folders if "=" not in pair]:
        words.error(f"{wrong[0]!r} is not NAME=FOLDER")
    folders = dict(pair.split("=", 1) for pair in given.folders)
    data = images.load(given.data, side=given.side, channels=given.channels)
    with tempfile.TemporaryDirectory() as work:
        rows = measured(folders, data, Path(work))
    draw(given.out, rows)
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print("| network | type | bytes | ms | times as fast | accuracy | front |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        share = row.accuracy
        print(
            f"| {row.network} | {TYPES[row.type][0]} | {row.size_bytes:,} | {row.ms:.3f}"
            f" | {rows[0].ms / row.ms:.2f} | {share.value:.2%} [{share.low:.2%}, {share.high:.2%}]"
            f" | {'yes' if row in front(rows) else ''} |"
        )


def measured(folders: dict[str, str], data: Labelled, work: Path) -> list[Row]:
    """Every network in every type: exported, timed in turns, and judged."""
    calibration = samples(work / "samples", data)
    artifacts = {}
    for name, folder in folders.items():
        for kind in TYPES:
            more = {} if kind == "F32" else {"calibration": str(calibration)}
            out = work / f"{name}-{kind}"
            artifacts[name, kind] = edgekit.export(
                folder, "onnx", type=kind, out=out, receipt=False, **more
            )
    report = latency.latency(
        *artifacts.values(),
        threads=(1,),
        probe_limits=False,
        names=[f"{name} {kind}" for name, kind in artifacts],
    )
    rows = []
    for (key, artifact), timed in zip(artifacts.items(), report.rows, strict=True):
        ms = statistics.median(ms for turn in timed.turns_ms for ms in turn)
        share = intervals.proportion(right(artifact, data), len(data.test))
        rows.append(Row(*key, artifact.size_bytes, ms, share))
    return rows


def samples(folder: Path, data: Labelled) -> Path:
    """Training images, spread over the set, as files."""
    folder.mkdir()
    for number in torch.linspace(0, len(data.train) - 1, SAMPLES).long().tolist():
        pixels = data.train.pixels[number].permute(1, 2, 0).squeeze(-1).numpy()
        Image.fromarray(pixels).save(folder / f"{number:06}.png")
    return folder


def right(artifact: Artifact, data: Labelled) -> int:
    """How many test images the file classifies rightly."""
    hits = 0
    with edgekit.load(artifact) as model:
        (name,) = [each.name for each in model.inputs]
        for start in range(0, len(data.test), BATCH):
            inputs = data.normalized(data.test.pixels[start : start + BATCH]).numpy()
            (logits,) = model.run({name: inputs}).values()
            classes = data.test.classes[start : start + BATCH].numpy()
            hits += int((logits.argmax(1) == classes).sum())
    return hits


def front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in one and equals in the other, fastest first."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.ms, -row.accuracy.value)):
        if not found or row.accuracy.value > found[-1].accuracy.value:
            found.append(row)
    return found


def draw(path: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row.network for row in rows))
    with plot.figure(path) as figure:
        axes = figure.add_subplot()
        for row in rows:
            share, (kind, marker) = row.accuracy, TYPES[row.type]
            axes.errorbar(
                row.ms,
                100 * share.value,
                yerr=[[100 * (share.value - share.low)], [100 * (share.high - share.value)]],
                marker=marker,
                markersize=7,
                markerfacecolor=None if row.type == "F32" else "white",
                color=plot.COLOURS[names.index(row.network) % len(plot.COLOURS)],
                linewidth=0.8,
                linestyle="none",
                label=f"{row.network}, {kind}",
            )
        best = [(row.ms, 100 * row.accuracy.value) for row in front(rows)]
        axes.plot(*zip(*best, strict=True), color="#999999", linewidth=1, zorder=0, label="front")
        axes.set_xlabel("latency of one image on one thread of ONNX Runtime, ms")
        axes.set_ylabel("test accuracy, %")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


if __name__ == "__main__":
    with ending():
        main()
