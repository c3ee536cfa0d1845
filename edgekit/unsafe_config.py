"""Knows which keys and values of a model's JSON files would make a loader import or run code.

Must never import, fetch or run what they name; it does not know what a model computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from edgekit.errors import UnsafeModelError
from edgekit.formats.foreign import shown

MAX_DEPTH = 32

# Loaders of transformers and its relatives obey these whatever the caller's own flag says:
# `auto_map` and `custom_*` name Python files of the repository, `trust_remote_code` inside a config
# was passed on to nested models (CVE-2026-5241), `transformers_weights` redirects the weights.
_REFUSED_KEYS = frozenset(
    {
        "auto_map",
        "base_model_class_path",
        "code_revision",
        "custom_code",
        "custom_generate",
        "custom_model",
        "custom_ops",
        "custom_pipeline",
        "custom_pipelines",
        "modules_to_import",
        "remote_code",
        "transformers_weights",
        "trust_remote_code",
        "use_kernels",
        "_target_",
    }
)

# A key of such a name is harmless with a number (`conv_kernel: 4`) and a command with a text.
_EXECUTABLE_KEY = re.compile(
    r"(^|_)(kernels?|kernel_(config|mapping|repo)|imports?|import_(path|from)|exec|eval|scripts?"
    r"|hooks?|plugins?|entry_?points?|py_?(files?|modules?|path)|python_(files?|modules?|path)"
    r"|(class|code|module|function)_(path|file|name)|source_code|shell|command|cmd|requirements"
    r"|callbacks?|callable|constructor|factory|loader)$"
)

# `_attn_implementation: "org/repo"` fetched and ran a kernel from that repository (CVE-2026-4372);
# plain names such as "sdpa" or "paged|eager" choose among what is built in.
_IMPLEMENTATION_KEY = re.compile(r"implementation(_internal)?$")
_CLASS_KEY = re.compile(r"(^|_)(class|cls|module|package)$")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]*(\|[A-Za-z0-9_]+)?")

_PYTHON_FILE = re.compile(r"[\w./\\:@-]+\.py[cowxz]?(::?[\w.]+)?", re.ASCII)
_REMOTE_CLASS = re.compile(r"[\w.-]+/[\w.-]+--[\w.]+", re.ASCII)

_HINT = (
    "edgekit runs no code of a model; if the family is built in, remove the key from a copy of the "
    "folder"
)


def refuse_code(config: Mapping[str, Any], *, origin: str) -> None:
    """Raise UnsafeModelError if anything in ``config``, however deep, asks for code to be run.

    ``origin`` names the file in the message.
    """
    # The whole list first: it bounds the depth, on which `_texts` then relies.
    for path, key, value in list(_entries(config, (), origin)):
        if reason := _objection(key, value):
            where = shown(".".join(path))
            raise UnsafeModelError(f"{origin}: {where} {reason}", hint=_HINT)


def _entries(
    node: Any, path: tuple[str, ...], origin: str
) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Every value with the keys that lead to it; a list's items go under the list's own key."""
    if len(path) > MAX_DEPTH:
        raise UnsafeModelError(f"{origin} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield (*path, key), key, value
            yield from _entries(value, (*path, key), origin)
    elif isinstance(node, list):
        for position, value in enumerate(node):
            if path:
                yield path, path[-1], value
            if isinstance(value, Mapping | list):
                yield from _entries(value, (*path, str(position)), origin)


def _objection(key: str, value: Any) -> str | None:
    if key in _REFUSED_KEYS and value not in (None, False):
        return "asks a loader to run code"
    texts = _texts(value)
    if _IMPLEMENTATION_KEY.search(key) and not all(_PLAIN_NAME.fullmatch(text) for text in texts):
        return f"names code outside the library: {shown(texts[0])}"
    if _EXECUTABLE_KEY.search(key) and texts:
        return f"looks like code to run: {shown(texts[0])}"
    if isinstance(value, str):
        if _CLASS_KEY.search(key) and not _PLAIN_NAME.fullmatch(value):
            return f"names a class outside the library: {shown(value)}"
        if _PYTHON_FILE.fullmatch(value):
            return f"names a Python file: {shown(value)}"
        if _REMOTE_CLASS.fullmatch(value):
            return f"names a class in another repository: {shown(value)}"
    return None


def _texts(value: Any) -> list[str]:
    """The strings that ``value`` is, or holds at any depth."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []
