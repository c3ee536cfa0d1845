"""Inputs with their right classes: a folder of one folder a class, or JSON lines.

Knows how names of classes are spelt; no model and no engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import _fs
from edgekit.errors import SourceError, UnsafePathError, UsageError
from edgekit.formats import json_file
from edgekit.formats.foreign import Malformed, read_whole, shown
from edgekit.image_input import SUFFIXES
from edgekit.registry import did_you_mean

_MAX_BYTES = 64 << 20
_MAX_LINES = 1_000_000
LINES = ".jsonl"
_HINT = 'a line is {"image": FILE, "label": CLASS} or {"text": TEXT, "label": CLASS}'


@dataclass(frozen=True)
class Labelled:
    """An image's path or a text, and the number of its class."""

    what: Path | str
    index: int


def find(data: Path, labels: Sequence[str]) -> list[Labelled]:
    """Every input of ``data`` with its class, in an order that mixes the classes; nothing for a
    folder or a file without any.

    ``labels`` are the model's classes; a class is written as there (big and small letters are the
    same, and of "tench, Tinca tinca" each name is enough), or as its number. Raises UsageError for
    a class that the model does not have, and for broken lines.
    """
    if data.is_dir():
        pairs: Sequence[tuple[Path | str, str]] = _of_folders(data, labels)
    elif data.suffix.lower() == LINES:
        pairs = _of_lines(data)
    else:
        return []
    known = _known(labels)
    found = [Labelled(what, _index(label, known, data)) for what, label in pairs]
    return sorted(found, key=lambda each: hashlib.sha256(_name(each.what).encode()).digest())


def inputs(data: Path) -> list[Path | str]:
    """The images' paths or the texts of JSON lines, whatever their classes."""
    return [what for what, _ in _of_lines(data)]


def _name(what: Path | str) -> str:
    return f"{what.parent.name}/{what.name}" if isinstance(what, Path) else what


def _of_folders(data: Path, labels: Sequence[str]) -> list[tuple[Path, str]]:
    """A folder is one of classes when at least half of those in it have names of classes."""
    folders = sorted(path for path in data.iterdir() if path.is_dir())
    known = _known(labels)
    named = [folder for folder in folders if _spelling(folder.name) in known]
    if not named or 2 * len(named) < len(folders):
        return []
    return [
        (file, folder.name)
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]


def _of_lines(data: Path) -> list[tuple[Path | str, str]]:
    found: list[tuple[Path | str, str]] = []
    try:
        raw = read_whole(data, _MAX_BYTES)
    except SourceError as error:
        raise UsageError(error.message) from None
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_pair(data.parent, json_file.parse(line)))
        except (Malformed, UnsafePathError) as error:
            raise UsageError(f"{data.name}, line {number} {error}"[:300], hint=_HINT) from None
        if len(found) > _MAX_LINES:
            raise UsageError(f"{data.name} has more than {_MAX_LINES} lines")
    if not found:
        raise UsageError(f"{data.name} holds no line", hint=_HINT)
    if len({type(what) for what, _ in found}) > 1 and any(isinstance(w, str) for w, _ in found):
        raise UsageError(f"{data.name} has images and texts", hint=_HINT)
    return found


def _pair(folder: Path, body: Any) -> tuple[Path | str, str]:
    if not isinstance(body, dict) or ("image" in body) == ("text" in body):
        raise Malformed("is no object with either an image or a text")
    label, what = body.get("label"), body.get("image", body.get("text"))
    if isinstance(label, bool) or not isinstance(label, str | int) or not isinstance(what, str):
        raise Malformed("has no label, or one that is neither a name nor a number")
    return (_fs.contained(folder, what) if "image" in body else what), str(label)


def _spelling(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).lower()


def _known(labels: Sequence[str]) -> dict[str, int]:
    """Every spelling of a class that means only one -> its number."""
    found: dict[str, int] = {}
    doubtful: set[str] = set()
    for index, label in enumerate(labels):
        for name in {label, *label.split(",")}:
            spelling = _spelling(name)
            if found.setdefault(spelling, index) != index:
                doubtful.add(spelling)
    numbers = {str(index): index for index in range(max(len(labels), 1))}
    return numbers | {name: index for name, index in found.items() if name not in doubtful}


def _index(label: str, known: dict[str, int], data: Path) -> int:
    index = known.get(_spelling(label))
    if index is None:
        raise UsageError(
            f"{data.name} has the class {shown(label)}, which the model does not have",
            hint=did_you_mean(_spelling(label), list(known)[:5000]),
        )
    return index
