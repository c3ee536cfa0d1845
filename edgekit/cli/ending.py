"""How a program of edgekit ends: an error of ours is one line, a hint and its exit code.

Knows errors and signals; never what the program did.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from edgekit.errors import EdgekitError


@contextmanager
def ending() -> Iterator[None]:
    """Exit codes of ``edgekit.errors``, and 130 for Ctrl-C, instead of a traceback."""
    try:
        yield
    except EdgekitError as error:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(128 + signal.SIGINT)
