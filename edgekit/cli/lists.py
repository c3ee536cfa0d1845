"""Options that take a list, such as ``-t 1,2,4``: read in one way for every verb.

Knows text and numbers; never what they are for.
"""

from __future__ import annotations

import click


def numbers(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """A click callback: ``512,1024`` -> (512, 1024). Raises BadParameter."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of whole numbers such as 1,2,4") from None
