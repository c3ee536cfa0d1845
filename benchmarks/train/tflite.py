"""The TFLite files of a run of vit-qat beside the network that torch computes, on all test images.

    benchmarks/train/tflite.py RUN [--data fashion-mnist]

Every file is exported anew. Intervals are of 95%, from a paired bootstrap over the images; the time
is the median of an image on one thread, all files in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

import edgekit
from edgekit import network_folder
from edgekit.cli.ending import ending
from edgekit.exporters import torch_model
from edgekit.source import source
from edgekit.training import bootstrap, images

TYPES = ("F32", "weight_only_wi4_afp32", "dynamic_wi4_afp32")
_TURNS, _IMAGES = 20, 100


def main() -> None:
    """Export, ask, and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", default="fashion-mnist")
    given = parser.parse_args()
    channels, side, _ = network_folder.read(given.run).input_shape[1:]
    data = images.load(given.data, side=side, channels=channels)
    pixels, classes = data.normalized(data.test.pixels), data.test.classes.numpy()
    module = torch_model.build(source(str(given.run))).module
    with torch.no_grad():
        wanted = np.concatenate([module(part)[0].numpy() for part in pixels.split(500)])
    feeds = [{"image": row[None]} for row in pixels.numpy()]
    right = (wanted.argmax(1) == classes).astype(float)
    print("| | right | less torch, points | same class as torch | kB | ms |")
    print("|---|---|---|---|---|---|")
    print(f"| torch | {right.sum():,.0f} | | | | |")
    with tempfile.TemporaryDirectory() as work, ExitStack() as opened:
        files, sessions = {}, {}
        for kind in TYPES:
            made = edgekit.export(
                *(given.run, "tflite"), type=kind, out=Path(work) / kind, receipt=False
            )
            files[kind] = made.model_path.stat().st_size
            sessions[kind] = opened.enter_context(edgekit.load(made, n_threads=1))
        times: dict[str, list[float]] = {kind: [] for kind in TYPES}
        for turn in range(_TURNS):
            for kind in TYPES if turn % 2 else TYPES[::-1]:
                started = time.perf_counter()
                for feed in feeds[:_IMAGES]:
                    sessions[kind].run(feed)
                times[kind].append((time.perf_counter() - started) / _IMAGES)
        for kind in TYPES:
            found = np.concatenate([next(iter(sessions[kind].run(f).values())) for f in feeds])
            mine = (found.argmax(1) == classes).astype(float)
            less = bootstrap.paired(mine.tolist(), right.tolist())
            print(
                f"| `{kind}` | {mine.sum():,.0f} | {100 * less.value:+.2f}"
                f" [{100 * less.low:+.2f}, {100 * less.high:+.2f}]"
                f" | {(found.argmax(1) == wanted.argmax(1)).mean():.2%}"
                f" | {files[kind] / 1e3:,.0f} | {1e3 * statistics.median(times[kind]):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    with ending():
        main()
