"""What each layer of a graph loses, as a line and as a table. Never measures anything."""

from __future__ import annotations

import click

from edgekit.cli import show
from edgekit.tensor_figures import LayerLosses

_MOST = 20


def first(found: LayerLosses) -> str:
    """The layer that loses most by itself."""
    if found.first is None:
        worst = min(found.layers, key=lambda each: each.snr_db, default=None)
        least = f"; the least SNR is {worst.snr_db:.1f} dB, {worst.layer}" if worst else ""
        return f"no layer stands out{least}"
    each = found.first
    return (
        f"{each.layer} ({each.op}, {each.tensor}): {each.drop_db:.1f} dB, down to"
        f" {each.snr_db:.1f} dB"
    )


def table(found: LayerLosses) -> None:
    """The layers that lose most, in the order of the graph."""
    worst = sorted(found.layers, key=lambda each: -each.drop_db)[:_MOST]
    rows = [
        (
            "->" if each == found.first else "",
            each.layer,
            each.op,
            f"{each.snr_db:.1f}",
            f"{each.drop_db:.1f}",
        )
        for each in found.layers
        if each in worst
    ]
    show.table(rows, head=("", "layer", "operator", "SNR, dB", "lost here, dB"))

    click.echo(f"{found.shared} of {found.whole} values are in both graphs, {found.samples} inputs")
