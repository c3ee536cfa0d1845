"""How a figure is taken and shown: child processes with their costs, ratios, tables, the machine.

Never knows what is being measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit import _fs, _proc, machine
from edgekit.errors import EdgekitError, UsageError

_SAMPLE_S = 0.05
_BUSY_LOAD = 0.3


def parser(description: str | None, reps: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``reps`` is its default number of repetitions."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="tiny settings: shows that it runs")
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    found.add_argument("--scratch", type=Path, metavar="DIR", help="models and work files, reused")
    found.add_argument("--reps", type=int, default=reps, help=f"repetitions (default {reps})")
    found.add_argument("--threads", type=int, default=cores(), help=f"default {cores()}")
    found.add_argument("--tools", type=Path, metavar="DIR", help="folder with llama-bench & co.")
    return found


def scratch(arguments: argparse.Namespace) -> Path:
    """The folder for models and work files; made if it is not there."""
    folder: Path = arguments.scratch or _fs.home("cache") / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def describe_machine() -> dict[str, Any]:
    """What the figures were taken on, printed; call it before anything heavy has run."""
    cpu = machine.cpu(machine.root())
    load = os.getloadavg()[0]
    print(f"{cpu.model or cpu.architecture}, {cores()} cores, load average {load:.2f} before\n")
    if load > _BUSY_LOAD:
        print(
            "warning: the machine is busy, so differences below 15% mean nothing", file=sys.stderr
        )
    return {"cpu": cpu.model, "features": cpu.features, "cores": cores(), "load_average": load}


@dataclass(frozen=True)
class Ran:
    """What a child process printed and cost.

    ``cpu_s`` counts all its finished descendants. ``rss_bytes`` is the most that it and its living
    descendants held at one time, shared pages counted in each; ``largest_rss_bytes`` is the high
    water mark of the largest single process. Both are sampled every 50 ms, and 0 if nobody watched.
    """

    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float
    rss_bytes: int
    largest_rss_bytes: int


def run(argv: Sequence[object], *, env: dict[str, str] | None = None, memory: bool = False) -> Ran:
    """Run a program to its end; every word of ``argv`` becomes text.

    ``memory`` watches what it holds, which takes a part of a core: a program whose threads wait for
    each other feels it, so speeds are measured without.
    Raises EdgekitError with the program's last words when it fails.
    """
    words = [str(word) for word in argv]
    name = Path(words[0]).name
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | (env or {}),
            )
        except OSError as error:
            raise EdgekitError(f"cannot start {words[0]}: {error.strerror}") from None
        watch = _Watch(process.pid)
        if memory:
            watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            wall_s = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            watch.done.set()
            if process.returncode is None:
                _proc.kill(process)
        if memory:
            watch.join()
        out.seek(0)
        err.seek(0)
        stdout, stderr = (file.read().decode("utf-8", "replace") for file in (out, err))
    if process.returncode:
        last = (stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EdgekitError(f"{name} {_proc.describe_exit(process.returncode)}: {last}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Ran(stdout, stderr, wall_s, cpu_s, watch.rss_bytes, watch.largest_rss_bytes)


class _Watch(threading.Thread):
    """Samples the memory of a process and its descendants.

    The kernel's own maximum (ru_maxrss) would not do: it starts at what the parent held.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self.done = threading.Event()
        self.rss_bytes = self.largest_rss_bytes = 0

    def run(self) -> None:
        while not self.done.wait(_SAMPLE_S):
            sizes = [held_bytes(pid) for pid in _tree(self._pid)]
            self.rss_bytes = max(self.rss_bytes, sum(now for now, _ in sizes))
            self.largest_rss_bytes = max(self.largest_rss_bytes, *(peak for _, peak in sizes))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    # A process may end between two looks at it.
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))


def held_bytes(pid: int | str = "self") -> tuple[int, int]:
    """Bytes that a process holds in RAM: now, and at most so far. Zeros when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    rows = dict(line.split(":", 1) for line in text.splitlines())
    now, most = (int(rows.get(key, "0 kB").split()[0]) << 10 for key in ("VmRSS", "VmHWM"))
    return now, most


@dataclass(frozen=True)
class Spread:
    """The median of repeated figures, and their range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}..{self.high:.3f})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one figure."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours divided by theirs, repetition by repetition: both felt the same neighbours."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Where the median of such figures lies, whatever their distribution.

    Two order statistics, chosen by the binomial distribution (Conover, Practical Nonparametric
    Statistics, section 3.2); too few figures give (-inf, inf).
    """
    ordered, count = sorted(values), len(values)
    below = 0.0  # the chance that at most ``rank`` figures lie below the median
    for rank in range(count // 2 + 1):
        below += math.comb(count, rank) / 2**count
        if below > (1 - confidence) / 2:
            return (ordered[rank - 1], ordered[-rank]) if rank else (-math.inf, math.inf)
    return ordered[0], ordered[-1]


def in_turn(reps: int, *sides: Callable[[], None]) -> None:
    """Run every side ``reps`` times, interleaved; every second round goes backwards."""
    if reps < 1:
        raise UsageError("--reps must be at least 1")
    for round_number in range(reps):
        for side in sides if round_number % 2 == 0 else reversed(sides):
            side()


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table below its title."""
    print(f"### {title}\n")
    print(f"| {' | '.join(head)} |")
    print(f"|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    print(flush=True)


def say(text: str) -> None:
    """Progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


def finish(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write every figure to ``--json``."""
    if arguments.json:
        text = json.dumps(figures, indent=1, default=asdict)
        try:
            arguments.json.write_text(text + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {arguments.json}: {error.strerror}") from None
