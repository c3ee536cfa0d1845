"""How many threads run a graph fastest on this machine: measured once, and remembered.

Knows counts, clocks and made-up inputs; an engine brings the run that is timed.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgekit import _fs, machine
from edgekit.formats import onnx, tflite
from edgekit.runtime import TensorSpec
from edgekit.runtimes import cache_file

_TRIAL_S = 0.2  # for each count of threads
_TRIAL_RUNS = 3
_WORTH = 1.05  # so much faster must a larger count be
_FREE_SIZE = 16  # of a free axis while threads are measured
_FILE = "graph-threads.json"

# Runs zeros with so many threads: seconds of the fastest run, None where the graph takes none.
Trial = Callable[[int], float | None]


def fastest(header: onnx.OnnxHeader | tflite.TfliteHeader, engine: str, trial: Trial) -> int:
    """The count for this kind of graph; ``engine`` is its name and version."""
    counts = sorted({1, max(1, cores() // 2), cores()})
    if len(counts) == 1:
        return counts[0]
    file, key = _fs.home("state") / _FILE, _key(header, engine)
    try:
        known = json.loads(file.read_bytes())
        if known.get(key) in counts:
            return int(known[key])
    except (OSError, ValueError, AttributeError):
        known = {}
    busy = os.getloadavg()[0] > cores()
    best, best_s = counts[0], math.inf
    for count in counts:
        seconds = trial(count)
        if seconds is None:
            return counts[-1]
        if seconds * _WORTH < best_s:
            best, best_s = count, seconds
    if not busy:
        cache_file.write(file, json.dumps(known | {key: best}, indent=1).encode())
    return best


def zeros(inputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """An array for each input: one item, and a short axis where the graph leaves it open."""
    return {
        spec.name: np.zeros(
            [
                n if isinstance(n, int) else _FREE_SIZE if axis else 1
                for axis, n in enumerate(spec.shape)
            ],
            spec.dtype,
        )
        for spec in inputs
    }


def timed(run: Callable[[], Any]) -> float | None:
    """Seconds of the fastest of some runs; None where the engine refuses to run."""
    best, ends = math.inf, time.perf_counter() + _TRIAL_S
    for turn in range(1 << 20):
        started = time.perf_counter()
        try:
            run()
        except Exception:  # other shapes than these are needed: nothing can be measured
            return None
        now = time.perf_counter()
        best = min(best, now - started)
        if now > ends and turn >= _TRIAL_RUNS:
            break
    return best


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def _key(header: onnx.OnnxHeader | tflite.TfliteHeader, engine: str) -> str:
    """Machine, engine and kind of graph: what a count of threads depends on."""
    if isinstance(header, onnx.OnnxHeader):
        nodes = len(header.nodes)
        types = {tensor.dtype for tensor in header.initializers if len(tensor.shape) > 1}
    else:
        nodes = len(header.main.operators)
        types = {tensor.dtype for tensor in header.constants if len(tensor.shape) > 1}
    parts = [
        machine.cpu(machine.root()).model or "unknown CPU",
        f"{cores()} cores",
        engine,
        f"{nodes} nodes",
        f"{header.parameters} weights",
        " ".join(sorted(types)),
    ]
    return "; ".join(parts)
