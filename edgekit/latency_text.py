"""A latency report as text: the cells of its tables, CSV and Markdown.

Knows words and order; never how anything was measured, nor what a terminal is.
"""

from __future__ import annotations

import csv
import io
import math

from edgekit.intervals import Interval
from edgekit.latency_report import LatencyReport
from edgekit.report_text import machine_lines

_HEAD = (
    *("model", "type", "MB", "runtime", "threads", "batch"),
    *("p50 ms", "p95", "p99", "inputs/s", "RSS MiB"),
)
OPERATOR_HEAD = ("operator", "count", "ms", "share")
_MOST_OPERATORS = 12


def head(report: LatencyReport) -> tuple[str, ...]:
    """The columns; with several models or runtimes one compares them with the first."""
    if not _compares(report):
        return _HEAD
    first = report.rows[0]
    runtimes = {row.runtime for row in report.rows}
    return (*_HEAD, f"times {first.model}" + (f" in {first.runtime}" if len(runtimes) > 1 else ""))


def _compares(report: LatencyReport) -> bool:
    return len({(row.model, row.runtime) for row in report.rows}) > 1


def cells(report: LatencyReport) -> list[tuple[str, ...]]:
    """A line for every row."""
    found = []
    for row in report.rows:
        facts = report.model(row.model)
        line = [row.model, facts.type, f"{facts.size_bytes / 1e6:.1f}"]
        line += [row.runtime, str(row.n_threads), str(row.batch)]
        line += [f"{row.ms(percent):.3g}" for percent in (50, 95, 99)]
        rss = row.peak_rss_bytes
        line += [f"{row.items_s:.1f}", "?" if rss is None else f"{rss / (1 << 20):.0f}"]
        if _compares(report):
            first = report.beside(row)
            faster = first and row.times_faster_than(first)
            line.append(_times(faster) if faster else "")
        found.append(tuple(line))
    return found


def _times(faster: Interval) -> str:
    text = f"{faster.value:.2f}"
    if math.isfinite(faster.low):
        text += f" ({faster.low:.2f} to {faster.high:.2f})"
    return text


def operator_cells(report: LatencyReport, model: str) -> list[tuple[str, ...]]:
    """Where the time of a model goes, the longest first; what is left in one line."""
    rows = [row for row in report.operators if row.model == model]
    found: list[tuple[str, ...]] = [
        (row.operator, str(row.count), f"{row.ms:.3f}", f"{row.share:.1%}")
        for row in rows[:_MOST_OPERATORS]
    ]
    if rest := rows[_MOST_OPERATORS:]:
        counted = str(sum(row.count for row in rest))
        ms, share = sum(row.ms for row in rest), sum(row.share for row in rest)
        found.append((f"{len(rest)} more", counted, f"{ms:.3f}", f"{share:.1%}"))
    return found


def as_csv(report: LatencyReport) -> str:
    """The table, and nothing else."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head(report))
    writer.writerows(cells(report))
    return file.getvalue()


def markdown(report: LatencyReport) -> str:
    """The table, the verdicts, where the time goes, and what it was taken on."""
    lines = _table(head(report), cells(report))
    for verdict in report.verdicts:
        lines += ["", f"**{verdict.model}: {verdict.sentence}**", ""]
        lines += [f"- {line}" for line in (*verdict.evidence, *verdict.advice)]
    for model in report.models:
        if rows := operator_cells(report, model.name):
            lines += ["", f"{model.name}, by kind of operator:", "", *_table(OPERATOR_HEAD, rows)]
    lines += ["", *_table(("", ""), list(machine_lines(report)))]
    lines += ["", *(f"- {remark}" for remark in report.remarks)]
    return "\n".join(lines).rstrip() + "\n"


def _table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [names, ("---",) * len(names), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
