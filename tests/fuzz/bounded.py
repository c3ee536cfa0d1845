"""The bounds of every reader of foreign bytes: a second, some memory, and errors of ours alone."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from edgekit.errors import EdgekitError

_LOADED, _PIECES = 200, 10
# Files that are loaded, each in a child process: 8 in every run, 2,000 in pieces of some minutes.
in_pieces = pytest.mark.parametrize(
    ("count", "piece"),
    [(8, 0), *(pytest.param(_LOADED, n, marks=pytest.mark.fuzz) for n in range(1, _PIECES + 1))],
)


def refused(
    mutants: Iterable[bytes], path: Path, read: Callable[[Path], object], *, memory_bytes: int
) -> int:
    """Write each mutant to ``path`` and read it; how many were refused. Any other end is a failure:
    an exception that is not ours, a second of CPU time, more memory than ``memory_bytes``.
    """
    count = 0
    tracemalloc.start()
    try:
        for raw in mutants:
            path.write_bytes(raw)
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                read(path)
            except EdgekitError as error:
                count += 1
                assert error.message.isprintable()
            assert time.process_time() - started < 1
            assert tracemalloc.get_traced_memory()[1] - before < memory_bytes
    finally:
        tracemalloc.stop()
    return count
