"""A session that answers in the form of another one: its names, its layout, its types.

Knows two forms of one model's tensors; never how an engine works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.errors import UsageError
from edgekit.runtime import TensorSession, TensorSpec


class Aligned:
    """``other``, called with the inputs of ``like`` and answering with the names of its outputs.

    Inputs and outputs belong together by name, or else in their order. Channels may come last on
    one side: then they are moved. Raises UsageError where the two take something else.
    """

    def __init__(self, other: TensorSession, like: TensorSession) -> None:
        self._other = other
        self.task = like.task
        self.inputs, self.outputs = like.inputs, like.outputs
        self.threads = getattr(other, "threads", 0)
        self._in = _pairs(like.inputs, other.inputs, "inputs")
        self._out = _pairs(like.outputs, other.outputs, "outputs")

    def feeds(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of ``like`` as ``other`` takes them."""
        feeds = {}
        for mine, theirs in self._in:
            value = np.asarray(inputs[mine.name])
            value = _moved(value, _axes(mine), _axes(theirs))
            feeds[theirs.name] = value.astype(theirs.dtype, copy=False)
        return feeds

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As ``like`` would be called."""
        found = self._other.run(self.feeds(inputs))
        return {
            mine.name: _moved(found[theirs.name], _axes(theirs), _axes(mine))
            for mine, theirs in self._out
        }


def _pairs(
    mine: Sequence[TensorSpec], theirs: Sequence[TensorSpec], what: str
) -> list[tuple[TensorSpec, TensorSpec]]:
    if len(mine) != len(theirs):
        raise UsageError(f"one model has {len(mine)} {what}, the other {len(theirs)}")
    by_name = {spec.name: spec for spec in theirs}
    if set(by_name) == {spec.name for spec in mine}:
        return [(spec, by_name[spec.name]) for spec in mine]
    return list(zip(mine, theirs, strict=True))


def _axes(spec: TensorSpec) -> str:
    """ "first" or "last", where the channels of an image stand; "" for what is no image."""
    if len(spec.shape) != 4:
        return ""
    few = (1, 3)
    if spec.shape[1] in few and spec.shape[3] not in few:
        return "first"
    return "last" if spec.shape[3] in few and spec.shape[1] not in few else ""


def _moved(value: Any, have: str, want: str) -> Any:
    if {have, want} != {"first", "last"}:
        return value
    return np.ascontiguousarray(value.transpose((0, 2, 3, 1) if want == "last" else (0, 3, 1, 2)))
