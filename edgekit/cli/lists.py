"""Options that take a list, such as ``-t 1,2,4``, or a share: read in one way for every verb.

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


def share(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """A click callback: ``0.9`` or ``90%``. Raises BadParameter."""
    if value is None:
        return None
    try:
        return float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a share like 0.9 nor 90%") from None
