#!/usr/bin/env python3
"""The results of runs that differ in the seed alone: the mean of each figure, its least and most.

    benchmarks/train/seeds.py build/train/seed-*

Each folder has the runs of one seed, as `SEEDS=3 benchmarks/train/run video` leaves them, or as
`minimal-front` does, a folder deeper. A table for each run, a row for each model, and how far the
first model is from each other one, seed by seed. Runs that differ in more than the seed are
refused.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from edgekit.cli.ending import ending
from edgekit.errors import UsageError
from edgekit.training import report
from edgekit.training.report import TrainingReport, shown
from edgekit.training.settings import difference

_APART = ("accuracy", "loss")


def runs_of(folders: Sequence[Path]) -> dict[str, list[TrainingReport]]:
    """The reports of each run, one of every folder. Raises UsageError where one lacks a run."""
    names = sorted(
        str(path.parent.relative_to(folders[0])) for path in folders[0].rglob(f"*/{report.FILE}")
    )
    if len(folders) < 2 or not names:
        raise UsageError(
            "two folders of finished runs at least", hint="SEEDS=3 benchmarks/train/run"
        )
    found: dict[str, list[TrainingReport]] = {}
    for name in names:
        bodies = [report.parse(report.read(folder / name)) for folder in folders]
        first = bodies[0].settings
        for body in bodies[1:]:
            other = difference(first | {"seed": 0}, body.settings | {"seed": 0})
            if other or body.settings["seed"] == first["seed"]:
                raise UsageError(f"runs of {name} differ in other than the seed: {other or 'none'}")
        found[name] = bodies
    return found


def table(bodies: Sequence[TrainingReport]) -> list[str]:
    """Lines of Markdown: for each model and figure "mean [least, most]"."""
    rows: dict[str, dict[str, list[float]]] = {}
    for body in bodies:
        for row in body.results:
            for figure, value in row.figures.items():
                rows.setdefault(row.name, {}).setdefault(figure, []).append(value)
    figures = list(dict.fromkeys(figure for row in rows.values() for figure in row))
    lines = [["model", *(figure.replace("_", " ") for figure in figures)]]
    lines += [["---"] * (1 + len(figures))]
    for name, row in rows.items():
        lines.append([name, *(_spread(figure, row.get(figure, [])) for figure in figures)])
    return [f"| {' | '.join(line)} |" for line in lines]


def differences(bodies: Sequence[TrainingReport]) -> list[str]:
    """A line for each of ``_APART`` and each model but the first that has it too."""
    first, *others = (row.name for row in bodies[0].results)
    lines = []
    for figure in _APART:
        for other in others:
            apart = []
            for body in bodies:
                rows = {row.name: row.figures for row in body.results}
                if figure in rows[first] and figure in rows.get(other, {}):
                    apart.append(rows[first][figure] - rows[other][figure])
            if apart:
                mean = statistics.fmean(apart)
                told = ", ".join(f"{each:+.4f}" for each in apart)
                lines.append(f"{figure} of {first} less that of {other}: {mean:+.4f} ({told})")
    return lines


def _spread(figure: str, values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, least, most = (
        shown(figure, each) for each in (statistics.fmean(values), min(values), max(values))
    )
    return mean if min(values) == max(values) else f"{mean} [{least}, {most}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    for name, bodies in runs_of(parser.parse_args().folders).items():
        where = bodies[0].machine.cpu or bodies[0].machine.architecture
        seeds = ", ".join(str(body.settings["seed"]) for body in bodies)
        print(f"{name}: mean [least, most] of seeds {seeds}; {bodies[0].taken_at}, {where}\n")
        print("\n".join([*table(bodies), "", *differences(bodies)]))


if __name__ == "__main__":
    with ending():
        main()
