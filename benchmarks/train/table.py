"""The results of several finished runs as one Markdown table: a row for each model.

    benchmarks/train/table.py RUN...

Rows are the results of the runs' training.json, in their order; one that an earlier run has too
("before", a teacher) stands once. The first row of a run, which is its model, and rows that are
named as a training have that training's seconds and speed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from edgekit.cli.ending import ending
from edgekit.training import report
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    bodies = [report.parse(report.read(run)) for run in parser.parse_args().runs]
    rows: list[Result] = []
    for row in (row for body in bodies for row in timed(body)):
        if row not in rows:
            rows.append(row)
    head, lines = report.columns(replace(bodies[0], results=tuple(rows)))
    print("\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)))
    for body in bodies:
        where = body.machine.cpu or body.machine.architecture
        print(f"{body.recipe}, {body.settings['steps']} steps, {body.taken_at}, {where}")


if __name__ == "__main__":
    with ending():
        main()
