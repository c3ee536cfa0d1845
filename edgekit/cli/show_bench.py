"""How a benchmark's report and a comparison look on a terminal.

Knows tables and order; never how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgekit import profile as profiles
from edgekit import report_text
from edgekit.cli import show
from edgekit.compare import CONFIDENCE, Comparison
from edgekit.errors import EdgekitError
from edgekit.profile import Profile
from edgekit.report import BenchReport


def report(found: BenchReport) -> None:
    """The whole report: figures first, then what they mean, then what they were taken on."""
    show.table(report_text.cells(found), head=report_text.head(found))
    if found.sessions:
        click.echo("\nthrough edgekit.load:")
        show.table(report_text.session_cells(found.sessions), head=report_text.SESSION_HEAD)
        for row in found.sessions:
            if row.cold_note:
                click.echo(f"no cold load of {row.model}: {row.cold_note}")
    for verdict in found.verdicts:
        click.echo()
        click.echo(click.style(f"{verdict.model}: {verdict.sentence}", bold=True))
        for line in (*verdict.evidence, *verdict.advice, *verdict.rows):
            click.echo(f"  {line}")
    click.echo()
    show.table(list(report_text.machine_lines(found)))
    for remark in found.remarks:
        show.warn(remark)


def devices(found: dict[str, BenchReport]) -> None:
    """The same bench on several devices: one table, then what each one's figures mean."""
    head, rows = report_text.side_by_side(found)
    show.table(rows, head=head)
    for name, each in found.items():
        for verdict in each.verdicts:
            click.echo(f"\n{name}, {verdict.model}: {verdict.sentence}")
        for remark in each.remarks:
            show.warn(f"{name}: {remark}")


def comparison(found: Comparison) -> None:
    """A line a setting: both speeds, B over A with its interval, and what that shows."""
    rows = [
        (
            row.label,
            report_text.figure(row.a),
            report_text.figure(row.b),
            row.unit,
            f"{row.ratio.value:.3f}",
            f"{row.ratio.low:.3f} to {row.ratio.high:.3f}",
            row.finding,
        )
        for row in found.rows
    ]
    how = "measured together, in pairs" if found.paired else "measured at different times"
    click.echo(f"A: {found.a}\nB: {found.b}\n{how}\n")
    head = ("test", "A", "B", "", "B / A", f"{CONFIDENCE:.0%} for all rows", "B is")
    show.table(rows, head=head)
    for note in found.notes:
        show.warn(note)


def profile(found: Profile) -> None:
    """Two tables: kinds of operators, and layers."""
    for what, rows in (
        ("kind of operator", profiles.kind_rows(found)),
        ("layer", profiles.layer_rows(found)),
    ):
        click.echo(f"\n{found.model}, by {what}:")
        show.table(rows, head=profiles.HEAD)
    for phase in (found.prefill, found.decode):
        slower = f"{phase.overhead:.0%} slower" if phase.overhead > 0 else "no slower"
        click.echo(f"{phase.name}: timing every operator made it {slower}")


def answers(reports: dict[str, Any], errors: dict[str, EdgekitError]) -> dict[str, Any]:
    """What several devices answered, for JSON."""
    told = {name: {"message": e.message, "hint": e.hint} for name, e in errors.items()}
    return {"reports": reports, "errors": told}


def files_of(outs: Sequence[Path], name: str, names: Sequence[str]) -> tuple[Path, ...]:
    """Where the report of the device ``name`` goes; of several, each has files of its own."""
    if len(names) == 1:
        return tuple(outs)
    return tuple(out.with_name(f"{out.stem}-{name}{out.suffix}") for out in outs)
