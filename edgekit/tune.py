"""The fastest honest deployment of a model on a machine: types and runtimes tried in turn.

Knows what to try, what a candidate must keep, and which one wins; how a type is made is the
exporters' business, how it is timed that of ``latency``, here or on a board.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgekit import _fs, preprocess, quant, sample_inputs
from edgekit.artifact import Artifact
from edgekit.errors import GateError, InferenceError, UsageError
from edgekit.exporter import Admission, Progress, export, no_progress
from edgekit.intervals import Interval
from edgekit.latency import latency
from edgekit.latency_report import LatencyReport, LatencyRow
from edgekit.receipt import Agreement, Gates, Tuning, Variant
from edgekit.registry import OTHER_RUNTIMES, RUNTIME_OF_FORMAT, RUNTIMES
from edgekit.remote_tensors import latency_on
from edgekit.runtime import LoadParams
from edgekit.runtimes import tensor_agreement
from edgekit.source import ModelSource
from edgekit.source import source as resolve_source
from edgekit.target import open_target

GOALS = ("latency", "size", "accuracy")
_FORMAT = "onnx"
_FLOAT = "F32"
# Convolutions with dynamic ranges, and weights alone in 8 bits, have no fast kernel in either
# engine: those types are tried on models of matrix products.
_TYPES = {
    "convolutions": (_FLOAT, "static_wi8_ai8"),
    "products": (
        *(_FLOAT, "dynamic_wi8_afp32", "static_wi8_ai8"),
        *("weight_only_wi8_afp32", "weight_only_wi4b32"),
    ),
}
HEAD = ("", "type", "runtime", "MB", "ms", "times float", "cosine", "same", "")
_TURNS = 5
_RACED = "auto"  # Recipe.fusion: passes that are slower are left out
_SLOWER = 1.02  # as exporters/fusion.py drops a pass here
_SAMPLES = 64
# Without gates of the user's a candidate must keep the one or, if it classifies, the other.
_LEAST_COSINE, _LEAST_CLASSES = 0.995, 0.93


@dataclass(frozen=True)
class _Candidate:
    artifact: Artifact
    type: str


def tune(
    model: str | Path | ModelSource,
    goal: str,
    *,
    out: str | Path,
    gates: Gates | None = None,
    eval_data: str | Path | None = None,
    calibration: str | Path | None = None,
    chunks: int | None = None,
    fusion: str = "auto",
    admit: Admission | None = None,
    device: str | None = None,
    progress: Progress = no_progress,
) -> Artifact:
    """Export ``model`` to ONNX in every sensible type, run each in every installed runtime, and
    keep the best for ``goal`` (one of ``GOALS``) at ``out``, with a receipt that holds the table.

    The times are those of ``device``, a name as ``open_target`` takes it, or of this machine; there
    a gate on speed is one on these times. Answers are judged here: a file has the same everywhere
    but for rounding.

    A candidate must pass ``gates``; without one on likeness it must keep a mean cosine of 0.995 or
    93% of the classes. One that is slower than the fastest float is chosen for its size alone, and
    the receipt warns of it. ``runtime.load`` takes the runtime that won. ``admit``, that of
    ``export``, sees the one that won alone.
    Raises UsageError, GateError where no candidate passes, and what ``export`` raises.
    """
    if goal not in GOALS:
        raise UsageError(f"--optimize-for must be one of {', '.join(GOALS)}, not {goal}")
    gates = gates or Gates()
    source = model if isinstance(model, ModelSource) else resolve_source(str(model))
    data = Path(eval_data) if eval_data is not None else None
    options = {"calibration": calibration, "chunks": chunks}
    out = Path(out)
    race_on = device if fusion == _RACED else None
    if race_on is not None:
        fusion = ",".join(_passes())
    if device is not None:
        with open_target(device) as target:
            target.identify()  # who is not there is told before the work
    with _fs.scratch(out.absolute().with_name(f"{out.name}.tuning")) as folder:
        candidates = _made(source, folder, options, fusion, progress)
        runtimes = _runtimes(device)
        refused = _refused(candidates, runtimes)
        report = _timed(candidates, runtimes, refused, device, progress)
        variants = _judged(candidates, report, gates, data, progress)
        chosen = best(variants, goal)
        if chosen is None:
            raise GateError(
                "no variant passes: "
                + "; ".join(f"{v.type} in {v.runtime}: {v.why_not}" for v in variants),
                hint="nothing was kept; choose other gates, or export one --type",
            )
        if race_on is not None:
            (whole,) = (each.artifact for each in candidates if each.type == chosen.type)
            fusion = _not_slower(whole, source, options, race_on, progress)
    threads = next(
        row.n_threads
        for row in report.rows
        if (row.model, row.runtime) == (chosen.type, chosen.runtime)
    )
    tuning = Tuning(
        goal,
        chosen.runtime,
        threads,
        report.machine.cpu or report.machine.architecture,
        tuple(variants),
        tuple(f"{kind} in {runtime}: {why}" for (kind, runtime), why in refused.items()),
        report.device,
    )
    if device is not None:
        gates = replace(gates, min_speed_ratio=None)  # judged there, and not here
    return export(
        source,
        _FORMAT,
        out=out,
        type=chosen.type,
        fusion=fusion,
        gates=gates,
        eval_data=eval_data,
        tuning=tuning,
        admit=admit,
        progress=progress,
        **_for_type(options, chosen.type),
    )


def _passes() -> list[str]:
    """Names of all passes of kernel fusion, in their order."""
    from edgekit.exporters import passes

    return list(passes.PASSES)


def _not_slower(
    whole: Artifact,
    source: ModelSource,
    options: dict[str, Any],
    device: str,
    progress: Progress,
) -> str:
    """The passes of ``whole`` that are not slower on ``device``, in the words of Recipe.fusion: its
    graph runs there in turns with those that lack one pass each.
    """
    from edgekit.exporters import passes

    fired = whole.manifest.details["passes"]
    raced = [name for name in _passes() if fired.get(name) and name not in passes.UNMEASURED]
    kind = whole.manifest.recipe.type
    lacking = {
        name: export(
            source,
            _FORMAT,
            out=whole.path.with_name(f"{kind}-without-{name}"),
            type=kind,
            fusion=",".join(each for each in _passes() if each != name),
            receipt=False,
            progress=partial(_told, progress, f"without {name}"),
            **_for_type(options, kind),
        ).path
        for name in raced
    }
    if not lacking:
        return whole.manifest.recipe.fusion
    with open_target(device) as target:
        report = latency_on(
            target,
            *(whole.path, *lacking.values()),
            runtimes=_runtimes(device),
            repetitions=_TURNS,
            probe_limits=False,
            progress=progress,
        )
    first, *others = report.rows
    slower = slower_passes(first, dict(zip(lacking, others, strict=True)))
    return ",".join(name for name in _passes() if name not in slower)


def slower_passes(whole: LatencyRow, lacking: Mapping[str, LatencyRow]) -> set[str]:
    """Those without which the graph is faster: by more than chance, and by 2% at the least."""
    gains = {name: row.times_faster_than(whole) for name, row in lacking.items()}
    return {name for name, gain in gains.items() if gain.low > 1 and gain.value > _SLOWER}


def _for_type(options: dict[str, Any], kind: str) -> dict[str, Any]:
    """Those of the calibration, where ``kind`` looks at inputs."""
    takes = kind in quant.TAKES_SAMPLES
    return {name: value for name, value in options.items() if takes and value is not None}


def _runtimes(device: str | None) -> list[str]:
    """Those for ONNX files that are installed, the usual one first; a board has no other."""
    usual = RUNTIME_OF_FORMAT[_FORMAT]
    if device is not None:
        return [usual]
    return [usual, *(name for name in OTHER_RUNTIMES[_FORMAT] if RUNTIMES.installed(name))]


def _made(
    source: ModelSource,
    folder: Path,
    options: dict[str, Any],
    fusion: str,
    progress: Progress,
) -> list[_Candidate]:
    """An artifact a type, without receipts; the float one first."""
    found: list[_Candidate] = []
    kinds: Sequence[str] = (_FLOAT,)
    made = 0
    while made < len(kinds):
        kind = kinds[made]
        artifact = export(
            source,
            _FORMAT,
            out=folder / kind,
            type=kind,
            fusion=fusion,
            receipt=False,
            progress=partial(_told, progress, kind),
            **_for_type(options, kind),
        )
        found.append(_Candidate(artifact, kind))
        if made == 0:  # what the graph is made of says which types make sense
            from edgekit.exporters.onnx_graph import is_convolutional

            convolutional = is_convolutional(artifact.model_path)
            kinds = _TYPES["convolutions" if convolutional else "products"]
        made += 1
    return found


def _timed(
    candidates: Sequence[_Candidate],
    runtimes: Sequence[str],
    refused: dict[tuple[str, str], str],
    device: str | None,
    progress: Progress,
) -> LatencyReport:
    """All variants in turns, on ``device`` or here."""
    how: dict[str, Any] = {"runtimes": runtimes, "repetitions": _TURNS, "probe_limits": False}
    if device is None:
        return latency(
            *(each.artifact for each in candidates),
            names=[each.type for each in candidates],
            without=refused,
            progress=progress,
            **how,
        )
    bad = {kind for kind, _ in refused}
    paths = [each.artifact.path for each in candidates if each.type not in bad]  # named as types
    with open_target(device) as target:
        return latency_on(target, *paths, progress=progress, **how)


def _refused(
    candidates: Sequence[_Candidate], runtimes: Sequence[str]
) -> dict[tuple[str, str], str]:
    """(type, runtime) -> why that engine does not run it."""
    found = {}
    for each in candidates:
        for name in runtimes:
            try:
                session = RUNTIMES.load(name)().load(each.artifact.model_path, LoadParams())
                with session:
                    feed = sample_inputs.batch(each.artifact.model_path, session.inputs, 1)
                    session.run(feed)
            except InferenceError as error:
                found[each.type, name] = error.message
    return found


def _told(progress: Progress, kind: str, stage: str, done: int, total: int) -> None:
    progress(f"{kind}: {stage}", done, total)


def _judged(
    candidates: Sequence[_Candidate],
    report: LatencyReport,
    gates: Gates,
    data: Path | None,
    progress: Progress,
) -> list[Variant]:
    """Every row of ``report`` as a variant, with what keeps it from being chosen."""
    by_type = {each.type: each.artifact for each in candidates}
    floats = [row for row in report.rows if row.model == _FLOAT]
    fastest = min(floats, key=lambda row: row.ms(50))
    usual = RUNTIMES.load(RUNTIME_OF_FORMAT[_FORMAT])()
    found = []
    with usual.load(by_type[_FLOAT].model_path, LoadParams()) as reference:
        for row in report.rows:
            artifact = by_type[row.model]
            engine = RUNTIMES.load(row.runtime)()
            stage = partial(_told, progress, f"{row.model} in {row.runtime}")
            with engine.load(artifact.model_path, LoadParams()) as session:
                agreement = _agreement(session, reference, artifact, data, stage)
            found.append(_variant(row, fastest, artifact, agreement, gates))
    return found


def _agreement(
    session: Any, reference: Any, artifact: Artifact, data: Path | None, progress: Progress
) -> Agreement:
    steps = preprocess.beside(artifact.model_path)
    held_out = sample_inputs.samples(
        steps,
        session.inputs,
        folder=artifact.path,
        data=data,
        count=_SAMPLES,
        part="held-out",
    )
    return tensor_agreement.measure(session, reference, held_out, steps, progress)


def _variant(
    row: LatencyRow, fastest: LatencyRow, artifact: Artifact, agreement: Agreement, gates: Gates
) -> Variant:
    same = agreement.top1 or agreement.neighbours
    ratio = row.times_faster_than(fastest) if row is not fastest else Interval(1.0, 1.0, 1.0)
    reasons = [*_unlike(agreement, gates)]
    if gates.max_size_bytes is not None and artifact.size_bytes > gates.max_size_bytes:
        reasons.append(f"{artifact.size_bytes / 1e6:.1f} MB")
    if gates.min_speed_ratio is not None and ratio.value < gates.min_speed_ratio:
        reasons.append(f"{ratio.value:.2f}x the speed of float")
    slower = row is not fastest and ratio.value < 1
    return Variant(
        type=row.model,
        runtime=row.runtime,
        size_bytes=artifact.size_bytes,
        ms=row.ms(50),
        ratio=ratio,
        cosine=agreement.cosine.value,
        same=same.value if same else None,
        why_not="; ".join(reasons),
        slower=slower,
    )


def _unlike(agreement: Agreement, gates: Gates) -> list[str]:
    """How the answers miss what they must keep."""
    cosine, top1 = agreement.cosine.value, agreement.top1
    if gates.min_cosine is None and gates.min_top1 is None and gates.max_kld is None:
        classes = top1 is not None and top1.value >= _LEAST_CLASSES
        missed = cosine < _LEAST_COSINE and not classes
        return [f"cosine {cosine:.3f} is below {_LEAST_COSINE}"] if missed else []
    found = []
    if gates.min_cosine is not None and cosine < gates.min_cosine:
        found.append(f"cosine {cosine:.3f} is below {gates.min_cosine:g}")
    if gates.min_top1 is not None and (top1 is None or top1.value < gates.min_top1):
        share = "no classes" if top1 is None else f"same class {top1.value:.1%}"
        found.append(f"{share}: below {gates.min_top1:.1%}")
    kl = agreement.mean_kl
    if gates.max_kld is not None and (kl is None or kl.value > gates.max_kld):
        found.append(f"mean KL is above {gates.max_kld:g}")
    return found


def best(variants: Sequence[Variant], goal: str) -> Variant | None:
    """The winner among those that nothing speaks against; float where nothing else is faster."""
    passing = [each for each in variants if not each.why_not]
    quick = [each for each in passing if not each.slower]
    if goal == "size":
        return min(passing, key=lambda v: (v.size_bytes, v.ms), default=None)
    if goal == "latency":
        return min(quick, key=lambda v: v.ms, default=None)
    smaller = [each for each in quick if each.type != _FLOAT]
    return max(smaller or quick, key=lambda v: (round(v.cosine, 4), -v.ms), default=None)


def table(tuning: Tuning) -> list[tuple[str, ...]]:
    """What was tried as lines of text; the one that was chosen is marked."""
    chosen = best(tuning.variants, tuning.goal)
    return [
        (
            "*" if each is chosen else "",
            each.type,
            each.runtime,
            f"{each.size_bytes / 1e6:.1f}",
            f"{each.ms:.3g}",
            f"{each.ratio.value:.2f} ({each.ratio.low:.2f} to {each.ratio.high:.2f})",
            f"{each.cosine:.4f}",
            "" if each.same is None else f"{each.same:.1%}",
            "; ".join(filter(None, ("SLOWER than float" if each.slower else "", each.why_not))),
        )
        for each in tuning.variants
    ]
