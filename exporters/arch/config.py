"""The facts of a config.json, typed and checked: every key that is read has a sane value.

Knows no family, no tensor and no GGUF; never fills in a value that neither file nor family gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgekit.errors import SourceError, UnsupportedModelError

_MAX_INTEGER = (1 << 31) - 1


class Config:
    """A config.json seen through the defaults of its family.

    ``defaults`` are the values that the family's own code uses for keys that the file leaves out.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.family = str(values.get("model_type", ""))
        self._values = {**defaults, **{key: v for key, v in values.items() if v is not None}}

    def get(self, key: str) -> Any:
        """The raw value; None where the file says null or nothing and the family has no default."""
        return self._values.get(key)

    def integer(self, key: str) -> int:
        """A positive integer below 2**31; SourceError otherwise."""
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_INTEGER:
            raise SourceError(f"config.json: '{key}' must be a positive integer, not {value!r}")
        return value

    def number(self, key: str) -> float:
        """A finite number; SourceError otherwise."""
        return finite(key, self._values.get(key))

    def expect(self, key: str, *allowed: Any) -> None:
        """Raise UnsupportedModelError unless ``key`` has one of the values that llama.cpp computes.

        A key that is missing or null passes: then the family's own default holds.
        """
        value = self._values.get(key)
        if value is not None and value not in allowed:
            known = " or ".join(repr(each) for each in allowed)
            raise UnsupportedModelError(
                f"{self.family} models with {key}={value!r} have no GGUF form (only {known})"
            )


def finite(key: str, value: Any) -> float:
    """``value`` as a float; SourceError unless it is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise SourceError(f"config.json: '{key}' must be a number, not {value!r}")
    return float(value)
