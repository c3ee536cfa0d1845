"""How fast this machine reads a file from its storage: what the first load of a model waits for.

Knows files and the page cache; never a model.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from edgekit import _fs
from edgekit.exporter import Progress, no_progress
from edgekit.page_cache import drop_from_page_cache

# Written in a second or two on an SD card, and large beside what a card does for one request.
_SIZE_BYTES = 64 << 20
_ROUNDS = 3
_PIECE_BYTES = 1 << 20


def read_speed(progress: Progress = no_progress) -> float | None:
    """Bytes per second of a file in the user's cache folder, read from its first byte to its last.

    The best of three rounds; None where the page cache cannot be emptied, or for want of room.
    Raises ExportError if that folder cannot be written to.
    """
    folder = _fs.home("cache")
    size = min(_SIZE_BYTES, _fs.free_bytes(folder) // 4 // _PIECE_BYTES * _PIECE_BYTES)
    if size < _PIECE_BYTES:
        return None
    file = folder / f"read-speed-{os.getpid()}.bin"
    try:
        _fs.write_atomic(file, os.urandom(size))  # what cannot be compressed
        best = 0.0
        for turn in range(_ROUNDS):
            progress("read the storage", turn, _ROUNDS)
            if drop_from_page_cache(file) is not None:
                return None
            best = max(best, size / _read(file))
        progress("read the storage", _ROUNDS, _ROUNDS)
        return best
    finally:
        file.unlink(missing_ok=True)


def _read(file: Path) -> float:
    buffer = memoryview(bytearray(_PIECE_BYTES))
    started = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass
    return time.perf_counter() - started
