"""Figures of a latency report by hand, its text, its files, and what the verdict rests on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from edgekit import latency, latency_files, latency_text
from edgekit.errors import UsageError
from edgekit.latency_report import LatencyReport, LatencyRow, OperatorRow
from edgekit.probe import Limit
from edgekit.report import EngineFacts, MachineFacts, ModelFacts
from edgekit.telemetry import Conditions


def _row(model: str, *turns: tuple[float, ...], **changed: Any) -> LatencyRow:
    values: dict[str, Any] = {
        "model": model,
        "runtime": "ort",
        "n_threads": 2,
        "batch": 1,
        "turns_ms": turns,
        "load_s": 0.1,
        "peak_rss_bytes": 50 << 20,
        "flops": 1e9,
        "weight_bytes": 10_000_000,
        "others_share": 0.0,
        "steal_share": 0.0,
        "throttled": None,
    }
    return LatencyRow(**(values | changed))


def _report(*rows: LatencyRow, **changed: Any) -> LatencyReport:
    idle = Conditions(**{name: None for name in Conditions.__dataclass_fields__})
    names = dict.fromkeys(row.model for row in rows)
    values: dict[str, Any] = {
        "taken_at": "2026-01-01T00:00:00+00:00",
        "device": None,
        "edgekit": "0",
        "machine": MachineFacts("CPU", "x86_64", 2, 2, None, None, "6", False),
        "engine": EngineFacts("ort", "1", None),
        "models": tuple(ModelFacts(name, "0" * 64, 10**6, "F32", "x", 1000) for name in names),
        "before": idle,
        "after": idle,
        "energy_note": None,
        "remarks": (),
        "rows": rows,
        "verdicts": (),
        "operators": (
            OperatorRow("a", "Conv", 3, 1.5, 0.75),
            OperatorRow("a", "Relu", 3, 0.5, 0.25),
        ),
        "moments": (),
    }
    return LatencyReport(**(values | changed))


def test_the_figures_of_a_row() -> None:
    row = _row("a", (1.0, 2.0, 3.0), (4.0, 5.0), batch=6)
    assert row.ms(50) == 3.0
    assert row.items_s == 2000.0
    assert row.ms(50) < row.ms(95) < row.ms(99) <= 5.0


def test_a_row_without_runs_is_refused() -> None:
    for turns in ((), ((),), ((0.0,),)):
        with pytest.raises(UsageError):
            _row("a", *turns)


def test_models_are_compared_turn_by_turn() -> None:
    """The second half of the run was twice as slow, for both."""
    slow, fast = _row("a", (4.0,), (8.0,)), _row("b", (2.0,), (4.0,))
    found = fast.times_faster_than(slow)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    report = _report(slow, fast, _row("b", (1.0,), batch=4))
    assert report.beside(fast) is slow
    assert report.beside(slow) is None
    assert report.beside(report.rows[2]) is None  # the first model was not run in batches of 4
    assert [line[-1][:4] for line in latency_text.cells(report)] == ["", "2.00", ""]


def test_a_slower_model_is_said() -> None:
    report = _report(_row("a", (1.0,), (1.0,), (1.0,)), _row("b", (2.0,), (2.1,), (1.9,)))
    assert latency._what_to_mind(report) == ["b is slower than a with batch 1"]


@pytest.mark.parametrize(
    ("flops", "weight_bytes", "kind"),
    [(8e8, 10**6, "compute"), (1e8, 9 * 10**6, "memory"), (1e8, 10**6, "overhead")],
)
def test_the_verdict_follows_the_nearer_limit(flops: float, weight_bytes: int, kind: str) -> None:
    """A run of 1 ms on a machine of 1,000 GFLOP/s and 10 GB/s."""
    row = _row("a", (1.0,), flops=flops, weight_bytes=weight_bytes)
    found = latency._verdict(_report(row), "a", {2: Limit(2, 10e9, 1000e9)})
    assert found is not None and found.kind == kind
    assert "of the measured 1000" in found.evidence[0]


def test_every_form_of_file(tmp_path: Path) -> None:
    report = _report(_row("a", (1.0, 2.0)), _row("b", (2.0,)))
    for form in ("json", "csv", "md", "png", "svg"):
        latency_files.write(report, tmp_path / f"r.{form}")
    body = json.loads((tmp_path / "r.json").read_text())
    assert body["kind"] == "edgekit bench latency"
    assert body["rows"][1]["summary"]["times_faster"][0] == pytest.approx(0.75)
    lines = list(csv.reader((tmp_path / "r.csv").open()))
    assert lines[0][-1] == "times a" and len(lines) == 3
    assert "| Conv | 3 | 1.500 | 75.0% |" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError):
        latency_files.write(report, tmp_path / "r.txt")
