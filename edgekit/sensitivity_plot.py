"""Pictures of a sensitivity report: loss by stored bits, loss by part, spread of activations.

Knows rows and axes; never how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit import plot
from edgekit.intervals import Interval
from edgekit.sensitivity_report import InputRow, ModelRows, PartRow, Report

_MARKERS = "osD^vP*"
_LEAST = 1e-6  # a KL divergence below this is rounding, and zero has no place on these axes


def draw(report: Report, path: Path) -> list[Path]:
    """Draw ``path`` (.png or .svg) and, where parts were measured, two more beside it.

    ``kl.png`` shows the loss by bits, ``kl-tensors.png`` which tensors and layers lose it, and
    ``kl-activations.png`` how the inputs of the matrices are spread. Returns what was written.
    Raises UsageError for another suffix, MissingExtraError without matplotlib.
    """
    _bits(report, path)
    written = [path]
    if any(model.kinds for model in report.models):
        written.append(path.with_stem(f"{path.stem}-tensors"))
        _parts(report, written[-1])
    if any(model.inputs for model in report.models):
        written.append(path.with_stem(f"{path.stem}-activations"))
        _inputs(report.models, written[-1])
    return written


def _bits(report: Report, path: Path) -> None:
    """Two panels over the stored bits per weight: distance from the floats, and text predicted."""
    with plot.figure(path, width_in=9, height_in=4.2) as figure:
        left, right = figure.subplots(1, 2)
        for at, model in enumerate(report.models):
            rows = sorted(model.bits, key=lambda row: row.bits_per_weight)
            stored = [row.bits_per_weight for row in rows]
            style = {
                "color": _colour(at),
                "marker": _MARKERS[at % len(_MARKERS)],
                "label": model.name,
            }
            _line(left, stored, [row.kl_per_byte for row in rows], style, least=_LEAST)
            _line(right, stored, [row.perplexity_ratio for row in rows], style)
            for row in rows:
                left.annotate(
                    str(row.bits),
                    (row.bits_per_weight, max(row.kl_per_byte.value, _LEAST)),
                    # Above on the right, or below on the left: a falling line is at neither.
                    xytext=(5, 4) if at % 2 == 0 else (-5, -4),
                    textcoords="offset points",
                    ha="left" if at % 2 == 0 else "right",
                    va="bottom" if at % 2 == 0 else "top",
                    fontsize=8,
                    color=_colour(at),
                )
        left.set_yscale("log")
        left.margins(x=0.09)  # room for the numbers
        left.set_title("Distance from the model's own floats")
        left.set_ylabel("KL divergence (bits per byte of text)")
        right.axhline(1, color="#888888", linewidth=0.8, linestyle="--")
        right.set_title("Loss on the text itself")
        right.set_ylabel("perplexity by that of the floats")
        for axes in (left, right):
            axes.set_xlabel("stored bits per weight")
        right.legend()
        figure.supxlabel(
            "numbers at the points: the width that was asked for; bars: 95% intervals",
            fontsize=8,
            color="#555555",
        )


def _line(
    axes: Any,
    x: Sequence[float],
    figures: Sequence[Interval],
    style: dict[str, Any],
    least: float = -math.inf,
) -> None:
    """A line with the intervals as bars, nothing of it below ``least``."""
    shown = [Interval(*(max(x, least) for x in vars(figure).values())) for figure in figures]
    values = [figure.value for figure in shown]
    axes.errorbar(x, values, yerr=_arms(shown), capsize=3, linewidth=1.4, markersize=5, **style)


def _arms(figures: Sequence[Interval]) -> tuple[list[float], list[float]]:
    """How far each interval reaches below and above its value; an open end is left out."""
    below = [each.value - each.low for each in figures]
    above = [each.high - each.value for each in figures]
    return [x if math.isfinite(x) else 0 for x in below], [
        x if math.isfinite(x) else 0 for x in above
    ]


def _parts(report: Report, path: Path) -> None:
    """Bars by kind of tensor, and by layer below, one column a model, all on one scale."""
    shown = [model for model in report.models if model.kinds]
    kinds = max(len(model.kinds) for model in shown)
    layers = max(1, max(len(model.layers) for model in shown))
    height_in = 1.6 + 0.26 * (kinds + layers)
    with plot.figure(path, width_in=max(5.5, 4.2 * len(shown)), height_in=height_in) as figure:
        grid = figure.subplots(
            2,
            len(shown),
            squeeze=False,
            sharex=True,
            gridspec_kw={"height_ratios": (kinds, layers)},
        )
        for at, model in enumerate(shown):
            colour = _colour(report.models.index(model))
            _bars(grid[0][at], model.kinds, model, colour)
            _bars(grid[1][at], model.layers, model, colour, prefix="layer ")
            # Bars of one thickness, however many layers a model has.
            grid[0][at].set_ylim(kinds - 0.5, -0.5)
            grid[1][at].set_ylim(layers - 0.5, -0.5)
            grid[0][at].set_title(model.name)
            grid[1][at].set_xlabel("KL divergence (bits per byte of text)")
            grid[1][at].set_xlim(left=0)
        figure.suptitle(
            f"Quantized alone, at {report.part_bits} bits, all else in floats", fontsize=10
        )


def _bars(
    axes: Any, rows: Sequence[PartRow], model: ModelRows, colour: str, prefix: str = ""
) -> None:
    per_byte = 1 / math.log(2) / model.bytes_per_token
    shown = [Interval(*(x * per_byte for x in vars(row.mean_kl).values())) for row in rows]
    axes.barh(
        range(len(rows)),
        [each.value for each in shown],
        xerr=_arms(shown),
        color=colour,
        height=0.7,
        error_kw={"linewidth": 0.8, "capsize": 2},
    )
    names = [f"{prefix}{row.name}  {'/'.join(row.types)}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.grid(axis="y", visible=False)


def _inputs(models: Sequence[ModelRows], path: Path) -> None:
    """Heat maps of kinds over layers: kurtosis above, the largest channel by the median below."""
    shown = [model for model in models if model.inputs]
    with plot.figure(path, width_in=max(6.0, 4.6 * len(shown)), height_in=6) as figure:
        grid = figure.subplots(2, len(shown), squeeze=False)
        for row, (figure_name, title) in enumerate(
            (("kurtosis", "kurtosis (normal: 3)"), ("max_to_median", "largest channel / median"))
        ):
            tables = [_table(model.inputs, figure_name) for model in shown]
            values = [
                value for _, _, cells in tables for line in cells for value in line if value > 0
            ]
            low, high = min(values, default=1), max(values, default=10)
            for axes, model, (kinds, layers, cells) in zip(grid[row], shown, tables, strict=True):
                image = axes.imshow(
                    [
                        [math.log10(value) if value > 0 else math.nan for value in line]
                        for line in cells
                    ],
                    aspect="auto",
                    cmap="viridis",
                    vmin=math.log10(low),
                    vmax=max(math.log10(high), math.log10(low) + 0.1),
                    interpolation="nearest",
                )
                axes.grid(visible=False)
                axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
                step = max(1, len(layers) // 10)
                axes.set_xticks(range(0, len(layers), step), layers[::step], fontsize=8)
                if row == 0:
                    axes.set_title(model.name)
                else:
                    axes.set_xlabel("layer")
            bar = figure.colorbar(image, ax=list(grid[row]), shrink=0.9, label=title)
            ticks = plot.round_numbers(low, high)
            bar.set_ticks([math.log10(tick) for tick in ticks], labels=[f"{t:g}" for t in ticks])


def _table(
    inputs: Sequence[InputRow], figure: str
) -> tuple[list[str], list[str], list[list[float]]]:
    """Names of kinds, names of layers, and [kinds][layers] figures; 0 where there is none.

    Matrices that read the same input have the same figures: they share a line.
    """
    inside = [row for row in inputs if row.layer is not None]
    layers = sorted({row.layer for row in inside if row.layer is not None})
    lines: dict[tuple[float, ...], list[str]] = {}
    for kind in dict.fromkeys(row.kind for row in inside):
        by_layer = {row.layer: getattr(row, figure) for row in inside if row.kind == kind}
        lines.setdefault(tuple(by_layer.get(layer, 0.0) for layer in layers), []).append(kind)
    names = ["\n".join(kinds) for kinds in lines.values()]
    return names, [str(layer) for layer in layers], [list(line) for line in lines]


def _colour(at: int) -> str:
    return plot.COLOURS[at % len(plot.COLOURS)]
