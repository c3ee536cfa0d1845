"""One operator of an ONNX graph of one size: its attributes, and the inputs that never change.

Knows the form of a node; never what an operator computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.errors import UnsupportedModelError
from edgekit.formats.foreign import shown

HINT = "--format onnx, or give the torch model that the file was made of"

# What a node computes of its inputs (None for those that are left out): a tensor, or several.
Operator = Callable[["Node", Sequence[Any]], Any]


@dataclass(frozen=True)
class Node:
    """One operator. ``constants`` are the values of inputs, by place, that no input of the graph
    changes; ``opset`` is the version of the operators' set.
    """

    name: str
    op: str
    opset: int
    attributes: Mapping[str, Any]
    constants: dict[int, Any] = field(default_factory=dict)

    def ask(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def fixed(self, place: int, name: str = "") -> Any:
        """A list of whole numbers that stands in an attribute, as of old, or in an input; None
        where there is neither. Raises UnsupportedModelError where it is computed from the inputs.
        """
        if name and name in self.attributes:
            return list(self.attributes[name])
        if place not in self.constants:
            raise self.refused("takes sizes that depend on the model's inputs")
        found = self.constants[place]
        return None if found is None else np.asarray(found).ravel().tolist()

    def refused(self, why: str) -> UnsupportedModelError:
        """The error for a form of an operator that TFLite files cannot be made of."""
        return UnsupportedModelError(
            f"{self.op} ({shown(self.name) or 'without a name'}) {why}: edgekit cannot make it"
            " TFLite",
            hint=HINT,
        )


def named(table: dict[str, Operator], *names: str) -> Callable[[Operator], Operator]:
    """Puts a function into a table of operators under these names."""

    def keep(function: Operator) -> Operator:
        table.update(dict.fromkeys(names, function))
        return function

    return keep


def word(value: Any) -> str:
    """A string of an attribute."""
    return value.decode() if isinstance(value, bytes) else str(value)


def halves(pads: Sequence[int]) -> tuple[list[int], list[int]]:
    """What stands before each axis, and what behind it."""
    middle = len(pads) // 2
    return list(pads[:middle]), list(pads[middle:])


def torch_pads(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The same, the last axis first, as torch wants it."""
    return [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
