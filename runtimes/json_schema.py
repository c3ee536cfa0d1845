"""From a JSON schema to a grammar (GBNF) whose every text is JSON that the schema accepts.

Must never fetch anything, and never guess: a keyword that is not listed here is a UsageError, for
an answer that silently breaks its schema is worse than none.

Supported (https://json-schema.org/draft/2020-12): ``type`` (one or several; object, array, string,
number, integer, boolean, null), ``properties``, ``required``, ``additionalProperties`` (false, and
it is always treated so when there are properties), ``items``, ``minItems``, ``maxItems``,
``minLength``, ``maxLength``, ``enum``, ``const``, ``anyOf``, ``oneOf`` (as ``anyOf``), ``$ref`` to
``#``, ``#/$defs/NAME`` or ``#/definitions/NAME``. ``title``, ``description``, ``default``,
``examples``, ``$schema``, ``$id`` and ``$comment`` are ignored. Properties come in the order of the
schema, without needless white space.
"""

from __future__ import annotations

import json
from typing import Any

from edgekit.errors import UsageError

MAX_SCHEMAS = 1_000
MAX_DEPTH = 32
MAX_REPEAT = 1_000
MAX_CHARACTERS = 60_000
# How many alternatives one place may have: the engine walks through all of them for every token.
MAX_WIDTH = 256

_IGNORED = {"title", "description", "default", "examples", "$schema", "$id", "$comment"}
_DEFINITIONS = ("$defs", "definitions")
_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "number": set[str](),
    "integer": set[str](),
    "boolean": set[str](),
    "null": set[str](),
}
_KNOWN = {"type", "enum", "const", "anyOf", "oneOf", "$ref", "$defs"}.union(*_OF_TYPE.values())
_BASICS = r"""
space ::= " "?
boolean ::= "true" | "false"
null ::= "null"
char ::= [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" hex hex hex hex)
hex ::= [0-9a-fA-F]
string ::= "\"" char* "\""
integer ::= "-"? ("0" | [1-9] [0-9]{0,15})
number ::= integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?
value ::= object | array | string | number | boolean | null
object ::= "{" space (string ":" space value ("," space string ":" space value)*)? "}"
array ::= "[" space (value ("," space value)*)? "]"
"""


def to_gbnf(schema: Any) -> str:
    """The grammar, with ``root`` as its first rule. UsageError for what is not supported."""
    return _Converter(schema).grammar()


class _Converter:
    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._rules: list[str] = []
        self._named: dict[str, str] = {}
        self._count = 0

    def grammar(self) -> str:
        root = self._reference("#")
        text = "\n".join([f"root ::= {root}", *self._rules]) + _BASICS
        if len(text) > MAX_CHARACTERS:
            raise UsageError(f"the JSON schema makes a grammar of {len(text)} characters")
        return text

    def _reference(self, ref: Any) -> str:
        """The rule for ``#`` or a definition; it may refer to itself."""
        target = self._target(ref)
        if ref in self._named:
            return self._named[ref]
        rule = self._named[ref] = f"ref{len(self._named)}"
        self._rules.append(f"{rule} ::= {self._convert(target, 0)}")
        return rule

    def _target(self, ref: Any) -> Any:
        """What a reference points to."""
        target: Any = None
        if ref == "#":
            target = self._schema
        elif isinstance(ref, str) and isinstance(self._schema, dict):
            hash_sign, _, path = ref.partition("/")
            folder, _, name = path.partition("/")
            name = name.replace("~1", "/").replace("~0", "~")
            if hash_sign == "#" and folder in _DEFINITIONS:
                definitions = self._schema.get(folder)
                target = definitions.get(name) if isinstance(definitions, dict) else None
        if target is None:
            raise UsageError(f"the JSON schema refers to {ref!r}, which is not inside it")
        return target

    def _rule(self, body: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name} ::= {body}")
        return name

    def _convert(self, schema: Any, depth: int) -> str:
        """An expression for one schema: a name, or one in brackets."""
        self._count += 1
        if self._count > MAX_SCHEMAS or depth > MAX_DEPTH:
            raise UsageError(
                f"the JSON schema is too large: at most {MAX_SCHEMAS} schemas, {MAX_DEPTH} deep"
            )
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            raise UsageError(f"a JSON schema must be an object, not {_shown(schema)}")
        keys = set(schema) - _IGNORED - set(_DEFINITIONS if depth == 0 else ())
        for form in ("$ref", "const", "enum", "anyOf", "oneOf"):
            if form in keys:
                self._only(keys, {form, "type"} if form in ("const", "enum") else {form})
                self._measure(schema, [0], 0)
                return self._form(form, schema[form], depth)
        if "type" not in schema:
            self._only(keys, set())
            return "value"
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        allowed = {"type"}
        for name in names:
            if not isinstance(name, str) or name not in _OF_TYPE:
                raise UsageError(f"the JSON schema has the unknown type {_shown(name)}")
            allowed |= _OF_TYPE[name]
        self._only(keys, allowed)
        if not names:
            raise UsageError("the JSON schema has an empty list of types")
        return self._either([self._typed(name, schema, depth) for name in names])

    def _only(self, keys: set[str], allowed: set[str]) -> None:
        for key in sorted(keys - allowed):
            raise UsageError(
                f"the JSON schema uses '{key}', which is not supported here",
                hint=f"supported: {', '.join(sorted(_KNOWN))}",
            )

    def _measure(self, schema: Any, seen: list[int], depth: int) -> None:
        """UsageError where choices of choices multiply, or a reference leads back to itself."""
        seen[0] += 1
        if seen[0] > MAX_WIDTH or depth > MAX_DEPTH:
            raise UsageError(f"the JSON schema has a place with more than {MAX_WIDTH} alternatives")
        if not isinstance(schema, dict):
            return
        if "$ref" in schema:
            self._measure(self._target(schema["$ref"]), seen, depth + 1)
        for form in ("anyOf", "oneOf", "enum"):
            options = schema.get(form)
            for option in options if isinstance(options, list) else ():
                self._measure({} if form == "enum" else option, seen, depth + 1)

    def _either(self, options: list[str]) -> str:
        return options[0] if len(options) == 1 else f"({' | '.join(options)})"

    def _form(self, form: str, value: Any, depth: int) -> str:
        if form == "$ref":
            return self._reference(value)
        if form == "const":
            return _literal(_json(value))
        if not isinstance(value, list) or not value:
            raise UsageError(f"'{form}' in the JSON schema must be a list with something in it")
        if form == "enum":
            return self._either([_literal(_json(option)) for option in value])
        return self._either([self._convert(option, depth + 1) for option in value])

    def _typed(self, name: str, schema: dict[str, Any], depth: int) -> str:
        if name == "object":
            return self._object(schema, depth)
        if name == "array":
            return self._array(schema, depth)
        if name == "string" and {"minLength", "maxLength"} & set(schema):
            low, high = _range(schema, "minLength", "maxLength")
            return self._rule(f'"\\"" char{_times(low, high)} "\\""')
        return name

    def _object(self, schema: dict[str, Any], depth: int) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        extra = schema.get("additionalProperties", not properties)
        named = isinstance(required, list) and all(isinstance(name, str) for name in required)
        if not isinstance(properties, dict) or not named:
            raise UsageError("the JSON schema has malformed properties or required")
        if missing := [name for name in required if name not in properties]:
            raise UsageError(f"the JSON schema requires {missing[0]!r} without describing it")
        if not isinstance(extra, bool) or (
            extra and properties and "additionalProperties" in schema
        ):
            raise UsageError("the JSON schema may only have 'additionalProperties': false")
        if not properties:
            return "object" if extra else '("{" space "}")'
        pairs = [
            self._rule(f'{_literal(_json(name))} ":" space {self._convert(sub, depth + 1)}')
            for name, sub in properties.items()
        ]
        # tails[i]: what may follow once some property before number i was written.
        tail = ""
        starts: list[str] = []
        for pair, name in reversed(list(zip(pairs, properties, strict=True))):
            needed = name in required
            start = f"{pair} {tail}".strip()
            starts = [start] if needed else [start, *starts]
            follow = f'"," space {pair}'
            if not needed:
                follow = f"({follow})?"
            tail = self._rule(f"{follow} {tail}".strip())
        if not required:
            starts.append('""')
        return self._rule(f'"{{" space ({" | ".join(starts)}) space "}}"')

    def _array(self, schema: dict[str, Any], depth: int) -> str:
        item = self._convert(schema.get("items", True), depth + 1)
        low, high = _range(schema, "minItems", "maxItems")
        if high == 0:
            return '("[" space "]")'
        rest = _times(max(0, low - 1), None if high is None else high - 1)
        items = f'{item} ("," space {item}){rest}'
        if low == 0:
            items = f"({items})?"
        return self._rule(f'"[" space {items} space "]"')


def _range(schema: dict[str, Any], low_key: str, high_key: str) -> tuple[int, int | None]:
    low, high = schema.get(low_key, 0), schema.get(high_key)
    for value in (low, 0 if high is None else high):
        if type(value) is not int or not 0 <= value <= MAX_REPEAT:
            raise UsageError(f"{low_key} and {high_key} must be whole numbers up to {MAX_REPEAT}")
    if high is not None and high < low:
        raise UsageError(f"the JSON schema has {high_key} {high} below {low_key} {low}")
    return low, high


def _times(low: int, high: int | None) -> str:
    return f"{{{low},}}" if high is None else f"{{{low},{high}}}"


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        raise UsageError(f"the JSON schema holds {_shown(value)}, which is not JSON") from None


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _literal(text: str) -> str:
    """``text``, which is JSON, as a GBNF string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\x7f", "\\x7F")
    return f'"{escaped}"'
