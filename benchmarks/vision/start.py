"""What the kept graph of ONNX Runtime's optimizer is worth at a cold start (runtimes/ort_start.py).

Each turn starts an artifact in two fresh processes, one that takes the kept graph and one that has
the optimizer work again; who begins changes. The pages of both files are dropped before each start,
as after a boot. Medians of loading alone, of the time from the start of Python to the first answer,
and of the ratios within a turn with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import edgekit
from edgekit import sample_inputs
from edgekit.artifact import Artifact
from edgekit.cli.ending import ending
from edgekit.runtimes import compiled_cache, ort_start

SIDES = ("kept", "plain")


def child(path: Path, side: str, threads: int) -> None:
    """Load, answer once, and print the seconds that loading took."""
    if side == "plain":
        ort_start.key = lambda files: ""
    started = time.perf_counter()
    with edgekit.load(path, n_threads=threads, runtime="ort") as session:
        seconds = time.perf_counter() - started
        session.run(sample_inputs.batch(Artifact.open(path).model_path, session.inputs, 1))
        print(seconds, flush=True)
        os._exit(0)


def measure(path: Path, threads: int, turns: int) -> dict[str, Any]:
    """A row of the table."""
    model = Artifact.open(path).model_path
    for side in SIDES:  # the first load in a child process, and the graph to keep
        _start(path, side, threads)
    kept = compiled_cache.find(ort_start.key([model]))
    assert kept is not None, f"nothing was kept of {path}"
    files = [model, *kept.iterdir()]
    loads: dict[str, list[float]] = {side: [] for side in SIDES}
    answers: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(turns):
        for side in SIDES if turn % 2 else SIDES[::-1]:
            for file in files:
                _drop_pages(file)
            load_s, answer_s = _start(path, side, threads)
            loads[side].append(load_s)
            answers[side].append(answer_s)
    row: dict[str, Any] = {"artifact": path.name, "size_bytes": model.stat().st_size}
    for name, found in (("load", loads), ("first_answer", answers)):
        ratios = [a / b for a, b in zip(found["plain"], found["kept"], strict=True)]
        for side in SIDES:
            row[f"{name}_{side}_ms"] = 1e3 * statistics.median(found[side])
        row[f"{name}_times_faster"] = statistics.quantiles(ratios, n=4)
    return row


def _start(path: Path, side: str, threads: int) -> tuple[float, float]:
    """Seconds of loading, and from the start of Python to the first answer."""
    words = [sys.executable, __file__, str(path), "--child", side, "--threads", str(threads)]
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout), time.perf_counter() - started


def _drop_pages(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # what is not on the disk yet cannot be dropped
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reps", type=int, default=12, help="turns of each artifact (default 12)")
    parser.add_argument("--quick", action="store_true", help="two turns: shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.artifacts[0], arguments.child, arguments.threads)
    turns = 2 if arguments.quick else arguments.reps
    rows = []
    print("| artifact | MB | load kept / again, ms | faster | first answer, ms | faster |")
    print("|---|---|---|---|---|---|")
    for path in arguments.artifacts:
        row = measure(path.resolve(), arguments.threads, turns)
        cells = [row["artifact"], f"{row['size_bytes'] / 1e6:.1f}"]
        for what in ("load", "first_answer"):
            low, middle, high = row[f"{what}_times_faster"]
            cells.append(f"{row[f'{what}_kept_ms']:.0f} / {row[f'{what}_plain_ms']:.0f}")
            cells.append(f"{middle:.2f} ({low:.2f}..{high:.2f})")
        print(f"| {' | '.join(cells)} |", flush=True)
        rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    with ending():
        main()
