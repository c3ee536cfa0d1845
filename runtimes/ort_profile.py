"""Where ONNX Runtime spends its time: by kind of operator, from its own profiler.

Knows the profiler's file; never what the figures are shown as.
Format: https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

_RUNS = 20
_WARM_RUNS = 2
_KERNEL = "_kernel_time"


def operators(path: Path, threads: int, feed: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """(kind of operator, how many a run has, milliseconds in a run), the longest first.

    Timing every operator makes a run a little slower than it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        for _ in range(_WARM_RUNS + _RUNS):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_bytes())
    return _summed(events)


def _summed(events: list[dict[str, Any]]) -> list[tuple[str, int, float]]:
    seen: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name")).endswith(_KERNEL):
            seen.setdefault(event["name"], []).append(event["dur"] / 1e3)
    kinds = {
        event["name"]: event["args"]["op_name"] for event in events if event.get("name") in seen
    }
    found: dict[str, tuple[int, float]] = {}
    for name, times in seen.items():
        late = times[_WARM_RUNS:] or times
        count, ms = found.get(kinds[name], (0, 0.0))
        found[kinds[name]] = count + 1, ms + sum(late) / len(late)
    rows = [(kind, count, ms) for kind, (count, ms) in found.items()]
    return sorted(rows, key=lambda row: -row[2])
