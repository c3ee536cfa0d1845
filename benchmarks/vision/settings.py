"""What ONNX Runtime's own settings are worth to an artifact: bound outputs, arena, memory pattern.

Each turn runs all sides for a moment, in an order that turns; every side is an engine's session of
the same file with one setting changed. Medians of a run's time in ms, and of the ratios within a
turn (the plain run's time by the side's: above 1 the setting wins) with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit import sample_inputs
from edgekit.artifact import Artifact
from edgekit.cli.ending import ending
from edgekit.formats import onnx
from edgekit.runtime import LoadParams
from edgekit.runtimes import ort_start
from edgekit.runtimes.ort import OrtRuntime

PLAIN = "plain"


def sides(path: Path, threads: int) -> dict[str, Callable[[], Any]]:
    """What is timed: each runs one input through the model at ``path``."""
    onnx.read(path)  # edgekit's own reader sees a file before the engine does
    with OrtRuntime().load(path, LoadParams(n_threads=threads)) as session:
        feeds = sample_inputs.batch(path, session.inputs, 1)
    plain = _started(path, threads)
    names = [each.name for each in plain.get_outputs()]
    bound = _started(path, threads)
    binding = bound.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for name in names:
        binding.bind_output(name, "cpu")
    found: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: plain.run(None, feeds),
        "outputs bound": lambda: bound.run_with_iobinding(binding),
    }
    for name, setting in (
        ("no arena", "enable_cpu_mem_arena"),
        ("no memory pattern", "enable_mem_pattern"),
    ):
        other = _started(path, threads, setting)
        found[name] = lambda other=other: other.run(None, feeds)
    return found


def _started(path: Path, threads: int, off: str | None = None) -> Any:
    """A session as edgekit starts it, but for the setting ``off``."""
    options = ort_start.options_for(threads)
    if off is not None:
        setattr(options, off, False)
    return ort_start.opened(path, options, disabled_optimizers=list(ort_start.SLOW_FUSIONS))


def measure(path: Path, threads: int, turns: int, turn_s: float) -> list[dict[str, Any]]:
    """A row for each side."""
    runs = sides(Artifact.open(path).model_path, threads)
    for run in runs.values():
        _median_s(run, turn_s)
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            seconds[name].append(_median_s(runs[name], turn_s))
    return [
        {
            "artifact": path.name,
            "side": name,
            "ms": 1e3 * statistics.median(seconds[name]),
            "times_faster": statistics.quantiles(
                [a / b for a, b in zip(seconds[PLAIN], seconds[name], strict=True)], n=4
            ),
        }
        for name in names
    ]


def _median_s(run: Callable[[], Any], least_s: float) -> float:
    """Of runs that fill a moment, five at least."""
    found: list[float] = []
    ends = time.perf_counter() + least_s
    while len(found) < 5 or time.perf_counter() < ends:
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reps", type=int, default=40, help="turns of each artifact (default 40)")
    parser.add_argument("--turn-s", type=float, default=0.2, help="of a side in a turn")
    parser.add_argument("--quick", action="store_true", help="two turns: shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    arguments = parser.parse_args()
    turns = 2 if arguments.quick else arguments.reps
    rows = []
    print("| artifact | side | ms | times as fast as plain |")
    print("|---|---|---|---|")
    for path in arguments.artifacts:
        for row in measure(path.resolve(), arguments.threads, turns, arguments.turn_s):
            low, middle, high = row["times_faster"]
            told = f"{middle:.3f} ({low:.3f}..{high:.3f})"
            print(f"| {row['artifact']} | {row['side']} | {row['ms']:.2f} | {told} |", flush=True)
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    with ending():
        main()
