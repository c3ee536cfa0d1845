"""The probes reach what the machine can do, and what they found is kept only when it was quiet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekit import probe, roofline
from edgekit.bench import bench
from edgekit.errors import UsageError
from edgekit.exporters import quantizer
from edgekit.formats import gguf
from edgekit.report import BenchReport
from edgekit.roofline import RowVerdict

ROOT = Path(__file__).resolve().parents[2]


def test_limits_are_plausible_and_come_with_progress() -> None:
    heard = []
    found = probe.limits([1], progress=lambda *step: heard.append(step))
    (only,) = found.rows
    # The slowest board that edgekit knows reads a few GB/s; no machine reaches the upper ends.
    assert 1e8 < only.read_bytes_s < 1e13
    assert 1e8 < only.flops_s < 1e14
    assert heard[-1] == ("measure the machine", 6, 6)
    assert found.at(1) == only
    with pytest.raises(UsageError, match="not measured with 7 threads"):
        found.at(7)


def test_the_engines_products_are_measured_for_each_type() -> None:
    found = probe.limits([1], types=["Q4_0", "F16", "Q6_K"])
    assert [kernel.type for kernel in found.kernels] == ["F16", "Q4_0", "Q6_K"]
    for kernel in found.kernels:
        assert kernel.prefill_flops_s > 1e8 and kernel.decode_flops_s > 1e8
        # What has to be fetched first is not faster; beside other work two best rounds differ.
        assert 1e8 < kernel.stream_flops_s < 1.5 * kernel.decode_flops_s
    operator_s = found.operator_s(1)
    assert operator_s is not None and 1e-9 < operator_s < 1e-3
    assert found.kernel("Q8_0", 1) is None


@pytest.mark.parametrize("threads", [[], [0], [2, -1]])
def test_impossible_thread_counts_are_refused(threads: list[int]) -> None:
    with pytest.raises(UsageError, match="thread counts of 1 and more"):
        probe.limits(threads)


class Measured:
    """Stands in for the child process: counts its calls, and is as busy as it is told."""

    def __init__(self, *, busy: bool) -> None:
        self.busy = busy
        self.calls = 0

    def __call__(self, _function: str, arguments: dict[str, Any], *_: Any) -> dict[str, Any]:
        self.calls += 1
        figures = {str(count): [count * 1e9, self.calls * 1e9] for count in arguments["threads"]}
        return {"limits": figures, "busy": self.busy}


def test_quiet_limits_are_remembered_until_fresh_ones_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    child = Measured(busy=False)
    monkeypatch.setattr(probe, "_child", child)
    first = probe.limits([1, 2])
    assert probe.limits([2]).rows == first.rows[1:]
    assert child.calls == 1
    probe.limits([1, 4])
    assert child.calls == 2, "a new count is measured"
    assert probe.limits([4], fresh=True).rows[0].flops_s == 3e9
    assert probe.limits([4]).rows[0].flops_s == 3e9
    (kept,) = json.loads((home / "state" / "limits.json").read_text()).values()
    assert sorted(kept) == ["1", "2", "4"]


def test_limits_of_a_busy_machine_are_used_but_not_remembered(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    child = Measured(busy=True)
    monkeypatch.setattr(probe, "_child", child)
    assert probe.limits([1]).busy
    assert not (home / "state" / "limits.json").exists()
    probe.limits([1])
    assert child.calls == 2


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"KEY": 3}', '{"KEY": {"1": [1]}}', '{"KEY": {"1": [-5.0, "fast"]}}'],
)
def test_a_spoilt_memory_counts_as_none(
    text: str, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr(probe, "_child", Measured(busy=False))
    memory = home / "state" / "limits.json"
    probe.limits([1])
    (key,) = json.loads(memory.read_text())
    memory.write_text(text.replace("KEY", key))
    assert probe.limits([1]).rows[0].read_bytes_s == 1e9
    assert json.loads(memory.read_text()) == {key: {"1": [1e9, 2e9]}}


def test_the_last_cache_is_that_of_all_its_instances(tmp_path: Path) -> None:
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for index, (level, size) in enumerate(((1, "32K"), (3, "16384K"))):
            entry = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            entry.mkdir(parents=True)
            (entry / "level").write_text(f"{level}\n")
            (entry / "size").write_text(f"{size}\n")
            (entry / "shared_cpu_list").write_text(f"{shared if level == 3 else cpu}\n")
    assert probe.last_cache_bytes(tmp_path) == 2 * (16 << 20)
    assert probe.last_cache_bytes(tmp_path / "nothing") == 32 << 20


@pytest.mark.slow
def test_the_comparison_with_a_c_program_runs_and_leaves_nothing(tmp_path: Path) -> None:
    folder = ROOT / "benchmarks" / "probe"
    before = sorted(folder.rglob("*"))
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-B", folder / "run.py", "--reps", "1", "--threads", "1", "--json", out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| 1 | read |" in done.stdout and "| 1 | multiply |" in done.stdout
    assert json.loads(out.read_text()).keys() == {"read 1", "multiply 1"}
    assert sorted(folder.rglob("*")) == before


# The verdict on a real model. What it says of a busy machine is about the neighbours.


@pytest.fixture(scope="module")
def smollm2_in(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2 as F16 and as Q4_0."""
    folder = tmp_path_factory.mktemp("types")
    found = {}
    for name in ("F16", "Q4_0"):
        found[name] = folder / f"{name}.gguf"
        quantizer.quantize(
            smollm2_gguf,
            found[name],
            name,
            imatrix=None,
            overrides=(),
            on_tensor=lambda done, total: None,
        )
    return found


def _verdict(model: Path, **sweep: Any) -> tuple[RowVerdict, ...]:
    """The rows' verdicts from a run that nobody disturbed, with limits from around that run."""
    threads = sweep["threads"]
    cost = roofline.cost(gguf.read(model))
    for _ in range(3):
        limits = probe.limits(threads, types=cost.types, fresh=True)
        report: BenchReport = bench(model, probe=False, sessions=False, **sweep)
        if not (limits.busy or report.busy):
            return roofline.verdict(report.rows, cost, limits).rows
    pytest.skip("others used the machine in each of three runs")


@pytest.mark.slow
def test_decoding_in_f16_with_one_thread_is_bound_by_memory(smollm2_in: dict[str, Path]) -> None:
    (row,) = _verdict(smollm2_in["F16"], threads=(1,), prompts=(), answers=(64,))
    # The largest of three parts (memory, arithmetic, the rest) takes a third of the time at least.
    assert row.kind == "memory" and row.share > 1 / 3, row


@pytest.mark.slow
def test_reading_512_tokens_is_bound_by_arithmetic(smollm2_in: dict[str, Path]) -> None:
    (row,) = _verdict(smollm2_in["Q4_0"], threads=(1,), prompts=(512,), answers=())
    assert row.kind == "compute" and row.share > 1 / 3, row


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_a_second_thread_is_called_overhead_where_it_adds_nothing(
    smollm2_in: dict[str, Path],
) -> None:
    rows = _verdict(smollm2_in["Q4_0"], threads=(1, 2), prompts=(), answers=(64,))
    one, two = sorted(rows, key=lambda row: row.n_threads)
    # Two threads read and compute about twice as fast as one. How much of that a model gets in 4
    # bits depends on the CPU: nothing where one thread's kernels outrun the rest, or nearly all.
    if two.tok_s < 1.2 * one.tok_s:
        assert two.kind == "overhead", (one, two)
    if two.tok_s > 1.6 * one.tok_s:
        assert two.kind != "overhead", (one, two)
