"""Where OpenVINO spends its time: by kind of operator and the bits it computes in.

Knows the engine's own counters; never what the figures are shown as.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.formats import onnx
from edgekit.runtimes import openvino

_RUNS = 20
_WARM_RUNS = 2


def operators(path: Path, threads: int, feed: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """(kind of operator, how many a run has, milliseconds in a run), the longest first.

    A kind is the engine's node and its kernel: ``FullyConnected brgemm_avx512_I8``. Timing every
    operator makes a run a little slower than it is.
    """
    graph = openvino.Graph(path, onnx.read(path), "")
    one = graph.takes_images and all(len(value) == 1 for value in feed.values())
    compiled = graph.compiled(threads, one_image=one, more={"PERF_COUNT": True})
    request = compiled.create_infer_request()
    found: dict[str, tuple[int, float]] = {}
    for number in range(_WARM_RUNS + _RUNS):
        request.infer(dict(feed))
        if number < _WARM_RUNS:
            continue
        for node in request.profiling_info:
            if "EXECUTED" not in str(node.status):
                continue
            kind = f"{node.node_type} {node.exec_type}"
            count, ms = found.get(kind, (0, 0.0))
            found[kind] = count + 1, ms + node.real_time.total_seconds() * 1e3
    rows = [(kind, count // _RUNS, ms / _RUNS) for kind, (count, ms) in found.items()]
    return sorted(rows, key=lambda row: -row[2])
