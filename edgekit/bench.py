"""Benchmarks: plan the settings, time them in turn in child processes, report.

Knows the order of the work and what makes it honest; never an engine, those run in
``bench_worker``, nor how a report looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekit import __version__, machine, telemetry
from edgekit.artifact import MANIFEST, Artifact
from edgekit.bench_models import Model, opened
from edgekit.bench_plan import Setting, Sweep, Test, settings_of, sweep_like
from edgekit.bench_prediction import predicted, profile_of
from edgekit.bench_side import CHILD_BYTES, COPIES, EngineSide, Sample, SessionSide, free_bytes
from edgekit.bench_verdict import judged
from edgekit.compare import Comparison, between, check, within
from edgekit.device_config import LOCAL
from edgekit.errors import UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.report import (
    BenchReport,
    BenchRow,
    EngineFacts,
    machine_facts,
    read,
)

_BUSY_LOAD = 0.5  # of a core, before anything has begun
_CLOCK_FALL = 0.85


def bench(
    *models: Artifact | str | Path,
    device: str | None = None,
    names: Sequence[str] = (),
    probe: bool = True,
    progress: Progress = no_progress,
    **sweep: Any,
) -> BenchReport:
    """Measure artifacts of language models, their folders, or GGUF and ONNX files; ``sweep`` as in
    ``bench_plan.Sweep``.

    Every combination of a model, thread count, cache type and batch has a process of its own; their
    repetitions take turns, so that what disturbs the machine disturbs all of them. ``probe`` False
    leaves out the verdict, and the measurement of the machine's limits that it needs. ``names`` are
    what the report calls the models, in place of their files' names. ``device`` measures there
    (``target.open_target``), not here.
    Raises UsageError, ArtifactError, SourceError, InferenceError, MissingExtraError; DeviceError.
    """
    if device is not None:
        from edgekit import remote, target  # which need this function themselves

        paths = [model.path if isinstance(model, Artifact) else model for model in models]
        with target.open_target(device) as there:
            return remote.bench_on(there, *paths, probe=probe, progress=progress, **sweep)
    try:
        asked = Sweep(**sweep)
    except TypeError as error:
        raise UsageError(f"bench() {str(error).partition(') ')[2]}") from None
    if not models:
        raise UsageError("which model?", hint="edgekit bench ARTIFACT")
    root = machine.root()
    profile = profile_of(LOCAL, machine.board(root), machine.memory(root).total_bytes)
    before = telemetry.conditions(root)
    found = opened(models, progress, names)
    report = _Run(found, asked, progress).report(before)
    if probe:
        report = judged(report, found, progress)
    headers = {model.facts.name: model.header for model in found}
    return predicted(report, headers, profile)


def bench_against(
    a: Artifact | str | Path,
    b: Artifact | str | Path,
    *,
    device: str | None = None,
    progress: Progress = no_progress,
    **sweep: Any,
) -> tuple[Comparison, BenchReport | None]:
    """B against A, each a model or an earlier report's file (.json), and the report of what was
    measured for it, if anything was.

    Two models are measured together, in turns. A model is measured with the settings of the report
    that it stands against, where ``sweep`` names no others. ``device`` measures two models there.
    Raises what ``bench`` raises, and UsageError for what cannot be compared.
    """
    earlier = [_earlier(side) for side in (a, b)]
    names = (str(a), str(b))
    one, other = earlier
    if device is not None and (one or other):
        raise UsageError(
            "--device measures both sides: an earlier report is none that it could measure",
            hint=f"--device {device} --out new.json, then --compare OLD.json new.json",
        )
    if one is None and other is None:
        measured = bench(a, b, device=device, probe=False, progress=progress, **sweep)
        return within(measured), measured
    if one is not None and other is not None:
        if sweep:
            raise UsageError(f"two reports are not measured again: leave out {', '.join(sweep)}")
        return between(one, other, names), None
    known = one or other
    assert known is not None
    fresh, name = (b, str(a)) if one is not None else (a, str(b))
    check(known, name, machine_facts(machine.root()))  # before minutes are spent
    measured = bench(fresh, probe=False, progress=progress, **sweep_like(known) | sweep)
    pair = (known, measured) if one is not None else (measured, known)
    return between(*pair, names), measured


def _earlier(side: Artifact | str | Path) -> BenchReport | None:
    if isinstance(side, Artifact) or Path(side).suffix.lower() != ".json":
        return None
    return None if Path(side).name == MANIFEST else read(Path(side))


class _Run:
    """One run: its children, and the figures as they come in."""

    def __init__(self, models: Sequence[Model], sweep: Sweep, progress: Progress) -> None:
        self._models = models
        self._sweep = sweep
        self._progress = progress
        self._remarks: list[str] = []
        self._clocks: list[float] = []
        self._engines: dict[str, dict[str, Any]] = {}
        self._threads: dict[str, tuple[int, int]] = {}

    def report(self, before: telemetry.Conditions) -> BenchReport:
        """Measure all, and put it together."""
        root = machine.root()
        with ExitStack() as children, telemetry.Recorder(root) as recorder:
            sessions = self._sessions(children)
            sides = self._sides(children)
            self._take_turns(sides, sessions)
            rows = tuple(
                _row(side, test, samples, recorder)
                for side in sides
                for test, samples in side.samples.items()
            )
            session_rows = tuple(side.row(recorder) for side in sessions)
        report = BenchReport(
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            device=None,
            edgekit=__version__,
            machine=machine_facts(root),
            engine=_engine_facts(self._engines),
            models=tuple(model.facts for model in self._models),
            before=before,
            after=telemetry.conditions(root),
            energy_note=telemetry.why_no_energy(root),
            remarks=(),
            rows=rows,
            sessions=session_rows,
            verdicts=(),
            moments=recorder.moments,
            profile=None,
        )
        return replace(report, remarks=(*self._remarks, *self._what_to_mind(report)))

    def _sessions(self, children: ExitStack) -> list[SessionSide]:
        """A user's session of each model, loaded cold, then warm: before anything maps the file."""
        sides = []
        for number, model in enumerate(self._models):
            self._progress("load", number, len(self._models))
            side = SessionSide(
                model.facts,
                model.path,
                model.given,
                self._sweep,
                longest=model.longest,
                runtime=model.runtime,
                kv_type=model.kv_types(self._sweep.kv_types)[0],
            )
            children.callback(side.close)
            if not self._sweep.threads:
                self._threads[model.facts.name] = side.threads()
            if self._sweep.sessions:
                side.load()
                sides.append(side)
            if model.adapters:
                self._remarks.append(
                    f"{model.facts.name} has an adapter: it counts in edgekit.load, not in the"
                    " engine's loops"
                )
        self._progress("load", len(self._models), len(self._models))
        return sides

    def _sides(self, children: ExitStack) -> list[EngineSide]:
        """A child for every setting, warmed up; all at once where memory allows it."""
        plans = [
            (model, setting)
            for model in self._models
            for setting in settings_of(
                replace(self._sweep, kv_types=model.kv_types(self._sweep.kv_types)),
                self._threads.get(model.facts.name),
            )
        ]
        keep = _fits(plans)
        if not keep:
            self._remarks.append(
                "memory does not hold all settings at once: each repetition loaded its model again"
            )
        sides = []
        for number, (model, setting) in enumerate(plans):
            self._progress("warm up", number, len(plans))
            _check_context(model, setting)
            side = EngineSide(
                model.facts, model.path, setting, self._sweep, keep=keep, runtime=model.runtime
            )
            children.callback(side.close)
            side.warm_up()
            self._engines[model.runtime] = side.engine
            sides.append(side)
        self._progress("warm up", len(plans), len(plans))
        return sides

    def _take_turns(self, sides: Sequence[EngineSide], sessions: Sequence[SessionSide]) -> None:
        """Rounds in which each child has its turn; every second round goes backwards."""
        everybody: list[EngineSide | SessionSide] = [*sides, *sessions]
        total_ms = round(1e3 * sum(side.turn_s for side in everybody)) * self._sweep.repetitions
        total_ms = max(1, total_ms)
        done_ms, root = 0, machine.root()
        for turn in range(self._sweep.repetitions):
            for side in everybody if turn % 2 == 0 else reversed(everybody):
                self._progress("measure", min(done_ms, total_ms - 1), total_ms)
                side.take_turn()
                done_ms += round(1e3 * side.turn_s)
                if clock := telemetry.conditions(root).clock_mhz:
                    self._clocks.append(clock)
        self._progress("measure", total_ms, total_ms)

    def _what_to_mind(self, report: BenchReport) -> Iterable[str]:
        if report.before.load_1m is not None and report.before.load_1m > _BUSY_LOAD:
            yield f"the load average was {report.before.load_1m:.2f} before the first measurement"
        if report.busy:
            yield f"the machine was busy: {report.busy}"
        if report.throttled:
            left = sum(len(row.throttled_s) for row in report.rows)
            yield (
                f"the processor was throttled: {left} repetitions are left out of all figures"
                if all(row.throttled_s or not row.throttled for row in report.rows)
                else "the processor was throttled during the run: the figures are too low"
            )
        if self._clocks and min(self._clocks) < _CLOCK_FALL * max(self._clocks):
            low, high = min(self._clocks), max(self._clocks)
            yield f"the clock fell from {high:.0f} to {low:.0f} MHz between the turns"
        for words in report.after.throttling or ():
            yield f"the firmware says: {words}"
        for row in report.rows:
            if far := row.outliers:
                speeds = ", ".join(f"{row.speeds[i]:.1f}" for i in far)
                yield (
                    f"{row.model} {row.test} -t {row.n_threads} kv {row.kv_type}: outliers of"
                    f" {speeds} tok/s count in the mean of {row.tok_s:.1f}"
                )


def _engine_facts(engines: Mapping[str, dict[str, Any]]) -> EngineFacts:
    """One engine, or several in a row where models of several formats were measured together."""
    backends = [each["backend"] for each in engines.values() if each["backend"]]
    return EngineFacts(
        ", ".join(engines),
        ", ".join(each["version"] for each in engines.values()),
        ", ".join(backends) or None,
    )


def _check_context(model: Model, setting: Setting) -> None:
    needed = setting.n_ctx // setting.n_seqs
    if needed > model.longest:
        raise UsageError(
            f"the tests need a context of {needed} tokens, {model.facts.name} was trained for"
            f" {model.longest}"
        )


def _fits(plans: Sequence[tuple[Model, Setting]]) -> bool:
    """Whether all children can hold their models at one time."""
    free = free_bytes()
    if free is None:
        return False
    needed = [COPIES * model.facts.size_bytes + CHILD_BYTES for model, _ in plans]
    sessions = {model.facts.name: need for (model, _), need in zip(plans, needed, strict=True)}
    return sum(needed) + sum(sessions.values()) < free


def _row(
    side: EngineSide, test: Test, samples: Sequence[Sample], recorder: telemetry.Recorder
) -> BenchRow:
    slow = [_throttled(sample, recorder) for sample in samples]
    # Where it never ran freely there is nothing else to show.
    kept = [s for s, bad in zip(samples, slow, strict=True) if not bad] or samples
    strains = [sample.strain for sample in kept]
    energies = [strain.energy_j for strain in strains if strain.energy_j is not None]
    seconds = [sample.seconds for sample in kept]
    return BenchRow(
        model=side.facts.name,
        model_type=side.facts.type,
        size_bytes=side.facts.size_bytes,
        n_threads=side.setting.n_threads,
        n_prompt=test.n_prompt,
        n_gen=test.n_gen,
        n_depth=test.n_depth,
        n_batch=side.sweep.n_batch,
        n_seqs=side.setting.n_seqs,
        kv_type=side.setting.kv_type,
        flash_attention=side.sweep.flash_attention,
        samples_s=tuple(seconds),
        step_ms=tuple(ms for sample in kept for ms in sample.step_ms),
        peak_rss_bytes=side.peak_rss_bytes,
        energy_j=sum(energies) if len(energies) == len(kept) else None,
        others_share=_weighted([strain.others_share for strain in strains], seconds),
        steal_share=_weighted([strain.steal_share for strain in strains], seconds),
        throttled=None if set(slow) == {None} else any(slow),
        throttled_s=tuple(sample.seconds for sample in samples if sample not in kept),
    )


def _throttled(sample: Sample, recorder: telemetry.Recorder) -> bool | None:
    """What the counters say of a repetition, or the looks of every second; None if neither does."""
    told = [sample.strain.throttled, recorder.throttled(sample.began_s, sample.ended_s)]
    known = [answer for answer in told if answer is not None]
    return any(known) if known else None


def _weighted(shares: Sequence[float | None], seconds: Sequence[float]) -> float | None:
    """The mean share over the time; the kernel's clock ticks are too coarse for one sample."""
    pairs = [(share, s) for share, s in zip(shares, seconds, strict=True) if share is not None]
    total = sum(s for _, s in pairs)
    return sum(share * s for share, s in pairs) / total if total else None
