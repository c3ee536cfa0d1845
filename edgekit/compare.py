"""Is B faster or slower than A, or does the noise say nothing? Every ratio with its interval.

Knows reports alone; never measures, and refuses reports that cannot be compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.errors import GateError, UsageError
from edgekit.intervals import Interval, paired, t_quantile
from edgekit.report import BenchReport, MachineFacts

CONFIDENCE = 0.95
# Two runs at different times differ by about this much (a standard deviation) though nothing
# changed: where the pages lie, how warm the board is. Their own repetitions cannot show it.
_RUN_TO_RUN = 0.01


@dataclass(frozen=True)
class Compared:
    """One setting. ``ratio`` is B's speed over A's; above 1 is faster."""

    label: str
    a: float
    b: float
    unit: str
    ratio: Interval

    @property
    def finding(self) -> str:
        """ "faster", "slower" or "no difference shown": whether the interval excludes 1."""
        if self.ratio.low > 1:
            return "faster"
        return "slower" if self.ratio.high < 1 else "no difference shown"


@dataclass(frozen=True)
class Comparison:
    """``paired``: both were measured together, round by round. The intervals hold for all rows at
    once with 95% (Bonferroni). ``notes`` say what else differs.
    """

    a: str
    b: str
    paired: bool
    rows: tuple[Compared, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            vars(row) | {"ratio": row.ratio.to_dict(), "finding": row.finding} for row in self.rows
        ]
        return vars(self) | {"confidence": CONFIDENCE, "rows": rows, "notes": list(self.notes)}


@dataclass(frozen=True)
class _Series:
    """The repetitions of one setting, as speeds."""

    label: str
    speeds: tuple[float, ...]
    unit: str


def within(report: BenchReport) -> Comparison:
    """The second model of a report against its first: measured together, compared in pairs.

    Raises UsageError for another number of models, or a throttled run.
    """
    if len(report.models) != 2:
        raise UsageError(f"a comparison needs two models, the report has {len(report.models)}")
    if report.throttled:
        raise UsageError(
            "not comparable: the processor was throttled", hint="let it cool down, then repeat"
        )
    first, second = (model.name for model in report.models)
    rows = _compared(_series(report, first), _series(report, second), in_pairs=True)
    notes = [f"the machine was busy, for both alike: {report.busy}"] if report.busy else []
    return Comparison(first, second, True, rows, tuple(notes))


def between(a: BenchReport, b: BenchReport, names: tuple[str, str]) -> Comparison:
    """One report against an earlier one; ``names`` are what to call them.

    Another version of the engine or of edgekit is comparable: that is what regressions are about.
    Raises UsageError where machines, settings or conditions differ, and says why.
    """
    reasons = [*_other_machine(a.machine, b.machine)]
    if a.before.governor != b.before.governor:
        reasons.append(f"other governor ({a.before.governor} and {b.before.governor})")
    for report, name in zip((a, b), names, strict=True):
        reasons += _disturbances(report, name)
    _refuse(reasons)
    pairs = _matched(a, b)
    ones: dict[Any, _Series] = {}
    others: dict[Any, _Series] = {}
    for first, second in pairs:
        prefix = f"{first}: " if len(pairs) > 1 else ""
        ones |= {(first, *key): s for key, s in _series(a, first, prefix).items()}
        others |= {(first, *key): s for key, s in _series(b, second, prefix).items()}
    return Comparison(
        *names, False, _compared(ones, others, in_pairs=False), tuple(_notes(a, b, pairs))
    )


def check(report: BenchReport, name: str, here: MachineFacts) -> None:
    """Raises UsageError if nothing that is measured ``here`` could be compared with ``report``."""
    _refuse([*_other_machine(report.machine, here), *_disturbances(report, name)])


def gate(comparison: Comparison, limit: float) -> list[str]:
    """Hold B to being at most ``limit`` (0.05: 5%) slower than A in every row.

    A row fails where B is slower by more than the limit *and* its interval excludes no difference:
    noise alone fails nothing. Returns sentences on rows where the noise hides what was asked.
    Raises GateError.
    """
    failed, hidden = [], []
    for row in comparison.rows:
        low, high = (f"{_slower(end):.1%}" for end in (row.ratio.high, row.ratio.low))
        if row.finding == "slower" and row.ratio.value < 1 - limit:
            words = f"{row.label} is {_slower(row.ratio.value):.1%} slower ({low} to {high})"
            failed.append(words)
        elif row.ratio.low < 1 - limit:
            hidden.append(
                f"{row.label}: too noisy to tell whether {comparison.b} is {limit:.1%} slower; the"
                f" truth may be {high} slower. Take more repetitions, or a quieter machine"
            )
    if failed:
        raise GateError(
            f"{comparison.b} against {comparison.a}: {'; '.join(failed)}; allowed are {limit:.1%}"
        )
    return hidden


def _slower(ratio: float) -> float:
    return 1 - ratio


def _series(report: BenchReport, model: str, prefix: str = "") -> dict[Any, _Series]:
    """All that can be compared, by setting."""
    found: dict[Any, _Series] = {}
    for row in report.rows_of(model):
        label = f"{prefix}{row.test} -t {row.n_threads} kv {row.kv_type}"
        found["engine", *row.setting] = _Series(label, tuple(row.speeds), "tok/s")
    for session in report.sessions:
        if session.model != model:
            continue
        setting = (session.n_threads, session.kv_type, session.n_depth)
        words = f"-t {session.n_threads} kv {session.kv_type}"
        if session.ttft_s:
            speeds = tuple(1 / seconds for seconds in session.ttft_s)
            label = f"{prefix}first token of {session.prompt_tokens} {words}"
            found["first", session.prompt_tokens, *setting] = _Series(label, speeds, "1/s")
        if session.decode_tok_s:
            label = f"{prefix}session tg{session.decode_tokens} {words}"
            series = _Series(label, session.decode_tok_s, "tok/s")
            found["session", session.decode_tokens, *setting] = series
    return found


def _compared(
    ones: dict[Any, _Series], others: dict[Any, _Series], *, in_pairs: bool
) -> tuple[Compared, ...]:
    common = [key for key in ones if key in others]
    if not common:
        raise UsageError(
            "not comparable: no setting was measured on both sides"
            f" ({_labels(ones)} against {_labels(others)})"
        )
    confidence = 1 - (1 - CONFIDENCE) / len(common)
    rows = []
    for key in common:
        one, other = ones[key], others[key]
        a, b = ([math.log(speed) for speed in side.speeds] for side in (one, other))
        if in_pairs and len(a) == len(b):
            change = paired(b, a, confidence)
        else:
            change = _welch(b, a, confidence, apart=not in_pairs)
        ratio = Interval(_exp(change.value), _exp(change.low), _exp(change.high))
        a_mean, b_mean = (statistics.fmean(side.speeds) for side in (one, other))
        rows.append(Compared(one.label, a_mean, b_mean, one.unit, ratio))
    return tuple(rows)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _labels(series: dict[Any, _Series]) -> str:
    labels = [item.label for item in series.values()]
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def _welch(a: Sequence[float], b: Sequence[float], confidence: float, *, apart: bool) -> Interval:
    """``mean(a) - mean(b)`` of samples that are no pairs (B. L. Welch 1947, Biometrika 34).

    https://doi.org/10.1093/biomet/34.1-2.28. ``apart``: two runs, which differ by more than that.
    """
    value = statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < 2:
        return Interval(value, -math.inf, math.inf)
    parts = [statistics.variance(side) / len(side) for side in (a, b)]
    weights = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True))
    degrees = sum(parts) ** 2 / weights if weights else len(a) + len(b) - 2
    error = math.sqrt(sum(parts) + (2 * _RUN_TO_RUN**2 if apart else 0.0))
    half = t_quantile(0.5 + confidence / 2, degrees) * error
    return Interval(value, value - half, value + half)


def _other_machine(a: MachineFacts, b: MachineFacts) -> Iterator[str]:
    for field in ("cpu", "architecture", "cores", "usable_cores", "board"):
        one, other = getattr(a, field), getattr(b, field)
        if one != other:
            yield f"other machine ({field.replace('_', ' ')}: {one} and {other})"


def _disturbances(report: BenchReport, name: str) -> Iterator[str]:
    if report.throttled:
        yield f"the processor was throttled during {name}"
    if report.busy:
        yield f"the machine was busy during {name} ({report.busy})"


def _refuse(reasons: Sequence[str]) -> None:
    if reasons:
        raise UsageError(
            "not comparable: " + "; ".join(reasons),
            hint="measure both again, or both at once: edgekit bench --compare MODEL MODEL",
        )


def _matched(a: BenchReport, b: BenchReport) -> list[tuple[str, str]]:
    """Which model of B stands against which of A."""
    ones, others = ([model.name for model in report.models] for report in (a, b))
    if len(ones) == len(others) == 1:
        return [(ones[0], others[0])]
    common = [name for name in ones if name in others]
    if not common:
        raise UsageError(f"not comparable: no model is in both ({ones} and {others})")
    return [(name, name) for name in common]


def _notes(a: BenchReport, b: BenchReport, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    if a.engine != b.engine:
        yield (
            f"other engine: {a.engine.name} {a.engine.version} ({a.engine.backend}) and"
            f" {b.engine.name} {b.engine.version} ({b.engine.backend})"
        )
    if a.edgekit != b.edgekit:
        yield f"other edgekit: {a.edgekit} and {b.edgekit}"
    if a.machine.kernel != b.machine.kernel:
        yield f"other kernel: {a.machine.kernel} and {b.machine.kernel}"
    for first, second in pairs:
        one, other = a.model(first), b.model(second)
        if one.sha256 != other.sha256:
            yield f"other file: {one.type} {one.sha256[:12]} and {other.type} {other.sha256[:12]}"
