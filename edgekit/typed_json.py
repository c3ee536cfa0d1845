"""Dataclasses to JSON and strictly back: every key, every type, and nothing besides.

Knows type hints alone; never what the values mean.
"""

from __future__ import annotations

import math
from dataclasses import asdict, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_WORDS = {int: "a whole number", float: "a number", str: "printable text", bool: "true or false"}
_MAX_INT = 1 << 63


class Mismatch(ValueError):
    """A value is not what its type hint says; the message names the place."""


def write(value: Any) -> dict[str, Any]:
    """Dicts, lists, numbers and text for a dataclass."""
    return {name: _plain(item) for name, item in asdict(value).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def read(kind: type[T], body: Any, where: str) -> T:
    """An object of the dataclass ``kind``. Raises Mismatch; ``where`` names the outermost value.

    Hints may be int, float (whole numbers too, no infinity), str, bool, None, unions with None,
    ``tuple[X, ...]``, ``dict[str, X]`` and dataclasses.
    """
    found: T = _read(kind, body, where)
    return found


def _read(kind: Any, body: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        if body is None and NoneType in get_args(kind):
            return None
        (kind,) = (choice for choice in get_args(kind) if choice is not NoneType)
        return _read(kind, body, where)
    if origin is tuple:
        if not isinstance(body, list):
            raise Mismatch(f"{where} must be a list")
        item = get_args(kind)[0]
        return tuple(_read(item, value, f"{where}[{i}]") for i, value in enumerate(body))
    if origin is dict:
        if not isinstance(body, dict):
            raise Mismatch(f"{where} must be an object")
        item = get_args(kind)[1]
        return {name: _read(item, value, f"{where}[{name!a}]") for name, value in body.items()}
    if is_dataclass(kind):
        return _object(kind, body, where)
    if kind is float and type(body) is int and abs(body) < _MAX_INT:
        body = float(body)
    good = type(body) is kind
    if kind is int:
        good = good and abs(body) < _MAX_INT
    if kind is float:
        good = good and math.isfinite(body)
    if kind is str:  # a stranger's text is shown on terminals, which obey control characters
        good = good and body.isprintable()
    if not good:
        raise Mismatch(f"{where} must be {_WORDS[kind]}")
    return body


def _object(kind: Any, body: Any, where: str) -> Any:
    if not isinstance(body, dict):
        raise Mismatch(f"{where} must be an object")
    hints = get_type_hints(kind)
    if missing := hints.keys() - body.keys():
        raise Mismatch(f"{where} lacks {min(missing)!a}")
    if unknown := body.keys() - hints.keys():
        raise Mismatch(f"{where} has the unknown key {min(unknown)!a}")
    values = {name: _read(hint, body[name], f"{where}.{name}") for name, hint in hints.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise Mismatch(f"{where}: {error}") from None
