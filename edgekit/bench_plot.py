"""A report as a picture: speeds of prefill and decode over what was varied, with every sample.

Knows a report's rows and how to draw them; never how they were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgekit import plot
from edgekit.report import BenchReport, BenchRow
from edgekit.report_text import figure

# What may stand on the horizontal axis, the first that varies: (field, its words).
_AXES = (
    ("n_seqs", "sequences side by side"),
    ("n_threads", "threads"),
    ("n_depth", "tokens before the answer"),
    ("n_prompt", "tokens of the prompt"),
    ("n_gen", "tokens of the answer"),
)
_SHORT: dict[str, Callable[[BenchRow], str]] = {
    "model": lambda row: row.model.removesuffix(".gguf"),
    "n_threads": lambda row: f"-t {row.n_threads}",
    "kv_type": lambda row: f"kv {row.kv_type}",
    "n_seqs": lambda row: f"x {row.n_seqs}",
    "n_depth": lambda row: f"@ d{row.n_depth}",
    "n_prompt": lambda row: f"pp{row.n_prompt}",
    "n_gen": lambda row: f"tg{row.n_gen}",
}
_LEGEND_BELOW = 4  # series; more make their picture taller
# What is drawn of every second: (words, field of a Moment, factor).
_FELT = (
    ("temperature, °C", "temperature_c", 1.0),
    ("clock, GHz", "clock_mhz", 1e-3),
    ("power, W", "power_w", 1.0),
)
_FELT_IN = 1.5
_ALARM = "#D55E00"


def draw(report: BenchReport, path: Path) -> None:
    """Write a picture of ``report`` to ``path``, .png or .svg. Raises what ``plot.figure`` does."""
    panels = _panels(report)
    colours = _colours(report)
    series = max(len(_series(rows, _axis(rows))) for _, rows in panels)
    height_in = 3.6 + 0.16 * max(0, series - _LEGEND_BELOW)
    if not any(_axis(rows) for _, rows in panels):
        height_in = 1.9 + 0.34 * series
    width_in = 4.6 * len(panels) if len(panels) > 1 else 6.0
    felt = _felt(report)
    heights = [height_in, _FELT_IN] if felt else [height_in]
    with plot.figure(path, width_in=width_in, height_in=sum(heights)) as drawn:
        grid = drawn.add_gridspec(len(heights), 1, height_ratios=heights)
        places = grid[0].subgridspec(1, len(panels))
        axes = [drawn.add_subplot(places[number]) for number in range(len(panels))]
        for axis, (title, rows) in zip(axes, panels, strict=True):
            axis.set_title(title, loc="left", fontweight="bold", fontsize=10)
            varied = _axis(rows)
            if varied:
                _lines(axis, rows, varied, colours)
            else:
                _bars(axis, rows, colours)
        names = [[label.get_text() for label in axis.get_yticklabels()] for axis in axes]
        if not any(_axis(rows) for _, rows in panels) and names[0] == names[-1]:
            for axis in axes[1:]:  # the bars of the left panel name these too
                axis.set_yticklabels([])
        if felt:
            below = grid[1].subgridspec(1, len(felt))
            for number, (words, field, factor) in enumerate(felt):
                axis = drawn.add_subplot(below[number])
                _second_by_second(axis, report, words, field, factor)
        drawn.supxlabel(_caption(report), fontsize=7, color="#555555", x=0.01, ha="left")


def _felt(report: BenchReport) -> list[tuple[str, str, float]]:
    """What of the telemetry this machine told more than once."""
    return [
        entry
        for entry in _FELT
        if sum(getattr(moment, entry[1]) is not None for moment in report.moments) > 1
    ]


def _second_by_second(
    axis: Any, report: BenchReport, words: str, field: str, factor: float
) -> None:
    """A figure of the telemetry over the run; red where the processor was throttled."""
    seen = [moment for moment in report.moments if getattr(moment, field) is not None]
    times = [moment.at_s for moment in seen]
    axis.plot(times, [getattr(moment, field) * factor for moment in seen], linewidth=1.1)
    for moment in report.moments:
        if moment.throttling:
            axis.axvspan(moment.at_s - 0.5, moment.at_s + 0.5, color=_ALARM, alpha=0.2, lw=0)
    axis.set_title(words, loc="left", fontsize=8)
    axis.set_xlabel("s", fontsize=8)
    axis.tick_params(labelsize=7)


def _panels(report: BenchReport) -> list[tuple[str, list[BenchRow]]]:
    """What is read and what is generated: their speeds differ too much for one axis."""
    panels = []
    for title, field in (("Prefill", "n_prompt"), ("Decode", "n_gen")):
        rows = [row for row in report.rows if getattr(row, field)]
        counts = {getattr(row, field) for row in rows}
        if rows:
            panels.append((f"{title}, {counts.pop()} tokens" if len(counts) == 1 else title, rows))
    return panels


def _caption(report: BenchReport) -> str:
    machine = report.machine
    words = [
        machine.board or machine.cpu or machine.architecture,
        f"{machine.cores} cores",
        f"{report.engine.name} {report.engine.version}",
        f"{len(report.rows[0].samples_s)} repetitions: mean ± sd, dots are samples",
    ]
    if machine.emulated:
        words.append("EMULATED: no real board's times")
    if report.device:
        words.insert(0, report.device)
    if report.busy:
        words.append("on a BUSY machine")
    if report.throttled:
        words.append("THROTTLED")
    return " · ".join(words)


def _axis(rows: Sequence[BenchRow]) -> tuple[str, str] | None:
    """The first setting that varies among ``rows``, but for the model."""
    for field, words in _AXES:
        if len({getattr(row, field) for row in rows}) > 1:
            return field, words
    return None


def _series(
    rows: Sequence[BenchRow], axis: tuple[str, str] | None
) -> dict[tuple[Any, ...], list[BenchRow]]:
    """The rows that share everything but what stands on the axis."""
    fields = [field for field in _SHORT if not axis or field != axis[0]]
    found: dict[tuple[Any, ...], list[BenchRow]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, field) for field in fields), []).append(row)
    return found


def _label(row: BenchRow, rows: Sequence[BenchRow], axis: tuple[str, str] | None) -> str:
    """Only what tells this series from the others."""
    words = [
        short(row)
        for field, short in _SHORT.items()
        if (not axis or field != axis[0]) and len({getattr(each, field) for each in rows}) > 1
    ]
    return ", ".join(words) or _SHORT["model"](row)


def _colours(report: BenchReport) -> dict[str, str]:
    """One colour a series, the same in both panels where the series is in both."""
    labels: list[str] = []
    for _, rows in _panels(report):
        axis = _axis(rows)
        labels += [_label(part[0], rows, axis) for part in _series(rows, axis).values()]
    unique = list(dict.fromkeys(labels))
    return {label: plot.COLOURS[i % len(plot.COLOURS)] for i, label in enumerate(unique)}


def _lines(
    axis: Any, rows: Sequence[BenchRow], varied: tuple[str, str], colours: dict[str, str]
) -> None:
    """A line a series over the values that were measured, evenly spaced."""
    field, words = varied
    values = sorted({getattr(row, field) for row in rows})
    for number, part in enumerate(_series(rows, varied).values()):
        part.sort(key=lambda row: getattr(row, field))
        label = _label(part[0], rows, varied)
        places = [values.index(getattr(row, field)) for row in part]
        axis.errorbar(
            places,
            [row.tok_s for row in part],
            yerr=[row.tok_s_sd for row in part],
            marker="os^Dv*P"[number % 7],
            markersize=4,
            linewidth=1.4,
            capsize=2.5,
            color=colours[label],
            label=label,
        )
        for place, row in zip(places, part, strict=True):
            axis.plot(
                [place] * len(row.speeds),
                row.speeds,
                linestyle="none",
                marker=".",
                markersize=3.5,
                alpha=0.45,
                color=colours[label],
            )
    axis.set_xticks(range(len(values)), [f"{value:,}" for value in values])
    axis.set_xlim(-0.3, len(values) - 0.7)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(words)
    together = any(row.n_seqs > 1 for row in rows)
    axis.set_ylabel("tok/s, all sequences together" if together else "tok/s")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="best", fontsize=7.5)


def _bars(axis: Any, rows: Sequence[BenchRow], colours: dict[str, str]) -> None:
    """A bar a row, with its figure: nothing varies but the model or the cache type."""
    labels = [_label(row, rows, None) for row in rows]
    top = max(max(row.speeds) for row in rows)
    for place, (row, label) in enumerate(zip(rows, labels, strict=True)):
        axis.barh(place, row.tok_s, height=0.55, color=colours[label], alpha=0.85)
        axis.errorbar(
            row.tok_s, place, xerr=row.tok_s_sd, color="#333333", capsize=3, linewidth=1.1
        )
        axis.plot(row.speeds, [place] * len(row.speeds), "k.", markersize=3, alpha=0.5)
        axis.text(
            max(row.speeds) + 0.03 * top,
            place,
            f"{figure(row.tok_s)} ± {figure(row.tok_s_sd, beside=row.tok_s)}",
            va="center",
            fontsize=7.5,
        )
    axis.set_yticks(range(len(rows)), labels)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * top)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("tok/s")
    axis.grid(axis="y", visible=False)
