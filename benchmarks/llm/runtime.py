"""Decode, prefill and memory of ``edgekit.load().stream()`` against llama-bench.

Four tables: the same flags and threads on both sides; edgekit's own settings against llama-bench's
calls in the same process and context, in turns of less than a second; edgekit's automatic settings
against the best row of a sweep over llama-bench's, chosen in the other turns; peak memory while
generating. But for the second, every repetition starts fresh processes, in turn, and a ratio
compares the two of one repetition. edgekit's clock stands outside: tokenizing, sampling and text
are in its figures, and llama-bench does none of them. Neighbours on a shared machine only ever slow
a run down, so beside the median of the ratios stand the interval in which it lies with 95%
certainty, and the ratio of the fastest runs of both sides. Many short turns tell more than few long
ones: ``--prompt 128 --answer 32``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import measure
import peers

from edgekit import _proc
from edgekit.cli.ending import ending

PREFILL, DECODE, BEHIND = "prefill", "decode", "decode behind the prompt"
_TABLES = ("same", "calls", "automatic", "memory")
_HEAD = (
    "type",
    "test",
    "llama-bench tok/s",
    "edgekit / llama-bench, seen from outside",
    "median lies within",
    "fastest runs",
    "by session.last",
)
TARGET_SAME = 0.97
TARGET_AUTOMATIC = 1.0
TARGET_RSS_MIB = 60
_CHILD_TIMEOUT_S = 3600
_CALLS_A_REP = 5  # a turn of calls takes a second, one of processes ten
_MIB = 1 << 20


@dataclass(frozen=True)
class Work:
    """Tokens that are prefilled and generated, and samples that a process takes of each test."""

    prompt: int = 512
    answer: int = 128
    samples: int = 2


@dataclass
class Figures:
    """tok/s of one test on one model, a figure per repetition.

    ``seen`` is edgekit from the outside, ``own`` what its session says, ``peer`` llama-bench.
    """

    seen: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)


class Edgekit:
    """Our side: prompts made once, and a fresh process per call."""

    def __init__(self, work: Work, model: Path) -> None:
        """``model`` gives the tokenizer, which all models share."""
        self._work = work
        count = work.samples * 2 + 2  # some to spare, for answers that end early
        make = partial(_child, "prompts", model=str(model), count=count)
        self._warm_up, *self._texts = make(tokens=work.prompt)
        self._words = make(tokens=1)
        # llama-bench's contexts are no larger than the work, either.
        self.n_ctx = work.prompt + work.answer

    def speeds(
        self, model: Path, load: dict[str, Any], tests: Sequence[str]
    ) -> dict[str, tuple[float, float]]:
        """test -> tok/s (seen from the outside, said by the session); medians of the samples."""
        answer = self._run(model, load, tests, self._work.samples)
        found = {}
        for test in tests:
            # What the figures of a test are divided by: the first token comes out of the prefill.
            total, first, prompt, decode = (
                statistics.median(answer[test][key])
                for key in ("total_s", "first_s", "prompt_s", "decode_s")
            )
            steps = self._work.answer - 1
            if test == PREFILL:
                found[test] = (self._work.prompt / total, self._work.prompt / prompt)
            elif test == DECODE:
                # One word in, so every token of the answer costs one evaluation of one token.
                found[test] = (self._work.answer / total, steps / decode)
            else:
                found[test] = (steps / (total - first), steps / decode)
        return found

    def rss_bytes(self, model: Path, load: dict[str, Any]) -> int:
        """High water mark of a process that loads, prefills once and answers once."""
        return int(self._run(model, load, (BEHIND,), 1)["rss_bytes"])

    def settle(self, model: Path) -> None:
        """A first load with automatic settings: it measures this machine's threads, once."""
        self._run(model, {}, (), 1)

    def _run(
        self, model: Path, load: dict[str, Any], tests: Sequence[str], samples: int
    ) -> dict[str, Any]:
        work = self._work
        requests = {
            PREFILL: {"prompts": self._texts, "prompt_tokens": work.prompt, "max_tokens": 1},
            DECODE: {"prompts": self._words, "prompt_tokens": 1, "max_tokens": work.answer},
            BEHIND: {
                "prompts": self._texts[::-1],
                "prompt_tokens": work.prompt,
                "max_tokens": work.answer,
            },
        }
        answer: dict[str, Any] = _child(
            "tests",
            model=str(model),
            load=load,
            warm_up=self._warm_up,
            tests={test: requests[test] for test in tests},
            samples=samples,
        )
        return answer


def _child(function: str, **arguments: Any) -> Any:
    return _proc.call(
        f"session_child:{function}",
        arguments,
        timeout_s=_CHILD_TIMEOUT_S,
        what=f"edgekit's side ({function})",
    )


class LlamaBench:
    """The peer's side, in the same words."""

    def __init__(self, work: Work, tools: peers.Tools) -> None:
        self._work = work
        self._tools = tools

    def speeds(self, model: Path, *options: str | int, behind: bool = True) -> Iterator[Any]:
        """(test, setting, tok/s) for every row that ``options`` (lists of values) make."""
        work = self._work
        more = [*options, "-r", work.samples]
        rows = self._tools.bench(model, "-p", work.prompt, "-n", work.answer, *more)
        if behind:
            rows += self._tools.bench(model, "-p", 0, "-n", work.answer, "-d", work.prompt, *more)
        for row in rows:
            test = BEHIND if row["n_depth"] else PREFILL if row["n_prompt"] else DECODE
            tokens = row["n_prompt"] or row["n_gen"]
            setting = f"-t {row['n_threads']} -fa {int(row['flash_attn'])}"
            yield test, setting, tokens / statistics.median(row["samples_ns"]) * 1e9

    def rss_bytes(self, model: Path, threads: int) -> int:
        """High water mark of a process that prefills once and generates behind it."""
        work = self._work
        argv = [
            self._tools.program("llama-bench"),
            "-m",
            model,
            "-p",
            0,
            "-n",
            0,
            "-r",
            1,
            "-b",
            512,
        ]
        argv += ["-pg", f"{work.prompt},{work.answer}", "-t", threads, "-fa", 1, "-ub", 512]
        return measure.run(argv, memory=True).largest_rss_bytes


def same_settings(
    ours: Edgekit, theirs: LlamaBench, models: dict[str, Path], reps: int, threads: int
) -> dict[str, dict[str, Figures]]:
    """type -> test -> figures, with ``threads`` threads and flash attention on both sides."""
    found = {kind: {test: Figures() for test in (PREFILL, DECODE, BEHIND)} for kind in models}
    load = {"n_threads": threads, "flash_attention": True, "n_ctx": ours.n_ctx}

    def edgekit_side(kind: str) -> None:
        speeds = ours.speeds(models[kind], load, list(found[kind]))
        for test, (seen, own) in speeds.items():
            found[kind][test].seen.append(seen)
            found[kind][test].own.append(own)

    def peer_side(kind: str) -> None:
        for test, _, speed in theirs.speeds(models[kind], "-t", threads, "-fa", 1):
            found[kind][test].peer.append(speed)

    _in_turn("same settings", models, reps, edgekit_side, peer_side)
    return found


def same_calls(
    models: dict[str, Path], work: Work, load: dict[str, Any], reps: int
) -> dict[str, dict[str, Figures]]:
    """type -> test -> figures; ``peer`` are llama-bench's calls in the same process."""
    found = {}
    for kind, model in models.items():
        measure.say(f"the same calls: {kind}")
        turns = _proc.call(
            "stream_child:turns",
            {"model": str(model), "load": load, "reps": reps}
            | {"prompt": work.prompt, "answer": work.answer},
            timeout_s=_CHILD_TIMEOUT_S,
            what="a session beside its engine",
        )
        found[kind] = {
            test: Figures(seen=sides["stream"], peer=sides["engine"])
            for test, sides in turns.items()
        }
    return found


def automatic(
    ours: Edgekit, theirs: LlamaBench, models: dict[str, Path], reps: int
) -> tuple[dict[str, dict[str, Figures]], dict[str, dict[str, str]]]:
    """type -> test -> figures of edgekit without settings, and which row of the sweep won."""
    tests = (PREFILL, DECODE)
    found = {kind: {test: Figures() for test in tests} for kind in models}
    sweep: dict[str, dict[str, dict[str, list[float]]]] = {
        kind: {test: {} for test in tests} for kind in models
    }

    def edgekit_side(kind: str) -> None:
        for test, (seen, own) in ours.speeds(models[kind], {}, tests).items():
            found[kind][test].seen.append(seen)
            found[kind][test].own.append(own)

    def row_side(threads: int, flash: int, kind: str) -> None:
        rows = theirs.speeds(models[kind], "-t", threads, "-fa", flash, behind=False)
        for test, setting, speed in rows:
            sweep[kind][test].setdefault(setting, []).append(speed)

    # A process for each row: the last row of a long process finds a machine that is wide awake.
    sides: list[Any] = [
        partial(row_side, threads, flash)
        for threads in thread_counts(measure.cores())
        for flash in (0, 1)
    ]
    sides.insert(len(sides) // 2, edgekit_side)

    for model in models.values():
        ours.settle(model)
    _in_turn("automatic settings", models, reps, *sides)
    best: dict[str, dict[str, str]] = {}
    for kind, by_test in sweep.items():
        best[kind] = {}
        for test, rows in by_test.items():
            best[kind][test] = _best_row(rows)
            found[kind][test].peer = [_unseen_best(rows, turn) for turn in range(reps)]
    return found, best


def _best_row(rows: dict[str, list[float]]) -> str:
    return max(rows, key=lambda name: statistics.median(rows[name]))


def _unseen_best(rows: dict[str, list[float]], turn: int) -> float:
    """tok/s in ``turn`` of the row that is best in all the other turns.

    The best of several noisy rows looks better than it is (the winner's curse); a row that is
    chosen without the turn that it is compared in does not.
    """
    others = {name: speeds[:turn] + speeds[turn + 1 :] or speeds for name, speeds in rows.items()}
    return rows[_best_row(others)][turn]


def thread_counts(cores: int) -> list[int]:
    """Every count on a small machine; on a large one, powers of two, the half and the whole."""
    if cores <= 8:
        return list(range(1, cores + 1))
    powers = {1 << shift for shift in range(cores.bit_length())}
    return sorted(powers | {cores // 2, cores})


def memory(
    ours: Edgekit, theirs: LlamaBench, models: dict[str, Path], reps: int, threads: int
) -> dict[str, tuple[list[int], list[int]]]:
    """type -> peak resident bytes of (edgekit, llama-bench), with contexts of one size."""
    found: dict[str, tuple[list[int], list[int]]] = {kind: ([], []) for kind in models}
    load = {"n_threads": threads, "n_ctx": ours.n_ctx}

    def edgekit_side(kind: str) -> None:
        found[kind][0].append(ours.rss_bytes(models[kind], load))

    def peer_side(kind: str) -> None:
        found[kind][1].append(theirs.rss_bytes(models[kind], threads))

    _in_turn("memory", models, reps, edgekit_side, peer_side)
    return found


def _in_turn(what: str, models: dict[str, Path], reps: int, *sides: Any) -> None:
    for kind in models:
        measure.say(f"{what}: {kind}")
        measure.in_turn(reps, *(partial(side, kind) for side in sides))


def _speed_rows(
    found: dict[str, dict[str, Figures]], target: float, best: dict[str, dict[str, str]] | None
) -> Iterator[list[object]]:
    for kind, by_test in found.items():
        for test, figures in by_test.items():
            seen = measure.ratios(figures.seen, figures.peer)
            row: list[object] = [kind, test, f"{statistics.median(figures.peer):.0f}"]
            row += [best[kind][test]] if best else []
            low, high = measure.median_interval(
                [a / b for a, b in zip(figures.seen, figures.peer, strict=True)]
            )
            row += [seen, f"{low:.3f}..{high:.3f}"]
            row += [f"{max(figures.seen) / max(figures.peer):.3f}"]
            if figures.own:
                row += [measure.ratios(figures.own, figures.peer)]
            compared = test != BEHIND
            row += [("yes" if seen.median >= target else "no") if compared else "-"]
            yield row


def main() -> None:
    """Print the tables that were asked for."""
    parser = measure.parser(__doc__, reps=7)
    parser.add_argument("--types", default=",".join(peers.TYPES), metavar="A,B")
    parser.add_argument("--tables", default=",".join(_TABLES), metavar="A,B", help="which to print")
    parser.add_argument("--prompt", type=int, default=Work.prompt, metavar="TOKENS")
    parser.add_argument("--answer", type=int, default=Work.answer, metavar="TOKENS")
    arguments = parser.parse_args()
    tables = arguments.tables.split(",")
    if unknown := set(tables) - set(_TABLES):
        parser.error(f"there is no table {', '.join(sorted(unknown))}: take {', '.join(_TABLES)}")
    figures: dict[str, Any] = {"machine": measure.describe_machine()}
    scratch = measure.scratch(arguments)
    tools = peers.find_tools(arguments.tools)
    quick = arguments.quick
    work = (
        Work(prompt=32, answer=8, samples=1) if quick else Work(arguments.prompt, arguments.answer)
    )
    reps, threads = (1 if quick else arguments.reps), arguments.threads
    kinds = ["Q4_0"] if quick else arguments.types.split(",")
    models = {kind: peers.quantized(tools, scratch, kind) for kind in kinds}
    ours = Edgekit(work, next(iter(models.values())))
    theirs = LlamaBench(work, tools)

    if "same" in tables:
        same = same_settings(ours, theirs, models, reps, threads)
        _same_table(same, work, threads, reps)
        figures["same_settings"] = same
    if "calls" in tables:
        calls = same_calls(models, work, {"n_ctx": ours.n_ctx}, reps * _CALLS_A_REP)
        measure.table(
            f"The same calls in one process, edgekit's own settings, prompt {work.prompt}, answer"
            f" {work.answer} (median and range of {reps * _CALLS_A_REP})",
            [_HEAD[0], _HEAD[1], "bare calls tok/s", *_HEAD[3:6], f"at least {TARGET_SAME}"],
            list(_speed_rows(calls, TARGET_SAME, None)),
        )
        figures["same_calls"] = calls
    if "automatic" in tables:
        auto, best = automatic(ours, theirs, models, reps)
        measure.table(
            "Automatic settings against the best row of llama-bench's sweep",
            [*_HEAD[:3], "best row", *_HEAD[3:], f"at least {TARGET_AUTOMATIC:g}"],
            list(_speed_rows(auto, TARGET_AUTOMATIC, best)),
        )
        figures |= {"automatic": auto, "best_rows": best}
    if "memory" in tables:
        held = memory(ours, theirs, models, min(reps, 3), threads)
        _memory_table(held, ours.n_ctx)
        figures["rss_bytes"] = held
    measure.finish(arguments, figures)


def _same_table(same: dict[str, dict[str, Figures]], work: Work, threads: int, reps: int) -> None:
    measure.table(
        f"Same settings: -t {threads} -fa 1, prompt {work.prompt}, answer {work.answer}"
        f" (median and range of {reps})",
        [*_HEAD, f"at least {TARGET_SAME}"],
        list(_speed_rows(same, TARGET_SAME, None)),
    )


def _memory_table(held: dict[str, tuple[list[int], list[int]]], n_ctx: int) -> None:
    rows = []
    for kind, (mine, other) in held.items():
        more = (statistics.median(mine) - statistics.median(other)) / _MIB
        rows.append(
            [
                kind,
                f"{statistics.median(other) / _MIB:.0f}",
                f"{statistics.median(mine) / _MIB:.0f}",
                f"{more:+.0f}",
                measure.ratios(mine, other),
                "yes" if more <= TARGET_RSS_MIB else "no",
            ]
        )
    measure.table(
        f"Peak memory of the process, MiB, context of {n_ctx} tokens",
        ["type", "llama-bench", "edgekit", "more", "ratio", f"at most +{TARGET_RSS_MIB}"],
        rows,
    )


if __name__ == "__main__":
    with ending():
        main()
