"""Latency reports as files: JSON, CSV, Markdown or a picture, by the file's suffix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekit import bench_files, latency_text, plot
from edgekit.latency_report import LatencyReport

check = bench_files.check
_MOST_OPERATORS = 10


def write(report: LatencyReport, path: Path) -> None:
    """Write ``report`` in the form that the suffix of ``path`` names, whole or not at all.

    Raises UsageError, ExportError, MissingExtraError.
    """
    bench_files.write_form(report, path, latency_text.as_csv, latency_text.markdown, _draw)


def _draw(report: LatencyReport, path: Path) -> None:
    """A bar a row, the 50th percentile with a whisker to the 95th; below, a profile a model."""
    profiled = [m.name for m in report.models if any(o.model == m.name for o in report.operators)]
    heights = [0.9 + 0.4 * len(report.rows)] + [3.4] * len(profiled)
    with plot.figure(path, width_in=7.0, height_in=sum(heights) + 0.6) as drawn:
        grid = drawn.add_gridspec(len(heights), 1, height_ratios=heights)
        axis = drawn.add_subplot(grid[0])
        names = [f"{r.model}  {r.runtime} -t {r.n_threads} batch {r.batch}" for r in report.rows]
        middle = [row.ms(50) for row in report.rows]
        over = [row.ms(95) - row.ms(50) for row in report.rows]
        places = range(len(names))
        axis.barh(places, middle, xerr=[[0] * len(over), over], capsize=3, color="#0072B2")
        axis.set_title("milliseconds of a run, median and 95th percentile", loc="left", fontsize=10)
        _name(axis, names)
        for number, name in enumerate(profiled, 1):
            rows = [o for o in report.operators if o.model == name][:_MOST_OPERATORS]
            axis = drawn.add_subplot(grid[number])
            axis.barh(range(len(rows)), [row.ms for row in rows], color="#009E73")
            axis.set_title(f"{name}: milliseconds by kind of operator", loc="left", fontsize=10)
            _name(axis, [f"{row.operator} ({row.count})" for row in rows])
        about = f"{report.machine.cpu or report.machine.architecture}, {report.taken_at}"
        drawn.supxlabel(about, fontsize=7, color="#555555", x=0.01, ha="left")


def _name(axis: Any, names: list[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
