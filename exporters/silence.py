"""Keeps away what libraries and the compilers below them print.

Knows the two streams of this process; never what is printed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """No output on stdout and stderr, no warnings, and of the log errors alone."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    level = logging.root.level
    kept = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        logging.root.setLevel(logging.ERROR)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
        for number, old in kept.items():
            os.dup2(old, number)
            os.close(old)
        os.close(nowhere)
