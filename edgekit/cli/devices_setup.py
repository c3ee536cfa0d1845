"""`edgekit devices setup`: parse, call, render."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit import device_setup, wheelhouse
from edgekit.cli import show
from edgekit.device_config import LOCAL
from edgekit.device_setup import SetupReport
from edgekit.errors import UsageError
from edgekit.target import open_target


@click.command()
@click.argument("device")
@click.option("--dry-run", is_flag=True, help="Look, and say what would be done.")
@click.option("--remove", is_flag=True, help="Take away all that edgekit ever put there.")
@click.option(
    "--wheelhouse",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Wheels to install [default: those of scripts/build for the board's architecture].",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(device: str, dry_run: bool, remove: bool, folder: Path | None, as_json: bool) -> None:
    """Install edgekit and llama.cpp on DEVICE; nothing is compiled or fetched there.

    The board needs Python 3.11 or newer and an SSH server, and no network. Everything lands in one
    folder of the user there.
    """
    if device == LOCAL:
        raise UsageError("edgekit is on this machine already")
    if remove and (dry_run or folder):
        raise UsageError("--remove takes no other option")
    if remove:
        with open_target(device) as target:
            board = device_setup.remove(target)
        if as_json:
            show.as_json({"device": device, "removed": board.home})
        else:
            click.echo(f"removed {board.home} from {device}")
        return
    house = None if folder is None else wheelhouse.read(folder)
    with show.progress(quiet=as_json) as progress, open_target(device) as target:
        report = device_setup.setup(target, house, dry_run=dry_run, progress=progress)
    if as_json:
        show.as_json(report.to_dict())
    else:
        _show(report)


def _show(report: SetupReport) -> None:
    board = report.board
    emulated = " (emulated)" if board.emulated else ""
    rows = [
        ("board", f"{board.board or 'unknown board'}{emulated}"),
        ("cpu", f"{board.cores} x {board.cpu or board.architecture}, {' '.join(board.features)}"),
        ("system", f"{board.os}, Python {board.python}, glibc {board.glibc}"),
        ("installed", f"edgekit {board.edgekit}" if board.edgekit else "-"),
        ("to", report.environment),
    ]
    if report.dry_run:
        rows += [
            ("would send", f"{len(report.wheels)} wheels, {show.size(report.upload_bytes)}"),
            ("needs", f"{show.size(report.needed_bytes)} of {show.size(board.free_bytes)} free"),
            ("would install", ", ".join(" ".join(wheel.split("-")[:2]) for wheel in report.wheels)),
        ]
    else:
        rows += [
            ("sent", f"{show.size(report.sent_bytes)} of {show.size(report.upload_bytes)}"),
            ("edgekit", f"{report.edgekit}{', as before' if report.already else ''}"),
            ("llama.cpp", f"backend {report.backend or 'of one fixed build'}"),
        ]
    show.table(rows)
    for warning in report.warnings:
        show.warn(warning)
