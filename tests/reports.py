"""Benchmark reports made of plain numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgekit.report import (
    BenchReport,
    BenchRow,
    EngineFacts,
    MachineFacts,
    ModelFacts,
    SessionRow,
    VerdictRow,
)
from edgekit.telemetry import Conditions, Moment

_IDLE = Conditions(0.1, None, None, "performance", 50.0, ())


def row(model: str = "a.gguf", **fields: Any) -> BenchRow:
    """A row of a prompt, with some of its fields replaced."""
    plain = BenchRow(
        model=model,
        model_type="Q4_0",
        size_bytes=91_000_000,
        n_threads=2,
        n_prompt=512,
        n_gen=0,
        n_depth=0,
        n_batch=512,
        n_seqs=1,
        kv_type="f16",
        flash_attention=True,
        samples_s=(0.5, 0.51, 0.49, 0.5, 0.5),
        step_ms=(),
        peak_rss_bytes=200 << 20,
    )
    return replace(plain, **fields)


def answer(model: str = "a.gguf", **fields: Any) -> BenchRow:
    """A row of an answer."""
    steps = {"n_prompt": 0, "n_gen": 4, "samples_s": (0.02, 0.021, 0.02), "step_ms": (5.0,) * 12}
    return row(model, **(steps | fields))


def made(name: str = "a.gguf", **fields: Any) -> BenchReport:
    """A whole report of one model; ``fields`` are of its rows."""
    return BenchReport(
        taken_at="2026-01-01T00:00:00+00:00",
        device="kitchen",
        edgekit="0.1.0",
        machine=MachineFacts(
            "Cortex-A76", "aarch64", 4, 4, "Raspberry Pi 5", 8 << 30, "6.12", False
        ),
        engine=EngineFacts("llamacpp", "0.3.36", None),
        models=(ModelFacts(name, "ab" * 32, 91_000_000, "Q4_0", "llama", 134_515_008),),
        before=_IDLE,
        after=_IDLE,
        energy_note="this machine has no energy counter that Linux knows",
        remarks=(),
        rows=(row(name, **fields), answer(name, **fields)),
        sessions=(
            SessionRow(
                name, 2, "f16", 512, 128, 0, 0.6, None, 0.2, (0.4, 0.5), (150.0,), 300 << 20
            ),
        ),
        verdicts=(
            VerdictRow(name, "memory", 0.7, "memory-bound at 70%", ("pp512: x",), ("e",), ("a",)),
        ),
        moments=(
            Moment(0.0, 48.5, 2400.0, (), 0.0, 0.0, 0.0, 7 << 30, 3.1),
            Moment(1.0, 61.0, 1500.0, ("throttled",), 12.5, 0.0, 1.5, 6 << 30, 8.9),
        ),
        profile="rpi5",
    )
