"""`edgekit export --optimize-for`: what was tried, and what came of it."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.artifact import Artifact
from edgekit.cli import show
from edgekit.exporter import ExportOptions
from edgekit.receipt import Gates, Receipt
from edgekit.source import ModelSource


def tuned(
    source: ModelSource,
    goal: str,
    out: Path,
    options: ExportOptions,
    gates: Gates,
    *,
    eval_data: Path | None,
    against: tuple[Path, ...],
    device: str | None,
    as_json: bool,
) -> Artifact:
    """Try, keep the best, and show the table of all."""
    # numpy comes with them, which no other export needs this early
    from edgekit import cross_format, tune

    with show.progress(quiet=as_json) as progress:
        admit = cross_format.admission(against, data=eval_data, progress=progress)
        artifact = tune.tune(
            source,
            goal,
            out=out,
            gates=gates,
            eval_data=eval_data,
            calibration=options.calibration,
            chunks=options.chunks,
            fusion=options.fusion,
            admit=admit if against else None,
            device=device,
            progress=progress,
        )
    tuning = Receipt.from_dict(artifact.receipt).tuning
    if tuning and not as_json:
        show.table(tune.table(tuning), head=tune.HEAD)
        for line in tuning.refused:
            click.echo(line)
        click.echo()
    return artifact
