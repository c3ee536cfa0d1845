"""Benchmarks of models without tokens (vision, encoders, any graph): runs timed in turn.

Knows the order of the work and what makes it honest; never an engine, those run in
``bench_worker``, nor how a report looks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekit import __version__, graph_file, language_header, machine, probe, telemetry
from edgekit.artifact import MANIFEST, Artifact
from edgekit.bench_models import hashed, unique
from edgekit.bench_side import CHILD_BYTES, COPIES, Child, free_bytes
from edgekit.errors import EdgekitError, EngineCrashedError, UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.latency_report import LatencyReport, LatencyRow, OperatorRow
from edgekit.registry import OTHER_RUNTIMES, RUNTIME_OF_FORMAT, RUNTIMES, did_you_mean
from edgekit.report import EngineFacts, ModelFacts, VerdictRow, machine_facts
from edgekit.runtime import runtime_of
from edgekit.telemetry import Strain

FORMATS = tuple(graph_file.FORMATS.values())
_TURN_S = 1.0
_LEAST_RUNS = 3
_REPETITIONS = 5
_MOST_BATCH, _MOST_THREADS, _MOST_TURNS = 4096, 512, 1000
_BUSY_LOAD = 0.5  # of a core, before anything has begun
_NEAR = 0.5  # of a limit: there it rules


@dataclass(frozen=True)
class _Model:
    path: Path
    facts: ModelFacts
    flops: float | None
    weight_bytes: int
    why_no_flops: str
    format: str
    runtime: str


@dataclass
class _Side:
    """One model with one setting, in a process of its own."""

    model: _Model
    runtime: str
    n_threads: int | None
    batch: int
    child: Child
    load_s: float = 0.0
    turns_ms: list[tuple[float, ...]] = field(default_factory=list)
    strains: list[Strain] = field(default_factory=list)

    def open(self) -> None:
        found = self.child.ask(
            "hold_tensors",
            path=str(self.model.path),
            threads=self.n_threads,
            batch=self.batch,
            runtime_name=self.runtime,
        )
        self.load_s, self.n_threads = found["seconds"], found["threads"]

    def take_turn(self) -> None:
        seen = self.child.ask("run_tensors", seconds=_TURN_S, least=_LEAST_RUNS)
        self.turns_ms.append(tuple(round(1e3 * each, 5) for each in seen["runs_s"]))
        before, after = (telemetry.Counters(**seen[name]) for name in ("before", "after"))
        self.strains.append(telemetry.strain(before, after, seen["own_cpu_s"]))

    def row(self) -> LatencyRow:
        throttled = [strain.throttled for strain in self.strains]
        return LatencyRow(
            model=self.model.facts.name,
            n_threads=self.n_threads or 1,
            batch=self.batch,
            turns_ms=tuple(self.turns_ms),
            load_s=self.load_s,
            peak_rss_bytes=self.child.ask("peak_rss_bytes"),
            flops=self.model.flops,
            weight_bytes=self.model.weight_bytes,
            others_share=_mean([strain.others_share for strain in self.strains]),
            steal_share=_mean([strain.steal_share for strain in self.strains]),
            throttled=None if set(throttled) == {None} else any(throttled),
            runtime=self.runtime,
        )


def takes(model: Artifact | str | Path) -> bool:
    """Whether ``model`` is one without tokens. Raises ArtifactError for a broken artifact."""
    path = model.path if isinstance(model, Artifact) else Path(model)
    if isinstance(model, Artifact) or (path.is_dir() and (path / MANIFEST).exists()):
        found = model if isinstance(model, Artifact) else Artifact.open(path)
        if found.format not in FORMATS:
            return False
        path = found.model_path
    return path.suffix.lower() in graph_file.FORMATS and not language_header.is_onnx(path)


def latency(
    *models: Artifact | str | Path,
    threads: Sequence[int] = (),
    batches: Sequence[int] = (1,),
    runtimes: Sequence[str] = (),
    without: Collection[tuple[str, str]] = (),
    repetitions: int = _REPETITIONS,
    probe_limits: bool = True,
    profile: bool = False,
    names: Sequence[str] = (),
    progress: Progress = no_progress,
) -> LatencyReport:
    """Time whole runs of ONNX and TFLite artifacts or files, on a built-in input of the kind they
    take.

    ``threads`` and ``runtimes`` () take what ``edgekit.load`` would. ``repetitions`` are turns of a
    second each, in which all settings alternate. ``probe_limits`` adds a verdict from this
    machine's measured limits; ``profile`` the time by kind of operator. ``names`` call the models
    something else than their files do; ``without`` are (name, runtime) pairs to leave out.
    Raises UsageError, ArtifactError, SourceError, InferenceError, MissingExtraError.
    """
    _check(models, threads, batches, repetitions)
    root = machine.root()
    before = telemetry.conditions(root)
    found = _opened(models, names, progress)
    _check_runtimes(runtimes, {model.format for model in found})
    operators: list[OperatorRow] = []
    died: dict[str, str] = {}
    with ExitStack() as children, telemetry.Recorder(root) as recorder:
        plans = [
            (model, runtime, count, batch)
            for model in found
            for runtime in (runtimes or (model.runtime,))
            for count in (threads or (None,))
            for batch in batches
            if (model.facts.name, runtime) not in without
        ]
        sides = _sides(children, plans, progress)
        for turn in range(repetitions):
            for number, side in enumerate(sides if turn % 2 == 0 else reversed(sides)):
                progress("measure", turn * len(sides) + number, repetitions * len(sides))
                side.take_turn()
        progress("measure", repetitions * len(sides), repetitions * len(sides))
        rows = tuple(side.row() for side in sides)
        by_runtime = {side.runtime: side.child for side in reversed(sides)}
        engines = {
            name: EngineFacts(name, **child.ask("tensor_engine", runtime_name=name))
            for name, child in by_runtime.items()
        }
        if profile:
            for model in found:
                side = next(each for each in sides if each.model is model)
                try:
                    operators += _operators(side, progress)
                except EngineCrashedError as error:  # what was measured before stands
                    died[model.facts.name] = error.message
    report = LatencyReport(
        taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        device=None,
        edgekit=__version__,
        machine=machine_facts(root),
        engine=engines.pop(sides[0].runtime),
        models=tuple(model.facts for model in found),
        before=before,
        after=telemetry.conditions(root),
        energy_note=telemetry.why_no_energy(root),
        remarks=(),
        rows=rows,
        verdicts=(),
        operators=tuple(operators),
        moments=recorder.moments,
        other_engines=tuple(engines.values()),
    )
    unknown = [f"no verdict on {m.facts.name}: {m.why_no_flops}" for m in found if m.why_no_flops]
    if profile:
        told = {row.model for row in operators}
        silent = [m.facts.name for m in found if m.facts.name not in told]
        unknown += [
            f"no profile of {name}: {died.get(name, 'its engine does not tell times')}"
            for name in silent
        ]
    report = replace(report, remarks=(*_what_to_mind(report), *unknown))
    return _judged(report, progress) if probe_limits else report


def _check(
    models: Sequence[Any], threads: Sequence[int], batches: Sequence[int], repetitions: int
) -> None:
    if not models:
        raise UsageError("which model?", hint="edgekit bench ARTIFACT")
    for name, values, most in (
        ("threads", threads, _MOST_THREADS),
        ("batch", batches, _MOST_BATCH),
        ("repetitions", [repetitions], _MOST_TURNS),
    ):
        if not all(1 <= value <= most for value in values):
            raise UsageError(f"{name} must lie between 1 and {most}")


def _check_runtimes(runtimes: Sequence[str], formats: Collection[str]) -> None:
    """Raises UsageError for one that reads another format, MissingExtraError."""
    known = sorted({r for f in formats for r in (RUNTIME_OF_FORMAT[f], *OTHER_RUNTIMES.get(f, ()))})
    for name in runtimes:
        if name not in known:
            raise UsageError(
                f"no runtime for these models is called '{name}'",
                hint=did_you_mean(name, known),
            )
        RUNTIMES.load(name)


def _opened(
    models: Sequence[Artifact | str | Path], names: Sequence[str], progress: Progress
) -> list[_Model]:
    if names and len(names) != len(models):
        raise UsageError("names must be as many as models")
    found: list[_Model] = []
    for number, given in enumerate(models):
        artifact = None
        if isinstance(given, Artifact) or not Path(given).is_file():
            artifact = given if isinstance(given, Artifact) else Artifact.open(given)
            artifact.verify_sizes()
        path = artifact.model_path if artifact else Path(str(given))
        shown = artifact.path if artifact else path
        file = graph_file.read(path)
        called = names[number] if names else shown.resolve().name
        name = unique(called, [model.facts.name for model in found])
        flops: float | None = None
        why = ""
        try:
            flops = file.cost().flops
        except EdgekitError as error:
            why = error.message  # nobody can say how near the limits it comes; the times stand
        facts = ModelFacts(
            name=name,
            sha256=hashed(path, name, progress),
            size_bytes=file.size_bytes,
            type=artifact.manifest.recipe.type if artifact else file.stands,
            architecture=file.producer,
            parameters=file.parameters,
        )
        runtime = (runtime_of(artifact) if artifact else None) or RUNTIME_OF_FORMAT[file.format]
        found.append(
            _Model(path.absolute(), facts, flops, file.weight_bytes, why, file.format, runtime)
        )
    return found


def _sides(
    children: ExitStack,
    plans: Sequence[tuple[_Model, str, int | None, int]],
    progress: Progress,
) -> list[_Side]:
    _check_memory([model for model, *_ in plans])
    sides: list[_Side] = []
    for number, (model, runtime, count, batch) in enumerate(plans):
        progress("load", number, len(plans))
        # One measurement of the threads serves all batches of a model.
        known = [s.n_threads for s in sides if s.model is model and s.runtime == runtime]
        side = _Side(
            model,
            runtime,
            count or next(iter(known), None),
            batch,
            Child(f"{model.facts.name}, batch {batch}"),
        )
        children.callback(side.child.close)
        side.open()
        sides.append(side)
    progress("load", len(plans), len(plans))
    return sides


def _check_memory(models: Sequence[_Model]) -> None:
    """All processes live at one time: each with its weights twice (repacked) and the engine."""
    free = free_bytes()
    needed = sum(COPIES * model.facts.size_bytes + CHILD_BYTES for model in models)
    if free is not None and needed > free:
        raise UsageError(
            f"{len(models)} settings need {needed >> 20} MiB at one time, {free >> 20} are free",
            hint="bench fewer models, threads or batches",
        )


def _operators(side: _Side, progress: Progress) -> list[OperatorRow]:
    progress("profile", 0, 1)
    found = side.child.ask(
        "profile_tensors",
        path=str(side.model.path),
        threads=side.n_threads,
        runtime_name=side.runtime,
    )
    progress("profile", 1, 1)
    total = sum(ms for _, _, ms in found) or 1.0
    name = side.model.facts.name
    return [OperatorRow(name, kind, count, ms, ms / total) for kind, count, ms in found]


def _what_to_mind(report: LatencyReport) -> list[str]:
    found = []
    if report.before.load_1m is not None and report.before.load_1m > _BUSY_LOAD:
        load = report.before.load_1m
        found.append(f"the load average was {load:.2f} before the first measurement")
    if report.busy:
        found.append(f"the machine was busy: {report.busy}")
    if any(row.throttled for row in report.rows):
        found.append("the processor was throttled during the run: the figures are too high")
    found += [f"the firmware says: {words}" for words in report.after.throttling or ()]
    for row in report.rows:
        first = report.beside(row)
        if first is not None and row.times_faster_than(first).high < 1:
            found.append(f"{row.model} is slower than {first.model} with batch {row.batch}")
    return found


def _judged(report: LatencyReport, progress: Progress) -> LatencyReport:
    """A verdict on every row whose arithmetic is known."""
    counts = sorted({row.n_threads for row in report.rows if row.flops})
    if not counts:
        return report
    try:
        limits = {row.n_threads: row for row in probe.limits(counts, progress=progress).rows}
    except EdgekitError as error:
        remark = f"no verdict: {error.message}"
        return replace(report, remarks=(*report.remarks, remark))
    verdicts = [
        _verdict(report, name, limits) for name in dict.fromkeys(row.model for row in report.rows)
    ]
    return replace(report, verdicts=tuple(each for each in verdicts if each))


def _verdict(report: LatencyReport, name: str, limits: dict[int, probe.Limit]) -> VerdictRow | None:
    rows = [row for row in report.rows if row.model == name and row.flops]
    if not rows:
        return None
    parts = [_shares(row, limits[row.n_threads]) for row in rows]
    compute, memory = parts[0]
    kind, share = _kind(compute, memory)
    words = {
        "compute": f"compute-bound at {compute:.0%} of this machine's float32 peak",
        "memory": f"memory-bound: weights alone take {memory:.0%} of the bandwidth",
        "overhead": f"overhead-bound: {compute:.0%} of the float32 peak and {memory:.0%} of the"
        " bandwidth are in use",
    }
    evidence = [
        f"-t {row.n_threads} batch {row.batch}: {row.items_s * (row.flops or 0) / 1e9:.1f} GFLOP/s"
        f" is {compute:.0%} of the measured {limits[row.n_threads].flops_s / 1e9:.0f}; weights"
        f" at {memory:.0%} of the measured {limits[row.n_threads].read_bytes_s / 1e9:.1f} GB/s"
        for row, (compute, memory) in zip(rows, parts, strict=True)
    ]
    return VerdictRow(
        model=name,
        kind=kind,
        share=share,
        sentence=words[kind],
        rows=(),
        evidence=tuple(evidence),
        advice=tuple(_advice(rows)),
    )


def _shares(row: LatencyRow, limit: probe.Limit) -> tuple[float, float]:
    """Of the float32 peak, and of the bandwidth for weights that are read once a run."""
    seconds = row.ms(50) / 1e3
    flops = row.batch * (row.flops or 0.0)
    return flops / seconds / limit.flops_s, row.weight_bytes / seconds / limit.read_bytes_s


def _kind(compute: float, memory: float) -> tuple[str, float | None]:
    if max(compute, memory) < _NEAR:
        return "overhead", None
    return ("compute", compute) if compute >= memory else ("memory", memory)


def _advice(rows: Sequence[LatencyRow]) -> list[str]:
    """What the other rows show: more threads, larger batches."""
    found = []
    first = rows[0]
    for row in rows[1:]:
        gain = row.items_s / first.items_s
        if row.batch != first.batch and row.n_threads == first.n_threads:
            found.append(f"batch {row.batch}: {gain:.2f} times the inputs of batch {first.batch}")
        elif row.n_threads != first.n_threads and row.batch == first.batch:
            found.append(f"{row.n_threads} threads: {gain:.2f} times {first.n_threads}")
    return found


def _mean(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None
