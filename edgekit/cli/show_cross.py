"""`edgekit verify --against`: its options, and how figures stand in their band.

Never measures or judges anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from edgekit import cross_format
from edgekit.beside import Figure
from edgekit.cli import lists, show, show_layers, show_receipt
from edgekit.cross_format import CrossFormat
from edgekit.exporter import Progress
from edgekit.receipt import Gates

NAMES = ("chunks", "threads", "explain_loss", "max_kld", "min_top1", "min_cosine")


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those that only --against takes."""
    for option in (
        click.option("--min-cosine", type=float, metavar="COSINE", help="Band: mean cosine."),
        click.option(
            "--min-top1",
            callback=lists.share,
            metavar="SHARE",
            help="Band: same likeliest token, class.",
        ),
        click.option("--max-kld", type=float, metavar="NATS", help="Band: mean KL divergence."),
        click.option("--explain-loss", is_flag=True, help="With --against: by layer, in any case."),
        click.option("--threads", type=click.IntRange(min=1), help="Default: measured fastest."),
        click.option(
            "--chunks",
            type=click.IntRange(min=1),
            help="With --against: chunks of text that two language models read (default 4).",
        ),
        click.option(
            "--against",
            type=click.Path(path_type=Path),
            multiple=True,
            metavar="ARTIFACT",
            help="Hold it against the same model in another format. Repeatable.",
        ),
    ):
        command = option(command)
    return command


def measured(
    model: Path,
    others: Sequence[Path],
    data: Path | None,
    progress: Progress,
    *,
    max_kld: float | None,
    min_top1: float | None,
    min_cosine: float | None,
    explain_loss: bool,
    **how: Any,
) -> list[CrossFormat]:
    """``model`` against each of ``others``."""
    limits = Gates(max_kld=max_kld, min_top1=min_top1, min_cosine=min_cosine)
    return [
        each
        for other in others
        for each in cross_format.compare(
            model, other, limits=limits, data=data, layers=explain_loss, progress=progress, **how
        )
    ]


def table(found: CrossFormat) -> None:
    """One comparison, and its layers where there are any."""
    click.echo(f"\n{found.model} ({found.forms[0]}) against {found.against} ({found.forms[1]})")
    part = f", {found.part}" if found.part else ""
    show.table(
        [
            *map(_row, found.figures),
            ("measured on", f"{found.samples} samples ({found.data}){part}"),
        ]
    )
    for note in found.notes:
        show.warn(note)
    if found.layers:
        show.table([("departs first", show_layers.first(found.layers))])
        show_layers.table(found.layers)
    elif found.blind:
        show.warn(f"only outputs were compared: {found.blind}")


def _row(found: Figure) -> tuple[str, str]:
    band = show_receipt.limit(found) + ("" if found.given else ", as both receipts allow")
    verdict = "within the band" if found.within else "OUTSIDE the band"
    return show_receipt.LIKENESS[found.name], f"{show_receipt.likeness(found)}: {verdict} ({band})"
