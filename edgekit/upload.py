"""Files to a board: what is wanted there, from which byte on, a few frames ahead of the answers.

Knows hashes and folders; never ssh, nor what the files mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import _fs
from edgekit.board_link import Link
from edgekit.errors import ConnectError, TransferError, UsageError
from edgekit.exporter import Progress

_PIECE_BYTES = 256 << 10
# On the way and not yet confirmed: what a dead link may cost, and far more than a LAN holds.
_WINDOW_BYTES = 1 << 20


@dataclass(frozen=True)
class File:
    """A file to bring over; ``name`` is its path below the place."""

    path: Path
    name: str
    size_bytes: int
    sha256: str


def listing(path: Path, also: Sequence[str], progress: Progress) -> list[File]:
    """A file and those of ``also`` beside it, or every one of a folder, by name, with its hash.

    Raises UsageError for links and for empty folders.
    """
    paths = {name: path.parent / name for name in (path.name, *also)}
    if not path.is_file():
        below = [p for p in sorted(path.rglob("*")) if p.is_symlink() or not p.is_dir()]
        paths = {found.relative_to(path).as_posix(): found for found in below}
    if not paths:
        raise UsageError(f"{path} holds no files")
    for found in paths.values():
        if not found.is_file() or (found.is_symlink() and found != path):
            raise UsageError(f"{found} is no plain file")
    total, done = sum(found.stat().st_size for found in paths.values()), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress("hash", done, max(1, total))

    return [
        File(found, name, found.stat().st_size, _fs.sha256_file(found, on_bytes))
        for name, found in paths.items()
    ]


def put(link: Link, files: Sequence[File], kind: str, key: str, progress: Progress) -> str:
    """Bring ``files`` over; see ``target.Target.put``.

    ``key`` tells the board who asks: what an earlier connection of theirs holds there is let go.
    """
    rows = [[file.name, file.size_bytes, file.sha256] for file in files]
    name = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    found = link.ask({"do": "begin", "kind": kind, "name": name, "files": rows, "key": key})
    place, wanted = _wanted(link, found, {file.sha256: file for file in files})
    stage = f"upload to {link.name}"
    total = sum(file.size_bytes for file, _ in wanted)
    done = 0
    for file, offset in wanted:
        done += offset
        progress(stage, done, total)
        for count in _send(link, file, offset):
            done += count
            progress(stage, done, total)
    if not found["there"]:
        link.ask({"do": "commit"})
    progress(stage, max(1, total), max(1, total))
    return place


def _wanted(link: Link, found: Any, files: dict[str, File]) -> tuple[str, list[tuple[File, int]]]:
    """The place, and what the board lacks: files, and where to go on with each."""
    try:
        place, wanted = found["place"], []
        for row in found["wanted"]:
            file, offset = files[row["sha256"]], row["offset"]
            if type(offset) is not int or not 0 <= offset <= file.size_bytes:
                raise ValueError
            # After a power cut the start may be there in length only.
            same = _prefix_sha256(file.path, offset) == row["prefix"]
            wanted.append((file, offset if same else 0))
        if not isinstance(place, str) or not isinstance(found["there"], bool):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ConnectError(f"{link.name} answers what nobody asked") from None
    return place, wanted


def _prefix_sha256(path: Path, size_bytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size_bytes and (piece := file.read(min(size_bytes, 1 << 20))):
            digest.update(piece)
            size_bytes -= len(piece)
    return digest.hexdigest()


def _send(link: Link, file: File, offset: int) -> Iterator[int]:
    """Send a file from ``offset`` on; yields the counts of bytes that arrived."""
    link.ask({"do": "file", "sha256": file.sha256, "offset": offset})
    flying = 0
    with file.path.open("rb") as opened:
        opened.seek(offset)
        left = file.size_bytes - offset
        while left or flying:
            while left and flying + _PIECE_BYTES <= _WINDOW_BYTES:
                piece = opened.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise TransferError(f"{file.path} became shorter while it was sent")
                link.send({"do": "data"}, piece)
                link.file_bytes += len(piece)
                left -= len(piece)
                flying += len(piece)
            arrived = link.answer()
            if type(arrived) is not int or not 0 < arrived <= flying:
                raise ConnectError(f"{link.name} answers what nobody asked")
            flying -= arrived
            yield arrived
    link.ask({"do": "finish"})
