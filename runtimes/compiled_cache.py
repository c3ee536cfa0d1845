"""What engines made of a model file, kept on disk so that the next load need not make it again.

Knows names, sizes and ages of folders; never what an engine writes into one. Nothing here is
precious: a run never fails because of it, and the oldest goes when there is too much.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from edgekit import _fs, machine
from edgekit.errors import EdgekitError

_log = logging.getLogger("edgekit.runtime")
MOST_BYTES = 1 << 30  # of all entries together
_SPARE = 4  # times its own size must stay free on the disk beside an entry
_FACTS = "entry.json"  # written last; without it, or with other sizes in it, a folder is no entry


def key(files: Sequence[Path], *engine: str) -> str:
    """For the bytes of ``files``, the words in ``engine`` and this kind of processor."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {_fs.sha256_file(file)}\0".encode())
    cpu = machine.cpu(machine.root())
    for word in (*engine, cpu.model or cpu.architecture, *sorted(cpu.features)):
        digest.update(f"{word}\0".encode())
    return digest.hexdigest()


def find(name: str) -> Path | None:
    """The folder of the entry ``name``, if it is as it was written. Its use is noted."""
    folder = _root() / name
    try:
        known = json.loads((folder / _FACTS).read_bytes())
        if known != _facts(folder):
            return None
        os.utime(folder)
    except (OSError, ValueError):
        return None
    return folder


def keep(name: str, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write the entry's files into an empty folder, then give it its name.

    Where that fails, or the disk is short of room, there is no entry, and a line in the log. What
    ``fill`` raises other than EdgekitError and OSError is raised here.
    """
    try:
        with _fs.staged(_root() / name, owns=lambda _: True) as folder:
            fill(folder)
            sizes = _facts(folder)
            total = sum(size for size, _ in sizes.values())
            if total > MOST_BYTES or _fs.free_bytes(folder) < _SPARE * total:
                raise EdgekitError(f"no room to keep {total >> 20} MiB of a compiled model")
            _fs.write_atomic(folder / _FACTS, json.dumps(sizes).encode())
        _drop_oldest(name)
    except (EdgekitError, OSError) as error:  # a full disk, a read-only home, another process
        _log.info("%s; going on without it", error)


def _root() -> Path:
    return _fs.home("cache") / "compiled"


def _facts(folder: Path) -> dict[str, list[int]]:
    """File -> its size, and when it was written: a file that was cut or changed since differs."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != _FACTS:
            status = path.stat()
            found[path.name] = [status.st_size, status.st_mtime_ns]
    return found


def _drop_oldest(newest: str) -> None:
    """Remove entries, those longest unused first, until the rest is small enough."""
    entries = []
    for folder in _root().iterdir():
        with contextlib.suppress(OSError):
            if folder.is_dir() and (folder / _FACTS).is_file():
                size = sum(path.stat().st_size for path in folder.iterdir())
                entries.append((folder.name != newest, -folder.stat().st_mtime_ns, size, folder))
    used = 0
    for _, _, size, folder in sorted(entries):
        used += size
        if used > MOST_BYTES:
            shutil.rmtree(folder, ignore_errors=True)
