"""`edgekit devices remove`: parse, call, render."""

from __future__ import annotations

import click

from edgekit import device_config


@click.command()
@click.argument("name")
def command(name: str) -> None:
    """Forget the device NAME; on the board itself nothing changes.

    What edgekit put on the board goes with `edgekit devices setup NAME --remove`.
    """
    device_config.remove(name)
    click.echo(f"removed {name}", err=True)
