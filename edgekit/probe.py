"""The measured limits of this machine: how fast it reads memory, how fast it multiplies.

Knows cores, caches and the clock; never a model. numpy and the engine run in child processes only.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit import _fs, _proc, llama_library, machine, peak_loops, telemetry
from edgekit.errors import MissingExtraError, UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.report import BUSY_SHARE, BUSY_STEAL
from edgekit.runtimes import cache_file

_SILENCE_S = 60
# Many short rounds, of which the best counts: one of them is left alone even on a busy machine.
_TURNS = 6
_ROUNDS = 20
_ROUND_S = 0.005
_READ_BYTES = 8 << 20  # of one call: Python's part of it is below 1%
_LOOP_TURNS = 20_000  # of one call: 60 to 200 us
# Rows, columns and depth of products: which of them runs nearest to the peak depends on the CPU.
_SHAPES = ((192, 192, 320), (384, 384, 384), (512, 512, 512))
_LARGEST_SET_BYTES = 1 << 30
_UNKNOWN_CACHE_BYTES = 32 << 20
_TIMES_CACHE = 8
_STREAM_BYTES = 128 << 20  # of the engine's weights: packing more would take too long


@dataclass(frozen=True)
class Limit:
    """What ``n_threads`` threads together reach: bytes read per second, float32 FLOP per second."""

    n_threads: int
    read_bytes_s: float
    flops_s: float


@dataclass(frozen=True)
class KernelLimit:
    """What the engine's own product of one tensor type reaches, in FLOP per second.

    ``prefill_flops_s`` with 512 columns, ``decode_flops_s`` with one, weights in the cache;
    ``stream_flops_s`` with one, weights from memory.
    """

    type: str
    n_threads: int
    prefill_flops_s: float
    decode_flops_s: float
    stream_flops_s: float


@dataclass(frozen=True)
class OperatorLimit:
    """Seconds that a small operator of the engine's graph takes between its products: dispatch,
    barrier, and what the caches had lost.
    """

    n_threads: int
    operator_s: float


@dataclass(frozen=True)
class Limits:
    """All that was measured on ``machine``; ``busy`` says that others disturbed it."""

    machine: str
    rows: tuple[Limit, ...]
    kernels: tuple[KernelLimit, ...] = ()
    operators: tuple[OperatorLimit, ...] = ()
    busy: bool = False

    def at(self, n_threads: int) -> Limit:
        """The limits at a thread count; UsageError if it was not measured."""
        for row in self.rows:
            if row.n_threads == n_threads:
                return row
        raise UsageError(f"the limits of this machine were not measured with {n_threads} threads")

    def kernel(self, type_name: str, n_threads: int) -> KernelLimit | None:
        """The engine's product of one tensor type, if it was measured."""
        wanted = type_name, n_threads
        return next((k for k in self.kernels if (k.type, k.n_threads) == wanted), None)

    def operator_s(self, n_threads: int) -> float | None:
        """Seconds of one small operator, if they were measured."""
        return next((o.operator_s for o in self.operators if o.n_threads == n_threads), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def limits(
    threads: Sequence[int],
    *,
    types: Iterable[str] = (),
    fresh: bool = False,
    progress: Progress = no_progress,
) -> Limits:
    """The limits of this machine at each of ``threads``; the first time 1.5 s for each count.

    ``types`` ("Q4_K" and the like) asks for the engine's own products too: 2 s for each and count.
    What was measured on a quiet machine is remembered; ``fresh`` measures it again.
    Raises UsageError for no or impossible counts, MissingExtraError without numpy or the engine.
    """
    counts, names = _checked(threads), sorted(set(types))
    memory = _Memory(fresh)
    machine_key = _machine_key()
    plain = memory.complete(
        machine_key,
        {str(count): 2 for count in counts},
        lambda: _child("_measure", {"threads": counts}, "measure the machine", progress),
    )
    engine: dict[str, Any] = {}
    if names:
        engine = memory.complete(
            f"{machine_key}; llama-cpp-python {llama_library.version()}",
            {_operator_key(count): 1 for count in counts}
            | {_kernel_key(name, count): 3 for name in names for count in counts},
            lambda: _child(
                "_measure_engine",
                {"threads": counts, "types": names},
                "measure the engine",
                progress,
            ),
        )
    return Limits(
        machine=machine_key,
        rows=tuple(Limit(count, *plain[str(count)]) for count in counts),
        kernels=tuple(
            KernelLimit(name, count, *engine[_kernel_key(name, count)])
            for name in names
            for count in counts
        ),
        operators=tuple(
            OperatorLimit(count, *engine[_operator_key(count)]) for count in counts if names
        ),
        busy=memory.busy,
    )


def bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads read together, from far more than the caches hold.

    Takes about a second, and remembers nothing. Raises MissingExtraError without numpy.
    """
    return limits_now(threads).read_bytes_s


def flops(threads: int) -> float:
    """float32 FLOP per second of ``threads`` threads that multiply and add in registers.

    Where edgekit has no such loop for the CPU, of products of small matrices in numpy.
    Takes about a second, and remembers nothing. Raises MissingExtraError without numpy.
    """
    return limits_now(threads).flops_s


def limits_now(threads: int) -> Limit:
    """Both at one count of threads, measured anew."""
    (count,) = _checked([threads])
    found = _child("_measure", {"threads": [count]}, "measure the machine", no_progress)
    return Limit(count, *found["limits"][str(count)])


def _checked(threads: Sequence[int]) -> list[int]:
    counts = sorted(set(threads))
    if not counts or counts[0] < 1:
        raise UsageError("limits are measured for thread counts of 1 and more")
    return counts


class _Memory:
    """What earlier runs measured, in the user's state folder; busy measurements are not kept."""

    def __init__(self, fresh: bool) -> None:
        self._file = _fs.home("state") / "limits.json"
        self._fresh = fresh
        self.busy = False

    def complete(
        self, key: str, names: dict[str, int], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The figures kept under ``key``, measured first if they lack one of ``names``.

        ``names`` says how many figures each name has.
        """
        kept = {} if self._fresh else self._read().get(key)
        if isinstance(kept, dict) and all(_figures(kept.get(n), names[n]) for n in names):
            return kept
        answer = measure()
        if answer["busy"]:
            self.busy = True
        else:
            body = self._read()
            old = body.get(key)
            body[key] = (old if isinstance(old, dict) else {}) | answer["limits"]
            cache_file.write(self._file, json.dumps(body, indent=1).encode())
        found: dict[str, Any] = answer["limits"]
        return found

    def _read(self) -> dict[str, Any]:
        """All of the file; a missing or spoilt one counts as nothing."""
        try:
            body = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return body if isinstance(body, dict) else {}


def _figures(value: Any, count: int) -> bool:
    """Whether ``value`` is a list of so many positive numbers: the file may have been spoilt."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(type(figure) in (int, float) and figure > 0 for figure in value)
    )


def _machine_key() -> str:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return f"{machine.cpu(machine.root()).model or 'unknown CPU'}; cores {cores}"


def _kernel_key(type_name: str, n_threads: int) -> str:
    return f"{type_name} {n_threads}"


def _operator_key(n_threads: int) -> str:
    return f"operator {n_threads}"


def _child(
    function: str, arguments: dict[str, Any], stage: str, progress: Progress
) -> dict[str, Any]:
    answer: dict[str, Any] = _proc.call(
        f"edgekit.probe:{function}",
        arguments,
        silence_s=_SILENCE_S,
        what=f"the attempt to {stage}",
        on_report=lambda message: progress(stage, *message),
    )
    return answer


# In the child


def _measure(threads: list[int]) -> dict[str, Any]:
    """Both limits at every count, in turn, so that a neighbour's burst hits all alike."""
    # Before numpy comes: the threads are ours, so its BLAS must have none of its own.
    os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    try:
        import numpy as np
    except ImportError:
        raise MissingExtraError("llama", missing="numpy") from None
    loops = peak_loops.of_this_cpu()
    most = max(threads)
    data = np.ones(_set_bytes() // 4 // most * most, dtype=np.float32)

    def reader(number: int, count: int) -> Callable[[], float]:
        own = data[len(data) // count * number : len(data) // count * (number + 1)]
        step = min(_READ_BYTES // 4, len(own))
        pieces = [own[at : at + step] for at in range(0, len(own) - step + 1, step)]
        endless = itertools.cycle(pieces)

        def read() -> float:
            piece = next(endless)
            if loops is not None:
                return float(loops.read(piece.ctypes.data, piece.nbytes))
            half = len(piece) // 2  # two streams: one alone does not fill the memory's queues
            np.dot(piece[:half], piece[half : 2 * half])
            return float(piece.nbytes)

        return read

    def multiplier(_number: int, _count: int) -> Callable[[], float]:
        if loops is None:
            return _products(*_SHAPES[turn % len(_SHAPES)])
        return lambda: float(loops.multiply(_LOOP_TURNS))

    best: dict[str, list[float]] = {str(count): [0.0, 0.0] for count in threads}
    neighbours = _Neighbours()
    for turn in range(_TURNS):
        for count in threads:
            for place, worker in enumerate((reader, multiplier)):
                works = [worker(number, count) for number in range(count)]
                rate = _together(works)
                best[str(count)][place] = max(best[str(count)][place], rate)
        _proc.report([turn + 1, _TURNS])
    return {"limits": best, "busy": neighbours.disturbed()}


def _products(rows: int, columns: int, depth: int) -> Callable[[], float]:
    """numpy's product of two matrices of these sizes again and again: its FLOP at each call."""
    import numpy as np

    left = np.full((rows, depth), 0.5, dtype=np.float32)
    right = np.full((depth, columns), 0.5, dtype=np.float32)
    product = np.empty((rows, columns), dtype=np.float32)

    def multiply() -> float:
        np.dot(left, right, out=product)
        return 2.0 * rows * columns * depth

    return multiply


def _measure_engine(threads: list[int], types: list[str]) -> dict[str, Any]:
    """What the engine's own products and operators reach, under the names that are remembered."""
    from edgekit.runtimes import llama_ceiling

    neighbours = _Neighbours()
    found: dict[str, Any] = {}
    stream_bytes = min(_set_bytes(), _STREAM_BYTES)
    for done, count in enumerate(threads):
        found[_operator_key(count)] = [llama_ceiling.operator_s(count)]
        for place, name in enumerate(types):
            flops = llama_ceiling.product_flops(name, count, stream_bytes)
            found[_kernel_key(name, count)] = list(flops)
            _proc.report([done * len(types) + place + 1, len(threads) * len(types)])
    return {"limits": found, "busy": neighbours.disturbed()}


def _together(works: list[Callable[[], float]]) -> float:
    """Run each work again and again in a thread of its own: the sum of their amounts a second.

    The best of the rounds, which all threads begin together.
    """
    start = threading.Barrier(len(works))
    rates = [[0.0] * len(works) for _ in range(_ROUNDS)]

    def run(number: int) -> None:
        work = works[number]
        work()  # warm
        for round_rates in rates:
            amount = 0.0
            start.wait()
            began = time.perf_counter()
            while (spent := time.perf_counter() - began) < _ROUND_S:
                amount += work()
            round_rates[number] = amount / spent

    others = [threading.Thread(target=run, args=(number,)) for number in range(1, len(works))]
    for thread in others:
        thread.start()
    run(0)
    for thread in others:
        thread.join()
    return max(map(sum, rates))


def _set_bytes() -> int:
    """Memory to read: many times the last cache, but never more than a quarter of what is free."""
    wanted = min(_TIMES_CACHE * last_cache_bytes(machine.root()), _LARGEST_SET_BYTES)
    memory = machine.memory(machine.root())
    free = min(filter(None, (memory.available_bytes, memory.limit_bytes)), default=wanted * 4)
    return min(wanted, free // 4)


def last_cache_bytes(root: Path) -> int:
    """Bytes of the last level of cache, all its instances together, as the kernel lists them.

    32 MiB where it lists none.
    """
    found: dict[tuple[int, str], int] = {}
    for entry in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((entry / "level").read_text())
            size = (entry / "size").read_text().strip()
            shared = (entry / "shared_cpu_list").read_text()
            found[level, shared] = int(size.rstrip("KM")) << {"K": 10, "M": 20}.get(size[-1], 0)
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or _UNKNOWN_CACHE_BYTES


class _Neighbours:
    """Whether others used the machine since this was made, or a virtual machine's host took it."""

    def __init__(self) -> None:
        self._before = telemetry.counters(machine.root()), time.process_time()

    def disturbed(self) -> bool:
        before, own_s = self._before
        after = telemetry.counters(machine.root())
        strain = telemetry.strain(before, after, time.process_time() - own_s)
        return (strain.others_share or 0) > BUSY_SHARE or (strain.steal_share or 0) > BUSY_STEAL
