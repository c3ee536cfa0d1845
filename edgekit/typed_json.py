"""Dataclasses to JSON and strictly back: every key, every type, and nothing besides.

Knows type hints alone; never what the values mean.
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_WORDS = {int: "a whole number", float: "a number", str: "printable text", bool: "true or false"}
_MAX_INT = 1 << 63


class Mismatch(ValueError):
    """A value is not what its type hint says: ``where`` it stands, ``what`` is wrong with it."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}{what}" if what.startswith(":") else f"{where} {what}")
        self.where = where
        self.what = what.removeprefix(": ")


def write(value: Any) -> dict[str, Any]:
    """Dicts, lists, numbers and text for a dataclass; metadata "key" renames a field there."""
    return {key: _plain(getattr(value, name)) for key, name in _keys(type(value)).items()}


def _keys(kind: Any) -> dict[str, str]:
    """What each field of a dataclass is called outside -> its own name."""
    return {field.metadata.get("key", field.name): field.name for field in fields(kind)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return write(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def read(kind: type[T], body: Any, where: str) -> T:
    """An object of the dataclass ``kind``. Raises Mismatch; ``where`` names the outermost value.

    Hints may be int, float (whole numbers too, no infinity), str, bool, None, unions with None,
    ``Literal`` texts, ``tuple[X, ...]``, ``dict[str, X]`` and dataclasses.
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
            raise Mismatch(where, "must be a list")
        item = get_args(kind)[0]
        return tuple(_read(item, value, f"{where}[{i}]") for i, value in enumerate(body))
    if origin is dict:
        if not isinstance(body, dict):
            raise Mismatch(where, "must be an object")
        item = get_args(kind)[1]
        return {name: _read(item, value, f"{where}[{name!a}]") for name, value in body.items()}
    if origin is Literal:
        if body not in get_args(kind):
            raise Mismatch(where, f"must be one of {', '.join(get_args(kind))}")
        return body
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
        raise Mismatch(where, f"must be {_WORDS[kind]}")
    return body


def _object(kind: Any, body: Any, where: str) -> Any:
    if not isinstance(body, dict):
        raise Mismatch(where, "must be an object")
    hints, names = get_type_hints(kind), _keys(kind)
    if missing := names.keys() - body.keys():
        raise Mismatch(where, f"lacks {min(missing)!a}")
    if unknown := body.keys() - names.keys():
        raise Mismatch(where, f"has the unknown key {min(unknown)!a}")
    values = {name: _read(hints[name], body[key], f"{where}.{key}") for key, name in names.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise Mismatch(where, f": {error}") from None


def schema(kind: type[Any], title: str) -> dict[str, Any]:
    """The JSON Schema of what ``read`` takes for a dataclass, for editors and strangers."""
    known: dict[str, Any] = {}
    _schema(kind, known)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "$ref": f"#/$defs/{kind.__name__}",
        "$defs": dict(sorted(known.items())),
    }


_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def _schema(kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        (choice,) = (each for each in get_args(kind) if each is not NoneType)
        return {"anyOf": [_schema(choice, known), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _schema(get_args(kind)[0], known)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(get_args(kind)[1], known)}
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    name: str = kind.__name__
    if not is_dataclass(kind):
        return {"type": _TYPES[kind]}
    if name not in known:
        known[name] = {}
        hints, names = get_type_hints(kind), _keys(kind)
        known[name] = {
            "type": "object",
            "description": (kind.__doc__ or "").strip().splitlines()[0],
            "properties": {key: _schema(hints[own], known) for key, own in names.items()},
            "required": list(names),
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}
