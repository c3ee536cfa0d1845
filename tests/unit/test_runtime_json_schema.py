"""A JSON schema becomes a grammar that keeps it, or a UsageError; never something in between."""

from __future__ import annotations

from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.runtimes.json_schema import to_gbnf

UNSUPPORTED: list[Any] = [
    {"type": "string", "pattern": "(a+)+b"},
    {"type": "string", "format": "date"},
    {"type": "integer", "minimum": 3},
    {"type": "number", "multipleOf": 2},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "prefixItems": [{}]},
    {"type": "object", "patternProperties": {}},
    {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}},
    {"allOf": [{}]},
    {"not": {}},
    {"if": {}},
    {"$ref": "https://example.com/schema.json"},
    {"$ref": "file:///etc/passwd"},
    {"$ref": "#/nowhere"},
    {"$ref": "#/$defs/missing"},
    {"$ref": 3},
    {"$ref": "#"},
    {"type": "thing"},
    {"type": []},
    {"type": "object", "required": ["a"]},
    {"type": "array", "minItems": 3, "maxItems": 2},
    {"type": "array", "minItems": -1},
    {"type": "array", "maxItems": 10**9},
    {"type": "string", "maxLength": 1.5},
    {"enum": []},
    {"enum": [float("nan")]},
    {"enum": list(range(10_000))},
    {"anyOf": []},
    {"anyOf": {}},
    False,
    [],
    "string",
    3,
]


@pytest.mark.parametrize("schema", UNSUPPORTED, ids=lambda schema: str(schema)[:50])
def test_what_is_not_supported_is_refused(schema: Any) -> None:
    with pytest.raises(UsageError):
        to_gbnf(schema)


def test_deep_wide_and_multiplying_schemas_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5_000):
        deep = {"type": "array", "items": deep}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(5_000)}}
    names = [{"$ref": f"#/$defs/d{i + 1}"} for i in range(40)]
    doubling = {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{i}": {"anyOf": [ref, ref]} for i, ref in enumerate(names)} | {"d40": {}},
    }
    for schema in (deep, wide, doubling):
        with pytest.raises(UsageError):
            to_gbnf(schema)


def test_a_schema_may_refer_to_itself() -> None:
    tree = {
        "type": "object",
        "properties": {"left": {"$ref": "#"}, "leaf": {"type": "boolean"}},
        "required": ["leaf"],
    }
    grammar = to_gbnf(tree)
    assert grammar.startswith("root ::= ref0\n")
    assert grammar.count("ref0 ::=") == 1


def test_quotes_and_backslashes_in_names_and_values_are_escaped() -> None:
    grammar = to_gbnf({"enum": ['a"b', "c\\d", "line\nbreak"]})
    assert r'"\"a\\\"b\""' in grammar
    assert r'"\"c\\\\d\""' in grammar
    assert "line\nbreak" not in grammar


def test_comments_of_a_schema_are_ignored() -> None:
    noted = {"type": "null", "title": "x", "description": "y", "$schema": "z"}
    assert to_gbnf(noted) == to_gbnf({"type": "null"})
