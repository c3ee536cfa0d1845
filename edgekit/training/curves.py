"""The curve of a run: points in memory, as CSV, and as a picture.

Knows columns and numbers; never what was trained.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgekit import _fs, plot

COLUMNS = ("step", "loss", "lr", "gradient_norm", "seconds")
Point = tuple[float, float, float, float, float]


def name(phase: str) -> str:
    """Of the CSV file with the curve of ``phase``."""
    return f"curve-{phase}.csv"


def write(path: Path, curve: Sequence[Point]) -> None:
    """A CSV file with COLUMNS, numbers in full."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    rows.writerows((int(point[0]), *(repr(float(each)) for each in point[1:])) for point in curve)
    _fs.write_atomic(path, text.getvalue().encode())


def draw(
    path: Path,
    curves: Mapping[str, Sequence[Point]],
    evaluations: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Loss over steps, one line a phase; what evaluations found as points on it."""
    with plot.figure(path) as figure:
        axes = figure.add_subplot()
        for number, (name, curve) in enumerate(curves.items()):
            colour = plot.COLOURS[number % len(plot.COLOURS)]
            steps, losses = [p[0] for p in curve], [p[1] for p in curve]
            axes.plot(steps, losses, color=colour, linewidth=1, label=f"{name}, training")
            found = evaluations.get(name, ())
            if found:
                at, loss = [e["step"] for e in found], [e["loss"] for e in found]
                axes.plot(at, loss, "o", color=colour, markersize=4, label=f"{name}, held out")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend()
