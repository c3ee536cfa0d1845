"""A group of commands that imports a command's file only to run it.

Knows names and first lines of help texts; never what a command does.
"""

from __future__ import annotations

import importlib
from typing import Any

import click


class LazyGroup(click.Group):
    """``rows`` maps each command to its line of help; ``prefix`` + its name is its module."""

    def __init__(self, *args: Any, rows: dict[str, str], prefix: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self.rows = rows
        self._prefix = prefix

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.rows)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.rows:
            return None
        command: click.Command = importlib.import_module(self._prefix + cmd_name).command
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.rows.items()))
