"""Values inside a graph that a change made something else on purpose, and names of their own for
them: what two files of a model call by one name is then comparable (``--explain-loss``).

Knows two graphs of one model before anything is rounded; never why they differ. A centred input, or
keys whose channels were scaled, are no loss, and would look like one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper

_SUFFIX = ".moved"
_SAME = 1e-4  # of the largest value: other kernels add up in another order


def between(before: Any, after: Any, feed: Mapping[str, Any]) -> set[str]:
    """Names of the float values that both graphs make of one sample, and that are not the same."""
    made = [{name for node in each.graph.node for name in node.output} for each in (before, after)]
    kept = {value.name for value in after.graph.output}
    shared = sorted((made[0] & made[1]) - kept - {""})
    found = set()
    for name, old, new in zip(
        shared, *(_values(each, shared, feed) for each in (before, after)), strict=True
    ):
        if not isinstance(old, np.ndarray) or old.dtype.kind != "f" or old.shape != new.shape:
            continue
        most = float(np.abs(old).max(initial=0.0))
        if float(np.abs(new - old).max(initial=0.0)) > _SAME * most:
            found.add(name)
    return found


def mark(model: Any, names: set[str]) -> None:
    """Give these values other names. Changes ``model`` in place."""
    for node in model.graph.node:
        for side in (node.input, node.output):
            for at, name in enumerate(side):
                if name in names:
                    side[at] = f"{name}{_SUFFIX}"
    for value in model.graph.value_info:
        if value.name in names:
            value.name = f"{value.name}{_SUFFIX}"


def _values(model: Any, names: list[str], feed: Mapping[str, Any]) -> list[Any]:
    copy = type(model).FromString(model.SerializeToString())
    known = {value.name for value in copy.graph.output}
    copy.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in names if name not in known
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Or the engine merges operators, and adds up in another order here than there.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        copy.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    found: list[Any] = session.run(names, dict(feed)) if names else []
    return found
