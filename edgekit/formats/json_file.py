"""Knows how to read JSON from outside: one meaning only, bounded in bytes, values and depth.

Must never know what the values are for.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from edgekit.errors import SourceError
from edgekit.formats.foreign import Malformed, read_whole, shown

# A tokenizer.json of 256k tokens and 500k merges has 40 MB and 2 million values.
MAX_BYTES = 1 << 27
MAX_VALUES = 4_000_000
MAX_DEPTH = 64

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value in a JSON file of at most ``max_bytes``.

    Raises SourceError, with the file's name, where it cannot be read, is no strict UTF-8 JSON (NaN
    and Infinity are not), repeats a key of an object, or exceeds the limits above.
    """
    data = read_whole(path, max_bytes)
    try:
        return parse(data)
    except Malformed as error:
        raise SourceError(f"{path.name} {error}", hint="fetch the model again") from None


def parse(data: bytes) -> Any:
    """The value that ``data`` spells; Malformed as ``read`` says."""
    # Every value but the first stands after a comma, a colon or a bracket.
    if sum(data.count(mark) for mark in b",:[{") > MAX_VALUES:
        raise Malformed(f"has more than {MAX_VALUES} JSON values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError:
        raise Malformed("is not UTF-8") from None
    except RecursionError:
        raise Malformed(f"is nested deeper than {MAX_DEPTH}") from None
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(f"is not JSON: {str(error)[:100]}") from None
    _check_depth(value)
    if _SURROGATE.search(data):
        _check_texts(value)
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Malformed(f"has the key {shown(twice)} twice")
    return found


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise Malformed(f"holds {shown(digits)}, which no float can hold")
    return value


def _no_constant(name: str) -> Any:
    raise Malformed(f"holds {name}, which is not JSON")


def _check_texts(value: Any) -> None:
    """Half a surrogate pair could be read, but never printed or written again."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Malformed("holds text that is not Unicode") from None


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise Malformed(f"is nested deeper than {MAX_DEPTH}")
