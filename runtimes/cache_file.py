"""Writes what spares later runs some work: a run never fails because it could not be kept.

Must never know what the bytes mean.
"""

from __future__ import annotations

import logging
from pathlib import Path

from edgekit import _fs
from edgekit.errors import ExportError

_log = logging.getLogger("edgekit.runtime")


def write(file: Path, data: bytes, *, level: int = logging.INFO, mode: int = 0o666) -> bool:
    """Replace ``file``, whole or not at all; False, and a line in the log, where that fails."""
    try:
        _fs.write_atomic(file, data, mode=mode)
    except ExportError as error:  # a read-only home, a full disk
        _log.log(level, "%s; going on without it", error)
        return False
    return True
