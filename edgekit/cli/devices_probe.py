"""`edgekit devices probe`: parse, call, render."""

from __future__ import annotations

from typing import Any

import click

from edgekit import device, device_probe, remote
from edgekit.bench_prediction import profile_of
from edgekit.cli import show
from edgekit.device_probe import Beside, Measured
from edgekit.errors import UsageError
from edgekit.report_text import figure
from edgekit.target import BoardFacts, open_target


@click.command()
@click.argument("name", metavar="DEVICE")
@click.option("--identify", is_flag=True, help="Only say what it is; measure nothing.")
@click.option("--save", is_flag=True, help="Keep what was measured as the profile of DEVICE.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(name: str, identify: bool, save: bool, as_json: bool) -> None:
    """Identify DEVICE, measure what it can, and compare that with its profile.

    DEVICE is one of yours, an SSH host, or `local` for this machine. It takes under a minute.
    """
    if identify and save:
        raise UsageError("--identify measures nothing that --save could keep")
    found: Measured | None = None
    with show.progress(quiet=as_json) as progress, open_target(name) as target:
        board = target.identify()
        profile = profile_of(name, board.board, board.memory_bytes)
        if not identify:
            found = remote.probe_on(target, progress=progress)
    rows = [] if found is None else device_probe.beside(found, profile)
    body: dict[str, Any] = {"device": name, "board": vars(board)}
    body["profile"] = profile and profile.name
    body["figures"] = [vars(row) | {"ratio": row.ratio} for row in rows]
    body["busy"] = found and found.busy
    if as_json:
        show.as_json(body)
    else:
        _show(board, profile.title if profile else None, rows)
    if board.emulated:
        show.warn("this board is emulated: its figures say nothing of a real one")
    if found is not None and found.busy:
        show.warn("others used the board meanwhile: probe it again when it is quiet")
    if found is not None and save:
        made = device_probe.as_profile(name, board, found, profile)
        click.echo(f"saved {device.save(made)}", err=True)


def _show(board: BoardFacts, profile: str | None, rows: list[Beside]) -> None:
    memory = "-" if board.memory_bytes is None else show.size(board.memory_bytes)
    show.table(
        [
            ("board", board.board or "-"),
            ("processor", f"{board.cpu or '-'}, {board.cores} cores, {board.architecture}"),
            ("features", " ".join(board.features) or "-"),
            ("memory", memory),
            ("system", f"{board.os}, Python {board.python}, glibc {board.glibc or '-'}"),
            ("edgekit", board.edgekit or "not set up"),
            ("home", f"{board.home}, {show.size(board.free_bytes)} free"),
            ("profile", profile or "none"),
        ]
    )
    if rows:
        click.echo()
        show.table([_cells(row) for row in rows], head=("figure", "measured", "profile", "", ""))
    for row in rows:
        if row.apart:
            show.warn(f"{row.name}: measured and profile are far apart")


def _cells(row: Beside) -> tuple[str, ...]:
    known = "-" if row.profile is None else figure(row.profile)
    ratio = "" if row.ratio is None else f"{row.ratio:.0%}"
    return (row.name, figure(row.measured), known, row.unit, ratio)
