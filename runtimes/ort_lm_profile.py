"""Where an ONNX language model's time goes: every operator timed by ONNX Runtime's own profiler, by
kind, weight and layer, for a prompt and for tokens decoded behind it.

Knows the profiler's file and the names that edgekit's graphs give their nodes; never how times are
shown. Runs in a child process, for the model may crash the engine.
Format: https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekit import _proc, language_model
from edgekit.errors import UsageError
from edgekit.formats import onnx
from edgekit.runtimes.ort_bencher import OrtBencher

_ROUNDS = 3
_BATCH = 512
_KERNEL = "_kernel_time"
_RUN = "model_run"
_LAYER = re.compile(r"(\d+)\.")
_PRODUCTS = ("MatMul", "Gemm", "MatMulNBits", "GatherBlockQuantized")

# Kind of operator, of weight, type of the weight, layer.
Key = tuple[str, str, str, int | None]


def measure(path: str, n_prompt: int, n_gen: int, threads: int) -> dict[str, Any]:
    """In the child: what ``llama_profile.measure`` gives of a GGUF file."""
    file = Path(path)
    trained = language_model.beside(file).context_length
    if n_prompt + n_gen > trained:
        raise UsageError(
            f"{n_prompt + n_gen} tokens are more than the {trained} this model was trained for"
        )
    how: dict[str, Any] = {"n_ctx": n_prompt + n_gen, "n_batch": _BATCH, "threads": threads}
    seconds: dict[str, list[tuple[float, float]]] = {"plain": [], "profiled": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        OrtBencher(file, **how) as plain,
        OrtBencher(file, **how, profile_to=Path(folder) / "profile") as profiled,
    ):
        for done in range(_ROUNDS + 1):
            for name, bencher in (("plain", plain), ("profiled", profiled)):
                prefill_s = bencher.prefill(n_prompt)
                seconds[name].append((prefill_s, math.fsum(bencher.decode(n_gen, n_prompt))))
            _proc.report([done + 1, _ROUNDS + 1])
        events = json.loads(profiled.end_profile().read_bytes())
    kinds = _kinds(onnx.read(file))
    runs = list(_runs(events))
    reads = -(-n_prompt // _BATCH)
    answer = {}
    for phase, (name, first, count, passes) in enumerate(
        (("prefill", 0, reads, 1), ("decode", reads, n_gen, n_gen))
    ):
        plain_s = [each[phase] for each in seconds["plain"][1:]]  # the first one only warms up
        timed = [(each[phase], number) for number, each in enumerate(seconds["profiled"]) if number]
        fastest_s, number = min(timed)
        start = number * (reads + n_gen) + first
        answer[name] = {
            "plain_ms": min(plain_s) * 1e3 / passes,
            "profiled_ms": fastest_s * 1e3 / passes,
            "operators": _operators(runs[start : start + count], kinds, passes),
        }
    return answer


def _kinds(header: onnx.OnnxHeader) -> dict[str, tuple[str, str, str]]:
    """Node's name -> its kind, and of a product the name and the type of its weight."""
    stored = {each.name: each.dtype for each in header.initializers}
    found = {}
    for node in header.nodes:
        weight = kind = ""
        if node.op_type in _PRODUCTS:
            held = next((name for name in node.inputs if name in stored), "")
            weight = _LAYER.sub("", held, count=1).rpartition(".")[0] or held
            bits, block = (node.attributes.get(name) for name in ("bits", "block_size"))
            kind = f"wi{bits}b{block}" if bits and block else stored.get(held, "")
        found[node.name] = node.op_type, weight, kind
    return found


def _runs(events: list[dict[str, Any]]) -> Iterator[list[tuple[str, str, float]]]:
    """(node, kind of operator, milliseconds) of each run of the graph, in order."""
    whole = sorted((each["ts"], each["dur"]) for each in events if each.get("name") == _RUN)
    found: list[list[tuple[str, str, float]]] = [[] for _ in whole]
    starts = [start for start, _ in whole]
    for each in events:
        name = str(each.get("name"))
        if each.get("cat") == "Node" and name.endswith(_KERNEL):
            at = bisect_right(starts, each["ts"]) - 1
            row = name.removesuffix(_KERNEL), each["args"]["op_name"], each["dur"] / 1e3
            found[at].append(row)
    yield from found


def _operators(
    runs: list[list[tuple[str, str, float]]], kinds: dict[str, tuple[str, str, str]], passes: int
) -> list[list[Any]]:
    found: dict[Key, tuple[float, int]] = {}
    for run in runs:
        for node, op_name, ms in run:
            kind, weight, stored = kinds.get(node, (op_name, "", ""))
            layer = _LAYER.match(node)
            key = kind, weight, stored, int(layer[1]) if layer else None
            total_ms, count = found.get(key, (0.0, 0))
            found[key] = total_ms + ms, count + 1
    return [[*key, ms / passes, count / passes] for key, (ms, count) in found.items()]
