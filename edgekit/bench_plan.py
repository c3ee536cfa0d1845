"""What a benchmark is asked to measure, with bounds, and the settings and tests that this makes.

Knows numbers and names; never a model, an engine or a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgekit.errors import UsageError
from edgekit.report import BenchReport
from edgekit.runtime import KV_TYPES

_MAX_SETTINGS = 500
_MAX_VALUES = 64


@dataclass(frozen=True)
class Test:
    """Reading ``n_prompt`` tokens, or generating ``n_gen`` of them behind ``n_depth``."""

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0


@dataclass(frozen=True)
class Setting:
    """What needs a process of its own, and the tests that run in it."""

    n_threads: int
    kv_type: str
    n_seqs: int
    tests: tuple[Test, ...]

    @property
    def n_ctx(self) -> int:
        """Tokens that the KV cache must hold, of all sequences together."""
        return self.n_seqs * max(max(t.n_prompt, t.n_depth + t.n_gen) for t in self.tests)


@dataclass(frozen=True)
class Sweep:
    """Every combination of the lists is measured, ``repetitions`` times.

    ``threads`` empty: what ``edgekit.load`` would use. ``prompts`` are tokens to read, ``answers``
    tokens to generate behind each of ``depths``; either list may be empty. ``kv_types`` are types
    of the KV cache. ``batches`` are numbers of sequences that are decoded side by side.
    ``n_batch`` tokens of a prompt are read at once. ``sessions``: measure load times, the time to
    the first token and the pace of a whole session too, with the first value of each list.
    Raises UsageError for values out of bounds.
    """

    threads: tuple[int, ...] = ()
    prompts: tuple[int, ...] = (512,)
    answers: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    kv_types: tuple[str, ...] = ("f16",)
    batches: tuple[int, ...] = (1,)
    repetitions: int = 5
    n_batch: int = 512
    flash_attention: bool = True
    sessions: bool = True

    def __post_init__(self) -> None:
        _check("threads", self.threads, 1, 512)
        _check("prompts", self.prompts, 1, 1 << 20)
        _check("answers", self.answers, 1, 1 << 20)
        _check("depths", self.depths, 0, 1 << 20)
        _check("batches", self.batches, 1, 256)
        _check("repetitions", (self.repetitions,), 1, 10_000)
        _check("n_batch", (self.n_batch,), 1, 1 << 14)
        for kind in self.kv_types:
            if kind not in KV_TYPES:
                raise UsageError(
                    f"kv_type {kind!r} is unknown", hint=f"known: {' '.join(KV_TYPES)}"
                )
        if not self.prompts and not self.answers:
            raise UsageError("there is nothing to measure: give prompts or answers")
        if not (self.depths and self.kv_types and self.batches):
            raise UsageError("depths, kv_types and batches must not be empty")


def _check(name: str, values: tuple[Any, ...], low: int, high: int) -> None:
    if len(values) > _MAX_VALUES:
        raise UsageError(f"{name} takes at most {_MAX_VALUES} values")
    for value in values:
        if type(value) is not int or not low <= value <= high:
            raise UsageError(f"{name} takes whole numbers from {low} to {high}, not {value!r}")
    if len(set(values)) < len(values):
        raise UsageError(f"{name} names a value twice")


def settings_of(sweep: Sweep, automatic: tuple[int, int] | None) -> list[Setting]:
    """The settings of one model.

    ``automatic`` are threads for decode and for prefill, where the sweep names none.
    """
    decode = prefill = sweep.threads
    if automatic:
        decode, prefill = (automatic[0],), (automatic[1],)
    prompts = [Test(n_prompt=n) for n in sweep.prompts]
    answers = [Test(n_gen=n, n_depth=depth) for n in sweep.answers for depth in sweep.depths]
    settings = []
    for kv_type in sweep.kv_types:
        for count in dict.fromkeys((*decode, *prefill)):
            for n_seqs in dict.fromkeys((1, *sweep.batches)):
                tests = prompts if n_seqs == 1 and count in prefill else []
                if count in decode and n_seqs in sweep.batches:
                    tests = [*tests, *answers]
                if tests:
                    settings.append(Setting(count, kv_type, n_seqs, tuple(tests)))
    if len(settings) > _MAX_SETTINGS:
        raise UsageError(f"{len(settings)} settings are more than {_MAX_SETTINGS}")
    if not settings:
        raise UsageError("there is nothing to measure: give prompts or answers")
    return settings


def sweep_like(report: BenchReport) -> dict[str, Any]:
    """The fields of a Sweep that measures the rows of an earlier report again."""
    rows = report.rows
    answers = [row for row in rows if row.n_gen]
    return {
        "threads": tuple(dict.fromkeys(row.n_threads for row in rows)),
        "prompts": tuple(dict.fromkeys(row.n_prompt for row in rows if row.n_prompt)),
        "answers": tuple(dict.fromkeys(row.n_gen for row in answers)),
        "depths": tuple(dict.fromkeys(row.n_depth for row in answers)) or (0,),
        "kv_types": tuple(dict.fromkeys(row.kv_type for row in rows)),
        "batches": tuple(dict.fromkeys(row.n_seqs for row in answers)) or (1,),
        "repetitions": max(len(row.samples_s) for row in rows),
        "n_batch": rows[0].n_batch,
        "flash_attention": rows[0].flash_attention,
        "sessions": bool(report.sessions),
    }
