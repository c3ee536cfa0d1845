"""The results of several finished runs as one Markdown table: a row for each model.

    benchmarks/train/table.py RUN...

Rows are the results of the runs' training.json, in their order; one that an earlier run has too
("before", a teacher) stands once. The first row of a run, which is its model, and rows that are
named as a training have that training's seconds and speed. Runs of finetune that were judged by the
same lines are compared with the first one, line by line.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

from edgekit.cli.ending import ending
from edgekit.training import bootstrap, report
from edgekit.training.finetune import HELD
from edgekit.training.report import Result, TrainingReport


def timed(body: TrainingReport) -> list[Result]:
    """The results; the first one, which is the run's model, with the seconds of its phases."""
    phases = {each.name: each for each in body.phases}
    found = []
    for number, row in enumerate(body.results):
        phase = phases.get(row.name) or (body.phases[0] if number == 0 else None)
        more = {} if phase is None else {"seconds": phase.seconds, f"{phase.unit}_s": phase.per_s}
        found.append(replace(row, figures=row.figures | more))
    return found


def held_out(run: Path) -> tuple[list[float], list[float]]:
    """What each line held out costs before training, and after it."""
    with (run / HELD).open() as file:
        rows = [(float(row["before"]), float(row["after"])) for row in csv.DictReader(file)]
    return [before for before, _ in rows], [after for _, after in rows]


def compared(runs: list[Path]) -> list[str]:
    """How much the other runs end above the first one; empty where lines or figures differ."""
    (before, first), *others = [held_out(run) for run in runs]
    found = []
    for run, (same, after) in zip(runs[1:], others, strict=True):
        if same == before:
            gain = bootstrap.paired(after, first)
            found.append(
                f"{run.name} less {runs[0].name}: {gain.value:+.3f} [{gain.low:+.3f},"
                f" {gain.high:+.3f}] (95%, paired bootstrap over {len(first)} lines)"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    runs = parser.parse_args().runs
    bodies = [report.parse(report.read(run)) for run in runs]
    rows: list[Result] = []
    for row in (row for body in bodies for row in timed(body)):
        if row not in rows:
            rows.append(row)
    head, lines = report.columns(replace(bodies[0], results=tuple(rows)))
    print("\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)))
    for body in bodies:
        where = body.machine.cpu or body.machine.architecture
        print(f"{body.recipe}, {body.settings['steps']} steps, {body.taken_at}, {where}")
    if all((run / HELD).is_file() for run in runs):
        print("\n".join(compared(runs)))


if __name__ == "__main__":
    with ending():
        main()
