"""`edgekit devices add`: parse, call, render."""

from __future__ import annotations

import click

from edgekit import device_config
from edgekit.device import load_profile
from edgekit.device_config import Device


@click.command()
@click.argument("name")
@click.option(
    "--ssh", required=True, metavar="[USER@]HOST", help="Host, or alias of ~/.ssh/config."
)
@click.option("--profile", metavar="NAME", help="What the board is: see `edgekit devices list`.")
def command(name: str, ssh: str, profile: str | None) -> None:
    """Call a board NAME from now on, and say how to reach it.

    Ports, keys and jump hosts belong into ~/.ssh/config. Nothing is connected to.
    """
    if profile is not None:
        load_profile(profile)
    device_config.add(Device(name, device_config.address(ssh), profile))
    click.echo(f"added {name}; try: edgekit devices probe {name}", err=True)
