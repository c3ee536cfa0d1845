"""`edgekit bench` for models without tokens: which options hold, and how the report looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgekit import latency_files, latency_text, remote, report_text
from edgekit.artifact import Artifact
from edgekit.cli import show, show_bench
from edgekit.errors import EdgekitError, UsageError
from edgekit.latency import latency, takes
from edgekit.latency_report import LatencyReport
from edgekit.remote_tensors import latency_on

_OPTIONS = {"threads", "batches", "repetitions", "runtimes"}


def is_wanted(models: Sequence[Artifact | str]) -> bool:
    """Whether all ``models`` are without tokens. Raises UsageError where only some are."""
    kinds = [takes(model) for model in models]
    if any(kinds) and not all(kinds):
        raise UsageError(
            "language models and others have no figure in common", hint="bench them one by one"
        )
    return bool(kinds) and all(kinds)


def measure(
    models: Sequence[str],
    sweep: dict[str, Any],
    outs: Sequence[Path],
    *,
    probe: bool,
    profile: bool,
    as_json: bool,
) -> None:
    """Measure, show, write."""
    _check(sweep, outs)
    with show.progress(quiet=as_json) as progress:
        found = latency(*models, probe_limits=probe, profile=profile, progress=progress, **sweep)
    if as_json:
        show.as_json(found.to_dict())
    else:
        _show(found)
    for out in outs:
        latency_files.write(found, out)


def measure_on(
    names: Sequence[str],
    models: Sequence[str],
    sweep: dict[str, Any],
    outs: Sequence[Path],
    *,
    probe: bool,
    profile: bool,
    as_json: bool,
) -> None:
    """The same on devices, side by side; one that fails leaves a warning and its exit code."""
    _check(sweep, outs)
    how = {"probe_limits": probe, "profile": profile, **sweep}
    with show.progress_of_each(names, quiet=as_json) as progress:
        found = remote.on_devices(
            names,
            lambda target, tell: latency_on(target, *models, progress=tell, **how),
            lambda tell: latency(*models, progress=tell, **how),
            progress,
        )
    reports = {name: each for name, each in found.items() if isinstance(each, LatencyReport)}
    errors = {name: each for name, each in found.items() if isinstance(each, EdgekitError)}
    if len(names) == 1 and errors:
        raise errors[names[0]]
    if as_json:
        body = {name: report.to_dict() for name, report in reports.items()}
        show.as_json(body[names[0]] if len(names) == 1 else show_bench.answers(body, errors))
    for name, report in reports.items():
        if not as_json:
            _show(report)
        for out in show_bench.files_of(outs, name, names):
            latency_files.write(report, out)
    for name, error in errors.items():
        show.warn(f"{name}: {error.message}")
    for error in errors.values():
        raise error


def _check(sweep: dict[str, Any], outs: Sequence[Path]) -> None:
    """Before minutes are spent."""
    if set(sweep) - _OPTIONS:
        raise UsageError(
            "these models have no tokens: only --threads, --batch, --runtime and --repetitions hold"
            " for them"
        )
    for out in outs:
        latency_files.check(out)


def _show(found: LatencyReport) -> None:
    show.table(latency_text.cells(found), head=latency_text.head(found))
    for verdict in found.verdicts:
        click.echo()
        click.echo(click.style(f"{verdict.model}: {verdict.sentence}", bold=True))
        for line in (*verdict.evidence, *verdict.advice):
            click.echo(f"  {line}")
    for model in found.models:
        rows = latency_text.operator_cells(found, model.name)
        if rows:
            click.echo(f"\n{model.name}, by kind of operator:")
            show.table(rows, head=latency_text.OPERATOR_HEAD)
    click.echo()
    show.table(list(report_text.machine_lines(found)))
    for remark in found.remarks:
        show.warn(remark)
