"""Benchmarks: plan the settings, time them in turn in child processes, report.

Knows the order of the work and what makes it honest; never an engine, those run in
``bench_worker``, nor how a report looks.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekit import __version__, _fs, machine, telemetry
from edgekit.artifact import MANIFEST, Artifact
from edgekit.bench_plan import Setting, Sweep, Test, settings_of, sweep_like
from edgekit.bench_side import EngineSide, Sample, SessionSide
from edgekit.compare import Comparison, between, within
from edgekit.errors import EdgekitError, UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.formats import gguf
from edgekit.registry import RUNTIME_OF_FORMAT
from edgekit.report import (
    BenchReport,
    BenchRow,
    EngineFacts,
    MachineFacts,
    ModelFacts,
    VerdictRow,
    read,
)

_FORMAT = "gguf"
# What a child needs beside the file: its weights once more (repacked), Python and the engine.
_COPIES = 2
_CHILD_BYTES = 300 << 20
_BUSY_LOAD = 0.5  # of a core, before anything has begun
_CLOCK_FALL = 0.85


@dataclass(frozen=True)
class Model:
    """A model to measure: its file, what a user loads, and what its header says."""

    path: Path
    given: Path
    header: gguf.GgufHeader
    facts: ModelFacts


def bench(
    *models: Artifact | str | Path,
    probe: bool = True,
    progress: Progress = no_progress,
    **sweep: Any,
) -> BenchReport:
    """Measure artifacts, their folders or GGUF files; ``sweep`` as in ``bench_plan.Sweep``.

    Every combination of a model, thread count, cache type and batch has a process of its own; their
    repetitions take turns, so that what disturbs the machine disturbs all of them. ``probe`` False
    leaves out the verdict, and the measurement of the machine's limits that it needs.
    Raises UsageError, ArtifactError, SourceError, InferenceError, MissingExtraError.
    """
    try:
        asked = Sweep(**sweep)
    except TypeError as error:
        raise UsageError(f"bench() {str(error).partition(') ')[2]}") from None
    if not models:
        raise UsageError("which model?", hint="edgekit bench ARTIFACT")
    before = telemetry.conditions(machine.root())
    found = _opened(models, progress)
    report = _Run(found, asked, progress).report(before)
    return _judged(report, found, progress) if probe else report


def bench_against(
    a: Artifact | str | Path,
    b: Artifact | str | Path,
    *,
    progress: Progress = no_progress,
    **sweep: Any,
) -> tuple[Comparison, BenchReport | None]:
    """B against A, each a model or an earlier report's file (.json), and the report of what was
    measured for it, if anything was.

    Two models are measured together, in turns. A model is measured with the settings of the report
    that it stands against, where ``sweep`` names no others.
    Raises what ``bench`` raises, and UsageError for what cannot be compared.
    """
    earlier = [_earlier(side) for side in (a, b)]
    names = (str(a), str(b))
    one, other = earlier
    if one is None and other is None:
        measured = bench(a, b, probe=False, progress=progress, **sweep)
        return within(measured), measured
    if one is not None and other is not None:
        if sweep:
            raise UsageError(f"two reports are not measured again: leave out {', '.join(sweep)}")
        return between(one, other, names), None
    known = one or other
    assert known is not None
    fresh = b if one is not None else a
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
        self._engine: dict[str, Any] = {}
        self._threads: dict[str, tuple[int, int]] = {}

    def report(self, before: telemetry.Conditions) -> BenchReport:
        """Measure all, and put it together."""
        with ExitStack() as children:
            sessions = self._sessions(children)
            sides = self._sides(children)
            self._take_turns(sides, sessions)
            rows = tuple(
                _row(side, test, samples)
                for side in sides
                for test, samples in side.samples.items()
            )
            session_rows = tuple(side.row() for side in sessions)
        root = machine.root()
        report = BenchReport(
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            edgekit=__version__,
            machine=_machine_facts(root),
            engine=EngineFacts(RUNTIME_OF_FORMAT[_FORMAT], **self._engine),
            models=tuple(model.facts for model in self._models),
            before=before,
            after=telemetry.conditions(root),
            energy_note=telemetry.why_no_energy(root),
            remarks=(),
            rows=rows,
            sessions=session_rows,
            verdicts=(),
        )
        return replace(report, remarks=(*self._remarks, *self._what_to_mind(report)))

    def _sessions(self, children: ExitStack) -> list[SessionSide]:
        """A user's session of each model, loaded cold, then warm: before anything maps the file."""
        sides = []
        for number, model in enumerate(self._models):
            self._progress("load", number, len(self._models))
            side = SessionSide(model.facts, model.path, model.given, self._sweep)
            children.callback(side.close)
            if not self._sweep.threads:
                self._threads[model.facts.name] = side.threads()
            if self._sweep.sessions:
                side.load()
                sides.append(side)
            else:
                side.close()
        return sides

    def _sides(self, children: ExitStack) -> list[EngineSide]:
        """A child for every setting, warmed up; all at once where memory allows it."""
        plans = [
            (model, setting)
            for model in self._models
            for setting in settings_of(self._sweep, self._threads.get(model.facts.name))
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
            side = EngineSide(model.facts, model.path, setting, self._sweep, keep=keep)
            children.callback(side.close)
            side.warm_up()
            self._engine = side.engine
            sides.append(side)
        return sides

    def _take_turns(self, sides: Sequence[EngineSide], sessions: Sequence[SessionSide]) -> None:
        """Rounds in which each child has its turn; every second round goes backwards."""
        everybody: list[EngineSide | SessionSide] = [*sides, *sessions]
        total = max(1, round(1e3 * sum(side.turn_s for side in everybody)))
        done_ms, root = 0, machine.root()
        for turn in range(self._sweep.repetitions):
            for side in everybody if turn % 2 == 0 else reversed(everybody):
                self._progress("measure", done_ms, total * self._sweep.repetitions)
                side.take_turn()
                done_ms += round(1e3 * side.turn_s)
                if clock := telemetry.conditions(root).clock_mhz:
                    self._clocks.append(clock)
        self._progress("measure", total, total)

    def _what_to_mind(self, report: BenchReport) -> Iterable[str]:
        if report.before.load_1m is not None and report.before.load_1m > _BUSY_LOAD:
            yield f"the load average was {report.before.load_1m:.2f} before the first measurement"
        if report.busy:
            yield f"the machine was busy: {report.busy}"
        if report.throttled:
            yield "the processor was throttled during the run: the figures are too low"
        if self._clocks and min(self._clocks) < _CLOCK_FALL * max(self._clocks):
            low, high = min(self._clocks), max(self._clocks)
            yield f"the clock fell from {high:.0f} to {low:.0f} MHz between the turns"
        for words in report.after.throttling or ():
            yield f"the firmware says: {words}"
        far = [row for row in report.rows if row.outliers]
        if far:
            yield (
                f"{sum(len(row.outliers) for row in far)} repetitions in {len(far)} rows lie far"
                " from the others; they count in every figure"
            )


def _opened(models: Sequence[Artifact | str | Path], progress: Progress) -> list[Model]:
    found: list[Model] = []
    for given in models:
        if isinstance(given, Artifact):
            artifact: Artifact | None = given
        else:
            artifact = None if Path(given).is_file() else Artifact.open(given)
        if artifact is None:
            shown = path = Path(str(given))
        else:
            if artifact.format != _FORMAT:
                raise UsageError(f"edgekit bench measures {_FORMAT}, not {artifact.format}")
            artifact.verify_sizes()
            shown, path = artifact.path, artifact.model_path
        header = gguf.read(path)
        name = _unique(shown.resolve().name, [model.facts.name for model in found])
        kind = artifact.manifest.recipe.type if artifact else header.main_type()
        found.append(
            Model(
                path=path.absolute(),
                given=shown.absolute(),
                header=header,
                facts=ModelFacts(
                    name=name,
                    sha256=_hash(path, name, progress),
                    size_bytes=header.file_size,
                    type=kind,
                    architecture=header.architecture,
                    parameters=header.parameters,
                ),
            )
        )
    return found


def _unique(name: str, taken: Sequence[str]) -> str:
    """A printable name that no other model of the report has."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name} ({number})"
    return found


def _hash(path: Path, name: str, progress: Progress) -> str:
    done, total = 0, path.stat().st_size

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(f"hash {name}", done, total)

    return _fs.sha256_file(path, on_bytes)


def _check_context(model: Model, setting: Setting) -> None:
    trained = model.header.metadata.get(f"{model.header.architecture}.context_length")
    needed = setting.n_ctx // setting.n_seqs
    if isinstance(trained, int) and needed > trained:
        raise UsageError(
            f"the tests need a context of {needed} tokens, {model.facts.name} was trained for"
            f" {trained}"
        )


def _fits(plans: Sequence[tuple[Model, Setting]]) -> bool:
    """Whether all children can hold their models at one time."""
    memory = machine.memory(machine.root())
    free = memory.available_bytes
    if free is None:
        return False
    if memory.limit_bytes is not None:
        free = min(free, memory.limit_bytes)
    needed = [_COPIES * model.facts.size_bytes + _CHILD_BYTES for model, _ in plans]
    sessions = {model.facts.name: need for (model, _), need in zip(plans, needed, strict=True)}
    return sum(needed) + sum(sessions.values()) < free


def _machine_facts(root: Path) -> MachineFacts:
    cpu = machine.cpu(root)
    return MachineFacts(
        cpu=cpu.model,
        architecture=cpu.architecture,
        cores=cpu.cores,
        usable_cores=len(os.sched_getaffinity(0)),
        board=machine.board(root),
        memory_bytes=machine.memory(root).total_bytes,
        kernel=platform.release(),
    )


def _row(side: EngineSide, test: Test, samples: Sequence[Sample]) -> BenchRow:
    strains = [sample.strain for sample in samples]
    energies = [strain.energy_j for strain in strains if strain.energy_j is not None]
    throttled = [strain.throttled for strain in strains if strain.throttled is not None]
    seconds = [sample.seconds for sample in samples]
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
        step_ms=tuple(ms for sample in samples for ms in sample.step_ms),
        peak_rss_bytes=side.peak_rss_bytes,
        energy_j=sum(energies) if len(energies) == len(samples) else None,
        others_share=_weighted([strain.others_share for strain in strains], seconds),
        steal_share=_weighted([strain.steal_share for strain in strains], seconds),
        throttled=any(throttled) if throttled else None,
    )


def _weighted(shares: Sequence[float | None], seconds: Sequence[float]) -> float | None:
    """The mean share over the time; the kernel's clock ticks are too coarse for one sample."""
    pairs = [(share, s) for share, s in zip(shares, seconds, strict=True) if share is not None]
    total = sum(s for _, s in pairs)
    return sum(share * s for share, s in pairs) / total if total else None


def _judged(report: BenchReport, models: Sequence[Model], progress: Progress) -> BenchReport:
    """The report with a verdict on each model, or a remark why there is none."""
    from edgekit import model_cost, probe, roofline

    threads = sorted({row.n_threads for row in report.rows})
    verdicts: list[VerdictRow] = []
    for model in models:
        name = model.facts.name
        rows = report.rows_of(name)
        kin = [
            other.facts.name
            for other in models
            if other is not model and other.facts.parameters == model.facts.parameters
        ]
        cost = model_cost.cost(model.header)
        try:
            limits = probe.limits(threads, types=cost.types, progress=progress)
            verdict = roofline.verdict(
                rows,
                cost,
                limits,
                others=[row for row in report.rows if row.model in kin],
                host_ms=_host_ms(report, name),
            )
        except EdgekitError as error:
            remark = f"no verdict on {name}: {error.message}"
            report = replace(report, remarks=(*report.remarks, remark))
            continue
        verdicts.append(
            VerdictRow(
                model=name,
                kind=verdict.kind,
                share=verdict.share,
                sentence=verdict.sentence,
                rows=tuple(row.sentence for row in verdict.rows),
                evidence=verdict.evidence,
                advice=tuple(advice.text for advice in verdict.advice),
            )
        )
    return replace(report, verdicts=tuple(verdicts))


def _host_ms(report: BenchReport, name: str) -> float | None:
    """What a session's token costs beyond the engine's own loop, in ms; None if unknown."""
    session = next((row for row in report.sessions if row.model == name), None)
    if session is None or not session.decode_tok_s:
        return None
    for row in report.rows_of(name):
        same = row.n_threads == session.n_threads and row.kv_type == session.kv_type
        if row.n_gen and row.n_depth == session.n_depth and row.n_seqs == 1 and same:
            mine = 1e3 / statistics.fmean(session.decode_tok_s)
            return max(0.0, mine - 1e3 / row.tok_s)
    return None
