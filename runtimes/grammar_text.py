"""The grammar that an answer is asked to keep, as GBNF, checked for what engines would die of.

Knows brackets and lengths; what a grammar means, its engine knows.
"""

from __future__ import annotations

from edgekit.errors import UsageError
from edgekit.runtime import GenerateParams
from edgekit.runtimes.json_schema import to_gbnf

MAX_CHARACTERS = 1 << 16
MAX_DEPTH = 200
# Of one that does not parse, whatever the engine.
HINT = "it is GBNF, and needs a rule called root"


def wanted(params: GenerateParams) -> str | None:
    """The grammar of ``params``, or that of their JSON schema; None without either.

    Raises UsageError for a schema that is not supported, or a grammar that no engine may see.
    """
    if params.json_schema is not None:
        return to_gbnf(params.json_schema)
    if params.grammar is not None:
        _check(params.grammar)
    return params.grammar


def _check(text: str) -> None:
    """UsageError for what the engine's parser would die of, or would take for no grammar at all."""
    if not text.strip() or "\0" in text or len(text) > MAX_CHARACTERS:
        raise UsageError(f"a grammar has 1 to {MAX_CHARACTERS} characters, none of them NUL")
    depth = deepest = 0
    # Brackets inside strings count too: then a strange grammar is refused, which does no harm.
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise UsageError(f"the grammar nests deeper than {MAX_DEPTH} brackets")
