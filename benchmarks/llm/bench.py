"""``edgekit bench`` against llama-bench in one run, and what its own loop costs.

Both sides take the same file, threads, batch sizes and repetitions, in turn, as whole commands; a
ratio compares the two of one turn. The loop's own cost is measured apart: the same decode loop
with a C function in the engine's place that does nothing, against a real step.
"""

from __future__ import annotations

import ctypes
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import measure
import peers

from edgekit import _proc
from edgekit.cli.ending import ending
from edgekit.registry import RUNTIMES

TARGET_DIFFERENCE = 0.03
TARGET_OVERHEAD = 0.01
_CHILD_TIMEOUT_S = 3600
_STEPS = 200


@dataclass(frozen=True)
class Work:
    """Tokens that are read and generated, and repetitions inside one turn."""

    prompt: int = 512
    answer: int = 128
    repetitions: int = 2  # few, and more turns: neighbours come and go in seconds


@dataclass
class Speeds:
    """tok/s of one test, a figure for each turn."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)


def speeds(
    tools: peers.Tools, models: dict[str, Path], work: Work, reps: int, threads: int
) -> dict[str, dict[str, Speeds]]:
    """type -> test ("prefill", "decode") -> figures of both sides."""
    found = {kind: {"prefill": Speeds(), "decode": Speeds()} for kind in models}
    numbers: list[str | int] = ["-t", threads, "-r", work.repetitions]
    numbers += ["-p", work.prompt, "-n", work.answer]

    def ours(kind: str) -> None:
        options = [*map(str, numbers), "--no-session", "--no-probe", "--json"]
        done = measure.run(peers.edgekit("bench", models[kind], *options))
        for row in json.loads(done.stdout)["rows"]:
            test = "prefill" if row["n_prompt"] else "decode"
            found[kind][test].ours.append(row["summary"]["tok_s"])

    def theirs(kind: str) -> None:
        for row in tools.bench(models[kind], *numbers, "-fa", 1):
            test = "prefill" if row["n_prompt"] else "decode"
            found[kind][test].theirs.append(row["avg_ts"])

    for kind in models:
        measure.say(f"against llama-bench: {kind}")
        measure.in_turn(reps, partial(ours, kind), partial(theirs, kind))
    return found


def overhead(models: dict[str, Path], threads: int) -> dict[str, tuple[float, float]]:
    """type -> microseconds of a step (of the loop alone, with the engine)."""
    found = {}
    for kind, path in models.items():
        measure.say(f"the loop itself: {kind}")
        answer = _proc.call(
            "bench:loop",
            {"path": str(path), "threads": threads},
            timeout_s=_CHILD_TIMEOUT_S,
            what="the decode loop",
        )
        found[kind] = (answer["empty_us"], answer["full_us"])
    return found


def loop(path: str, threads: int) -> dict[str, float]:
    """In a child: medians of a step's microseconds, without the engine and with it."""
    with RUNTIMES.load("llamacpp")().bencher(Path(path), n_ctx=2 * _STEPS, threads=threads) as real:
        real.decode(8)
        full = real.decode(_STEPS)
        real.stand_at(0)
        real._engine._llama = _Idle(real._engine._llama)
        empty = real.decode(_STEPS)
        real._engine._llama = real._engine._llama.real
        return {
            "empty_us": 1e6 * statistics.median(empty),
            "full_us": 1e6 * statistics.median(full),
        }


class _Idle:
    """The engine's library with a decode that takes the same arguments and does nothing."""

    def __init__(self, real: Any) -> None:
        self.real = real
        # Answers False and looks at no argument: only the call itself is left.
        self.llama_decode = real._lib["llama_supports_rpc"]
        self.llama_decode.argtypes = real.llama_decode.argtypes
        self.llama_decode.restype = ctypes.c_bool
        self.llama_synchronize = real._lib["llama_supports_rpc"]
        self.llama_synchronize.argtypes = real.llama_synchronize.argtypes
        self.llama_synchronize.restype = ctypes.c_bool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def _speed_rows(found: dict[str, dict[str, Speeds]]) -> Iterator[list[object]]:
    for kind, tests in found.items():
        for test, figures in tests.items():
            ratio = measure.ratios(figures.ours, figures.theirs)
            low, high = measure.median_interval(
                [ours / theirs for ours, theirs in zip(figures.ours, figures.theirs, strict=True)]
            )
            yield [
                kind,
                test,
                f"{statistics.median(figures.theirs):.1f}",
                f"{statistics.median(figures.ours):.1f}",
                ratio,
                f"{low:.3f}..{high:.3f}",
                _within(ratio.median, low, high) if test == "decode" else "-",
            ]


def _within(median: float, low: float, high: float) -> str:
    """Whether the median is as near as it must be, and whether that is certain."""
    near = abs(median - 1) <= TARGET_DIFFERENCE
    inside = low >= 1 - TARGET_DIFFERENCE and high <= 1 + TARGET_DIFFERENCE
    outside = high < 1 - TARGET_DIFFERENCE or low > 1 + TARGET_DIFFERENCE
    return ("yes" if near else "no") + ("" if inside or outside else ", not certain")


def main() -> None:
    """Print the two tables."""
    parser = measure.parser(__doc__, reps=20)
    parser.add_argument("--types", default=",".join(peers.TYPES), metavar="A,B")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": measure.describe_machine()}
    scratch = measure.scratch(arguments)
    tools = peers.find_tools(arguments.tools)
    quick = arguments.quick
    work = Work(prompt=32, answer=8, repetitions=1) if quick else Work()
    kinds = ["Q4_0"] if quick else arguments.types.split(",")
    models = {kind: peers.quantized(tools, scratch, kind) for kind in kinds}
    reps, threads = (1 if quick else arguments.reps), arguments.threads

    found = speeds(tools, models, work, reps, threads)
    measure.table(
        f"-t {threads} -p {work.prompt} -n {work.answer} -r {work.repetitions} -fa 1"
        f" (medians of {reps} turns)",
        [
            *("type", "test", "llama-bench tok/s", "edgekit bench tok/s", "edgekit / llama-bench"),
            "median, 95% sure",
            f"decode within {TARGET_DIFFERENCE:.0%}",
        ],
        list(_speed_rows(found)),
    )
    costs = overhead(models, threads)
    measure.table(
        f"The decode loop's own cost, medians of {_STEPS} steps",
        ["type", "step, us", "of it the loop, us", "share", f"below {TARGET_OVERHEAD:.0%}"],
        [
            [
                kind,
                f"{full:.0f}",
                f"{empty:.1f}",
                f"{empty / full:.3%}",
                "yes" if empty < TARGET_OVERHEAD * full else "no",
            ]
            for kind, (empty, full) in costs.items()
        ],
    )
    measure.finish(arguments, figures | {"speeds": found, "loop_us": costs})


if __name__ == "__main__":
    with ending():
        main()
