"""The plan for this machine is what happens on it: memory always, speeds where nothing disturbs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit import machine, model_cost, plan, probe
from edgekit.bench import bench
from edgekit.device import load_profile
from edgekit.exporters import quantizer
from edgekit.formats import gguf
from edgekit.measured_profile import measured_profile
from edgekit.predictor import Work, predict

_RESIDENT = """
import re, sys
import edgekit
with edgekit.load(sys.argv[1], n_ctx=2048, n_threads=1) as model:
    model.complete("The sky is blue because " * 60, max_tokens=4)
    status = open("/proc/self/status").read()
print(int(re.search(r"VmRSS:\\s+(\\d+)", status)[1]) << 10)
"""
TYPES = ("F16", "Q8_0", "Q4_0", "Q4_K_M")


def test_a_session_takes_the_memory_that_was_planned(smollm2_gguf: Path) -> None:
    """Q4_1 is a type that the engine does not repack, so nothing is in memory twice."""
    done = subprocess.run(
        [sys.executable, "-c", _RESIDENT, str(smollm2_gguf)],
        capture_output=True,
        text=True,
        check=True,
    )
    planned = plan.plan(smollm2_gguf, load_profile("rpi5"), context=2048).memory.total
    assert int(done.stdout) == pytest.approx(planned, rel=0.15)


@pytest.mark.slow
def test_the_speeds_of_five_types_are_within_a_fifth(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Of the fastest repetition, for the limits are those of the fastest rounds too."""
    files = [smollm2_gguf]
    for name in TYPES:
        files.append(tmp_path / f"{name}.gguf")
        quantizer.quantize(
            smollm2_gguf, files[-1], name, imatrix=None, overrides=(), on_tensor=lambda a, b: None
        )
    costs = [model_cost.cost(gguf.read(file)) for file in files]
    threads = len(os.sched_getaffinity(0))
    counts = sorted({1, threads})
    limits = probe.limits(counts, types={kind for cost in costs for kind in cost.types})
    report = bench(*files, threads=(threads,), sessions=False, probe=False, repetitions=5)
    if limits.busy or report.busy:
        pytest.skip("others use this machine")
    root = machine.root()
    profile = measured_profile(
        limits, machine.cpu(root), machine.memory(root), name="local", title="This machine"
    )
    for model, cost in zip(report.models, costs, strict=True):
        for row in report.rows_of(model.name):
            work = Work(n_threads=threads, n_prompt=row.n_prompt or 512, depth=row.n_gen // 2)
            found = predict(cost, profile, work)
            expected = found.prefill.mid if row.n_prompt else found.decode.mid
            assert max(row.speeds) == pytest.approx(expected, rel=0.2), f"{model.name} {row.test}"
