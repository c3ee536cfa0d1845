"""A report as rows of text: Markdown for readers, CSV for spreadsheets.

Knows a report's figures and how precise they deserve to be shown; never files or terminals.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Sequence

from edgekit.latency_report import LatencyReport
from edgekit.report import BenchReport, BenchRow, SessionRow
from edgekit.telemetry import Moment

HEAD = ("model", "threads", "kv", "test", "tok/s", "±", "p50 ms", "p95 ms", "p99 ms", "peak RSS")
SESSION_HEAD = ("model", "threads", "load cold", "load warm", "TTFT", "decode tok/s", "peak RSS")
_MIB = 1 << 20


def head(report: BenchReport) -> tuple[str, ...]:
    """The columns of ``cells``; energy and predictions only where there are any."""
    return _head(_has_energy(report), _has_prediction(report))


def cells(report: BenchReport) -> list[tuple[str, ...]]:
    """One line a row; milliseconds are those of a token."""
    energy, prediction = _has_energy(report), _has_prediction(report)
    return [_cells(row, energy=energy, prediction=prediction) for row in report.rows]


def _head(energy: bool, prediction: bool) -> tuple[str, ...]:
    return HEAD + ("predicted",) * prediction + ("J/token",) * energy


def _has_prediction(report: BenchReport) -> bool:
    return any(row.predicted_tok_s for row in report.rows)


def _prediction(row: BenchRow) -> str:
    """``12.3 (+4%)``: the prediction, and how far the measurement is from it."""
    if not row.predicted_tok_s:
        return "-"
    mid = row.predicted_tok_s[1]
    return f"{figure(mid)} ({row.tok_s / mid - 1:+.0%})" if mid else "-"


def _has_energy(report: BenchReport) -> bool:
    return any(row.energy_j is not None for row in report.rows)


def _cells(row: BenchRow, *, energy: bool, prediction: bool) -> tuple[str, ...]:
    line = (
        row.model,
        str(row.n_threads),
        row.kv_type,
        row.test,
        figure(row.tok_s),
        figure(row.tok_s_sd, beside=row.tok_s),
        *(figure(row.ms_per_token(percent)) for percent in (50, 95, 99)),
        mib(row.peak_rss_bytes),
    )
    if prediction:
        line = (*line, _prediction(row))
    if energy:
        joules = row.energy_j_per_token
        line = (*line, "-" if joules is None else figure(joules))
    return line


def session_cells(rows: Sequence[SessionRow]) -> list[tuple[str, ...]]:
    """One line a session: what a user of ``edgekit.load`` waits for."""
    return [
        (
            row.model,
            str(row.n_threads),
            "-" if row.cold_load_s is None else f"{row.cold_load_s:.2f} s",
            f"{row.warm_load_s:.2f} s",
            f"{1e3 * statistics.median(row.ttft_s):.0f} ms" if row.ttft_s else "-",
            figure(statistics.fmean(row.decode_tok_s)) if row.decode_tok_s else "-",
            mib(row.peak_rss_bytes),
        )
        for row in rows
    ]


def figure(value: float, beside: float | None = None) -> str:
    """Three digits that count: ``0.0123``, ``1.23``, ``12.3``, ``1234``.

    A spread has as many decimals as the figure that it stands ``beside``.
    """
    scale = abs(value if beside is None else beside)
    if scale >= 1 or beside is not None:
        return f"{value:.{0 if scale >= 99.95 else 1 if scale >= 9.995 else 2}f}"
    return f"{value:.3g}"


def mib(size_bytes: int | None) -> str:
    """``189 MiB``, or a dash."""
    return "-" if size_bytes is None else f"{size_bytes / _MIB:.0f} MiB"


def machine_lines(report: BenchReport | LatencyReport) -> Iterator[tuple[str, str]]:
    """What the report was taken on, as (name, value)."""
    machine = report.machine
    if report.device:
        yield "device", report.device
    if machine.emulated:
        yield "emulated", "yes: these times say nothing of a real board"
    if machine.board:
        yield "board", machine.board
    yield "processor", f"{machine.cpu or machine.architecture}, {machine.cores} cores"
    if machine.usable_cores != machine.cores:
        yield "usable cores", str(machine.usable_cores)
    if machine.memory_bytes:
        yield "memory", f"{machine.memory_bytes / (1 << 30):.1f} GiB"
    yield "kernel", machine.kernel
    for engine in (report.engine, *getattr(report, "other_engines", ())):
        yield "engine", f"{engine.name} {engine.version}, {engine.backend or 'fixed CPU backend'}"
    yield "edgekit", report.edgekit
    if report.profile:
        yield "predicted for", f"profile {report.profile}, tok/s (measured against it)"
    before, after = report.before, report.after
    if before.governor:
        yield "governor", before.governor
    for name, unit in (("load_1m", ""), ("clock_mhz", " MHz"), ("temperature_c", " °C")):
        first, last = getattr(before, name), getattr(after, name)
        if first is not None and last is not None:
            words = {"load_1m": "load", "clock_mhz": "clock", "temperature_c": "temperature"}
            yield words[name], f"{first:.4g}{unit} before, {last:.4g}{unit} after"
    if after.throttling is not None:
        yield "throttling", ", ".join(after.throttling) or "none"
    yield from _during(report.moments)
    if report.energy_note:
        yield "energy", f"not measured: {report.energy_note}"
    for model in report.models:
        size = f"{model.size_bytes / 1e6:.1f} MB"
        yield f"file of {model.name}", f"{size}, {model.type}, SHA-256 {model.sha256}"


def _during(moments: Sequence[Moment]) -> Iterator[tuple[str, str]]:
    """The range of what was looked at every second, where a second look was possible."""
    for field, words, unit, factor in (
        ("temperature_c", "temperature", " °C", 1),
        ("clock_mhz", "clock", " MHz", 1),
        ("power_w", "power", " W", 1),
        ("available_bytes", "free memory", " MiB", 1 / _MIB),
        ("memory_pressure", "waited for memory", " %", 1),
        ("io_pressure", "waited for the disk", " %", 1),
    ):
        seen = [value * factor for m in moments if (value := getattr(m, field)) is not None]
        if len(seen) > 1 and (max(seen) > 0 or unit != " %"):
            mean = f", {statistics.fmean(seen):.2f}{unit} on average" if field == "power_w" else ""
            low, high = (
                f"{value:,.{1 if value < 100 else 0}f}" for value in (min(seen), max(seen))
            )
            yield f"{words} during it", f"{low} to {high}{unit}{mean}"
    words_seen = {word for moment in moments for word in moment.throttling or ()}
    if words_seen:
        slow = sum(bool(moment.throttling) for moment in moments)
        yield "throttled", f"{slow} of {len(moments)} s: {', '.join(sorted(words_seen))}"


def side_by_side(reports: dict[str, BenchReport]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and lines of one table for the same bench on several devices."""
    energy = any(_has_energy(report) for report in reports.values())
    prediction = any(_has_prediction(report) for report in reports.values())
    columns = ("device", *_head(energy, prediction))
    lines = []
    for name, report in reports.items():
        for row in report.rows:
            mark = " (emulated)" if report.machine.emulated else ""
            mark += " (throttled)" if row.throttled else ""
            lines.append((name + mark, *_cells(row, energy=energy, prediction=prediction)))
    return columns, lines


def markdown(report: BenchReport) -> str:
    """The whole report for readers."""
    parts = [_table(head(report), cells(report))]
    if report.sessions:
        parts.append(
            "Through `edgekit.load`:\n\n" + _table(SESSION_HEAD, session_cells(report.sessions))
        )
    for verdict in report.verdicts:
        lines = [f"**{_plain(verdict.model)}: {_plain(verdict.sentence)}**", ""]
        lines += [
            f"- {_plain(text)}" for text in (*verdict.evidence, *verdict.advice, *verdict.rows)
        ]
        parts.append("\n".join(lines))
    notes = [f"- {_plain(remark)}" for remark in report.remarks]
    if notes:
        parts.append("To mind:\n\n" + "\n".join(notes))
    parts.append(_table(("taken", report.taken_at), list(machine_lines(report))))
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that means nothing to Markdown where it stands in a table or a list."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


_COLUMNS = (
    *("model", "model_type", "size_bytes", "n_threads", "n_prompt", "n_gen", "n_depth", "n_batch"),
    *("n_seqs", "kv_type", "flash_attention", "tok_s", "tok_s_sd"),
)


def as_csv(report: BenchReport) -> str:
    """One line a row, with the settings, the figures, and the model's hash."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    percents = (50, 95, 99)
    writer.writerow(
        [
            *_COLUMNS,
            *(f"ms_per_token_p{percent}" for percent in percents),
            *("repetitions", "outliers", "peak_rss_bytes", "energy_j_per_token"),
            *("others_share", "steal_share", "throttled", "throttled_repetitions"),
            *("model_sha256", "cpu", "engine_version", "device", "emulated"),
        ]
    )
    for row in report.rows:
        line = [
            *(getattr(row, name) for name in _COLUMNS),
            *(row.ms_per_token(percent) for percent in percents),
            *(len(row.samples_s), len(row.outliers), row.peak_rss_bytes, row.energy_j_per_token),
            *(row.others_share, row.steal_share, row.throttled, len(row.throttled_s)),
            *(report.model(row.model).sha256, report.machine.cpu, report.engine.version),
            *(report.device, report.machine.emulated),
        ]
        writer.writerow([_safe(cell) for cell in line])
    return out.getvalue()


def _safe(cell: object) -> object:
    """Spreadsheets run text that begins like a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in "=+-@" else cell
