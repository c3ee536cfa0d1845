"""`edgekit eval` of models that are no language models: its options, and what it shows.

Never measures anything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgekit import agreement, typed_json
from edgekit.agreement import Comparison
from edgekit.cli import show, show_layers, show_receipt

NAMES = ("eval_data", "explain_loss")


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that only they take."""
    for option in (
        click.option("--explain-loss", is_flag=True, help="No language model: by layer."),
        click.option(
            "--eval-data",
            type=click.Path(exists=True, path_type=Path),
            metavar="FILE|FOLDER",
            help="No language model: these texts or images instead of the built-in ones.",
        ),
    ):
        command = option(command)
    return command


def run(
    model: Path,
    against: Path | None,
    *,
    eval_data: Path | None,
    explain_loss: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare, and show figures; with ``explain_loss`` those of every layer."""
    with show.progress(quiet=as_json) as progress:
        found = agreement.compare(
            model,
            against,
            data=eval_data,
            layers=explain_loss,
            threads=threads,
            progress=progress,
        )
    facts = {"model": str(model), "against": str(against or "the float model of its source")}
    if as_json:
        return show.as_json(facts | {"parts": [typed_json.write(part) for part in found]})
    show.table(list(facts.items()))
    for part in found:
        _show(part)


def _show(part: Comparison) -> None:
    if part.part:
        click.echo(f"\n{part.part}")
    show.table(list(show_receipt.agreement(part.agreement)))
    if part.layers:
        show.table([("loses most", show_layers.first(part.layers))])
        show_layers.table(part.layers)
    if part.blind:
        show.warn(f"{part.blind} cannot be looked into: only its outputs were compared")
