"""How many threads decode and prefill fastest: measured once per machine and kind of model.

Must never generate text; the measurements live in the user's state folder.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from edgekit import _fs, llama_library, machine
from edgekit.formats.gguf import GgufHeader
from edgekit.runtime import LoadParams
from edgekit.runtimes import cache_file
from edgekit.runtimes.llama_engine import Engine

_BUDGET_S = 1.0
_PREFILL_TOKENS = 64
_ROUNDS = 3
# A larger count must be this much faster: threads that gain nothing only heat the board.
_WORTH = 1.02


def known(header: GgufHeader, params: LoadParams) -> tuple[int, int] | None:
    """Threads for decode and for prefill, if the user chose or an earlier load measured them."""
    if params.n_threads is not None:
        return params.n_threads, params.n_threads
    candidates = counts()
    if len(candidates) == 1:
        return candidates[0], candidates[0]
    found = _read().get(_key(header))
    match found:
        case [int(decode), int(prefill)] if {decode, prefill} <= set(candidates):
            return decode, prefill
    return None


def first_guess() -> tuple[int, int]:
    """All physical cores: good enough to load with."""
    cores = _physical_cores(available())
    return cores, cores


def measure(engine: Engine, header: GgufHeader) -> tuple[int, int]:
    """Try each count for about a second in all, remember the fastest, and return them.

    The engine's cache must be empty, and is left empty. What was measured while others kept the
    machine busy is used, but not remembered.
    """
    busy = os.getloadavg()[0] > available()
    decode: dict[int, float] = {}
    prefill: dict[int, float] = {}
    slice_s = _BUDGET_S / len(counts()) / _ROUNDS
    deadline = time.perf_counter() + _BUDGET_S
    batch = min(_PREFILL_TOKENS, engine.n_batch, engine.n_ctx - 1)
    for turn in range(_ROUNDS):
        for count in counts():
            if turn and time.perf_counter() > deadline:
                break
            engine.set_threads(count, count)
            engine.forget(0)
            prefill[count] = min(prefill.get(count, math.inf), _seconds(engine, [0] * batch, 0))
            stop = time.perf_counter() + slice_s
            for position in range(batch, engine.n_ctx):
                decode[count] = min(decode.get(count, math.inf), _seconds(engine, [0], position))
                if time.perf_counter() > stop:
                    break
    engine.forget(0)
    best = _fastest(decode), _fastest(prefill)
    engine.set_threads(*best)
    if not busy:
        body = _read() | {_key(header): best}
        cache_file.write(_file(), json.dumps(body, indent=1).encode())
    return best


def _seconds(engine: Engine, tokens: list[int], position: int) -> float:
    started = time.perf_counter()
    engine.decode(tokens, position)
    engine.logits()
    return time.perf_counter() - started


def _fastest(seconds: dict[int, float]) -> int:
    best, *rest = sorted(seconds)
    for count in rest:
        if seconds[count] * _WORTH < seconds[best]:
            best = count
    return best


def counts() -> list[int]:
    """The counts worth trying: one, half, all, and one per physical core."""
    cores = available()
    return sorted({1, max(1, cores // 2), _physical_cores(cores), cores})


def available() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _physical_cores(limit: int) -> int:
    """Cores that share no execution units, as far as the kernel says; ``limit`` otherwise."""
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(file.read_text())
        except OSError:
            return limit
    return len(siblings) or limit


def _key(header: GgufHeader) -> str:
    """Machine and kind of model: what a count of threads depends on."""
    size_class = round(math.log2(max(1, header.parameters)))
    parts = [
        machine.cpu(machine.root()).model or "unknown CPU",
        f"{available()} cores",
        llama_library.backend_file() or "fixed backend",
        header.architecture,
        header.main_type(),
        f"2^{size_class} weights",
    ]
    return "; ".join(parts)


def _file() -> Path:
    return _fs.home("state") / "threads.json"


def _read() -> dict[str, object]:
    """What was measured so far; a missing or spoilt file counts as nothing."""
    try:
        body = json.loads(_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
