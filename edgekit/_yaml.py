"""Strict YAML: plain data only, with file and line in every complaint.

Knows no schema. Never builds objects, follows aliases, or accepts a key twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edgekit.errors import UsageError

MAX_BYTES = 1 << 20
# Bounds the time: a value takes some 50 us on a desktop.
MAX_VALUES = 1 << 17
_MAX_DEPTH = 32
_MAX_NUMBER_CHARS = 64
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


@dataclass(frozen=True)
class Marked:
    """Plain data, and the line (from 1) of every value by its place: ``.cpu.cores``, ``.rows[2]``.

    The place of the whole document is empty.
    """

    data: Any
    lines: dict[str, int]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, aliases (they multiply), very deep nesting, and more
    than ``values_left`` values.
    """

    depth = 0
    values_left = MAX_VALUES

    def fetch_flow_collection_start(self, token: Any) -> None:
        # Here too, for the scanner reads far ahead of the composer, in quadratic time.
        if self.flow_level >= _MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {_MAX_DEPTH} levels", problem_mark=self.get_mark()
            )
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases are not allowed", problem_mark=event.start_mark
            )
        self.depth += 1
        self.values_left -= 1
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {_MAX_DEPTH} levels",
                problem_mark=parent.start_mark if parent else None,
            )
        if self.values_left < 0:
            raise yaml.MarkedYAMLError(
                problem="too many values", problem_mark=parent.start_mark if parent else None
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_scalar(self, node: Any) -> Any:
        # A long one costs quadratic time, and more so in YAML 1.1's base 60.
        if node.tag in _NUMBERS and len(node.value) > _MAX_NUMBER_CHARS:
            raise yaml.MarkedYAMLError(
                problem=f"a number of more than {_MAX_NUMBER_CHARS} characters",
                problem_mark=node.start_mark,
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is not a string", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key}' appears twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=True)


def parse(text: str, *, origin: str, error: type[UsageError] = UsageError) -> Any:
    """Plain data (dict, list, str, int, float, bool, None) from YAML text.

    ``origin`` is the file name for messages; ``error`` is the class to raise on bad input.
    """
    return parse_marked(text, origin=origin, error=error).data


def parse_marked(
    text: str,
    *,
    origin: str,
    error: type[UsageError] = UsageError,
    max_bytes: int = MAX_BYTES,
    max_values: int = MAX_VALUES,
) -> Marked:
    """``parse``, with the line of every value, for complaints about what they mean."""
    if len(text.encode("utf-8", "surrogatepass")) > max_bytes:
        raise error(f"{origin}: larger than {max_bytes} bytes")
    try:
        loader = _StrictLoader(text)  # a SafeLoader: it cannot build objects
        loader.values_left = max_values
        try:
            node = loader.get_single_node()
            data = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise error(f"{where}: {problem.problem or 'not valid YAML'}") from None
    except (yaml.YAMLError, ValueError) as problem:
        raise error(f"{origin}: not valid YAML ({str(problem).splitlines()[0]})") from None
    lines: dict[str, int] = {}
    _mark(node, "", lines)
    return Marked(data, lines)


def _mark(node: Any, place: str, lines: dict[str, int]) -> None:
    if node is None:
        return
    lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _mark(value, f"{place}.{key.value}", lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _mark(value, f"{place}[{number}]", lines)


def read(path: Path, *, error: type[UsageError] = UsageError) -> Any:
    """``parse`` for a file; a missing or unreadable file is ``error`` too."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise error(f"{path}: not UTF-8 text") from None
    return parse(text, origin=str(path), error=error)


def dump(data: Any) -> str:
    """YAML text with keys in the order given; ``parse`` reads it back."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
