"""edgekit's probes against a C program, at one thread and at all: bytes and FLOP per second.

    .venv/bin/python benchmarks/probe/run.py

Compiles probe.c with gcc -O3 -march=native in a temporary folder, with few streams to read and with
many (the faster one counts), lets both sides measure in turn, and prints the ratio of their
figures: the median and range of the rounds, and that of both bests.
The goal is a median of 0.90 to 1.10. On a busy machine it says so, and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgekit import _proc, machine, probe
from edgekit.errors import EdgekitError

SOURCE = Path(__file__).with_name("probe.c")
_FLAGS = ("-O3", "-march=native", "-pthread")
_STREAMS = (3, 6)  # places that are read side by side
_C_SECONDS = 0.6
_TIMEOUT_S = 120
_GOAL = 0.10


def _compile(folder: Path) -> list[Path]:
    """The program, once for each count of streams."""
    programs = [folder / f"probe-{streams}" for streams in _STREAMS]
    for streams, program in zip(_STREAMS, programs, strict=True):
        argv = ["gcc", *_FLAGS, f"-DSTREAMS={streams}", str(SOURCE), "-o", str(program)]
        _proc.run(argv, timeout_s=_TIMEOUT_S)
    return programs


def _c_rate(programs: list[Path], kind: str, threads: int) -> float:
    """The best that C reaches; multiplying is the same in all of them."""
    words = [kind, str(threads), str(_C_SECONDS)]
    used = programs if kind == "read" else programs[:1]
    return max(float(_proc.run([str(each), *words], timeout_s=_TIMEOUT_S)) for each in used)


def _compare(programs: list[Path], threads: int, reps: int) -> dict[str, dict[str, Any]]:
    """Both kinds of figures of both sides, in turn."""
    sides: dict[str, dict[str, Any]] = {
        kind: {"edgekit": [], "c": []} for kind in ("read", "multiply")
    }
    for turn in range(reps):
        for side in ("edgekit", "c") if turn % 2 == 0 else ("c", "edgekit"):
            if side == "c":
                for kind, rates in sides.items():
                    rates["c"].append(_c_rate(programs, kind, threads))
            else:
                found = probe.limits_now(threads)
                sides["read"]["edgekit"].append(found.read_bytes_s)
                sides["multiply"]["edgekit"].append(found.flops_s)
    return sides


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reps", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--threads", default=",".join(map(str, sorted({1, cores}))))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{machine.cpu(machine.root()).model}, {cores} cores, load average {load:.2f} before\n")
    if load > 0.3:
        print("warning: the machine is busy, so these figures prove nothing", file=sys.stderr)
    figures: dict[str, Any] = {}
    ratio = "median of ratios (range; of the bests)"
    print(f"| threads | what | best of edgekit | best of C | {ratio} | within 10% |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        programs = _compile(Path(folder))
        for threads in map(int, arguments.threads.split(",")):
            for kind, rates in _compare(programs, threads, arguments.reps).items():
                ours, theirs = max(rates["edgekit"]), max(rates["c"])
                ratios = [a / b for a, b in zip(rates["edgekit"], rates["c"], strict=True)]
                median = statistics.median(ratios)
                unit = "GB/s" if kind == "read" else "GFLOP/s"
                print(
                    f"| {threads} | {kind} | {ours / 1e9:.1f} {unit} | {theirs / 1e9:.1f} {unit} |"
                    f" {median:.2f} ({min(ratios):.2f}..{max(ratios):.2f}; {ours / theirs:.2f}) |"
                    f" {'yes' if abs(median - 1) <= _GOAL else 'no'} |",
                    flush=True,
                )
                figures[f"{kind} {threads}"] = rates
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except EdgekitError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
