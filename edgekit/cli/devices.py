"""`edgekit devices`: the group of commands about boards, one file each.

Knows their names only.
"""

from __future__ import annotations

import click

from edgekit.cli.lazy import LazyGroup

# One row a command, as in VERBS; its file is devices_NAME.py.
SUBCOMMANDS = {
    "list": "List the boards that edgekit knows.",
    "show": "Show the profile of DEVICE: each figure, and how it is known.",
    "add": "Call a board NAME from now on, and say how to reach it.",
    "remove": "Forget the device NAME; on the board itself nothing changes.",
    "probe": "Identify DEVICE, measure what it can, and compare that with its profile.",
    "setup": "Install edgekit and llama.cpp on DEVICE; nothing is compiled or fetched there.",
}


@click.group(cls=LazyGroup, rows=SUBCOMMANDS, prefix="edgekit.cli.devices_")
def command() -> None:
    """Boards: what they are, and which are yours."""
