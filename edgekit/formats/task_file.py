"""Reads task files: JSON Lines of multiple-choice questions, cloze texts or labelled texts.

Must never know a model, a prompt or a score.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import SourceError, UsageError
from edgekit.formats import json_file
from edgekit.formats.foreign import Malformed, read_whole, shown

MAX_BYTES = 1 << 26
MAX_ITEMS = 100_000
MAX_CHOICES = 256

# What the columns are called in the data sets that lm-evaluation-harness reads
# (https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/tasks).
_QUESTIONS = ("query", "question", "ctx")
_CHOICES = ("choices", "endings")
_GOLDS = ("gold", "answer", "label")
_PREFIXES = ("prefix", "context")
_TARGETS = ("target", "continuation")
_HINT = (
    'a line is {"question", "choices", "answer"}, {"context", "continuation"} or {"text", "label"}'
)


@dataclass(frozen=True)
class Item:
    """One line: ``choices`` may follow ``text``, and the one at index ``gold`` is right.

    The text of a cloze has one choice, its target.
    """

    line: int
    text: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class TaskFile:
    """``kind`` is "choice", "cloze" or "label"; labelled lines all have the same choices."""

    name: str
    kind: str
    items: tuple[Item, ...]


def read(path: Path) -> TaskFile:
    """The lines of a task file: all of one kind, blank ones left out, unknown keys ignored.

    Raises UsageError, with the number of the line, for what is no UTF-8, no strict JSON, of no or
    of another kind, and beyond 64 MiB, 100,000 lines or 256 choices.
    """
    try:
        data = read_whole(path, MAX_BYTES)
    except SourceError as error:
        raise UsageError(error.message) from None
    found: list[tuple[str, Item]] = []
    for number, line in _lines(data):
        try:
            kind, item = _item(number, json_file.parse(line))
            if found and kind != found[0][0]:
                raise Malformed(f"is a {kind} line among {found[0][0]} lines")
            if len(found) == MAX_ITEMS:
                raise Malformed(f"is one more than the {MAX_ITEMS} allowed")
        except Malformed as error:
            raise UsageError(f"{path.name}, line {number} {error}", hint=_HINT) from None
        found.append((kind, item))
    if not found:
        raise UsageError(f"{path.name} holds no line", hint=_HINT)
    kind, items = found[0][0], tuple(item for _, item in found)
    return TaskFile(path.name, kind, _labelled(path, items) if kind == "label" else items)


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield number, line


def _item(line: int, body: Any) -> tuple[str, Item]:
    if not isinstance(body, dict):
        raise Malformed("is no JSON object")
    if any(key in body for key in _CHOICES):
        choices = _choices(_one_of(body, _CHOICES))
        gold = _index(_one_of(body, _GOLDS), len(choices))
        return "choice", Item(line, _text(_one_of(body, _QUESTIONS), "the question"), choices, gold)
    if any(key in body for key in _TARGETS):
        target = _filled(_one_of(body, _TARGETS), "the target")
        return "cloze", Item(line, _text(_one_of(body, _PREFIXES), "the prefix"), (target,), 0)
    if "text" in body and "label" in body:
        label = _filled(body["label"], "the label")
        return "label", Item(line, _text(body["text"], "the text"), (label,), 0)
    raise Malformed("has no choices, no target, and no text with a label")


def _one_of(body: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the only one of ``keys`` that is there; two could contradict each other."""
    found = [key for key in keys if key in body]
    if not found:
        raise Malformed(f"lacks a key: {' or '.join(keys)}")
    if len(found) > 1:
        raise Malformed(f"has both {found[0]} and {found[1]}")
    return body[found[0]]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"is wrong: {what} must be text, not {shown(str(value))}")
    return value


def _filled(value: Any, what: str) -> str:
    if not _text(value, what).strip():
        raise Malformed(f"is wrong: {what} is blank")
    return str(value)


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_CHOICES:
        raise Malformed(f"is wrong: the choices must be a list of 2 to {MAX_CHOICES} texts")
    return tuple(_filled(choice, f"choice {i}") for i, choice in enumerate(value))


def _index(value: Any, count: int) -> int:
    """``2``, ``"2"`` (as HellaSwag writes it) and ``"C"`` all mean the third choice."""
    index = -1
    if type(value) is int:
        index = value
    elif isinstance(value, str) and re.fullmatch("[0-9]{1,3}", value):
        index = int(value)
    elif isinstance(value, str) and re.fullmatch("[A-Z]", value):
        index = ord(value) - ord("A")
    if not 0 <= index < count:
        raise Malformed(
            f"is wrong: the answer must be an index from 0 to {count - 1} or a letter from A,"
            f" not {shown(str(value))}"
        )
    return index


def _labelled(path: Path, items: tuple[Item, ...]) -> tuple[Item, ...]:
    """The same lines, each with every label of the file as its choices, in sorted order."""
    labels = tuple(sorted({item.choices[0] for item in items}))
    if not 2 <= len(labels) <= MAX_CHOICES:
        raise UsageError(f"{path.name} has {len(labels)} labels; 2 to {MAX_CHOICES} are needed")
    return tuple(
        Item(item.line, item.text, labels, labels.index(item.choices[0])) for item in items
    )
