"""An ONNX file as a torch module of one size: its open axes pinned, and all that follows from sizes
computed beforehand.

Knows a graph's order and its constants; what operators compute is its neighbours'. Never knows what
the module is traced to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from onnx import helper, numpy_helper

from edgekit.errors import UnsupportedModelError
from edgekit.exporters import onnx_forms, onnx_gelu, onnx_graph, onnx_operators, onnx_windows
from edgekit.exporters.onnx_node import HINT, Node, Operator
from edgekit.exporters.torch_model import TracedModel
from edgekit.formats import onnx as reader
from edgekit.formats.foreign import shown
from edgekit.preprocess import Preprocessing

_OPERATORS: dict[str, Operator] = (
    onnx_operators.OPERATORS | onnx_windows.OPERATORS | onnx_forms.OPERATORS
)
# What a graph of one size always knows: shapes, whatever their values are.
_SIZES = ("Shape", "Size")
_DOMAINS = ("", "ai.onnx")
_OLDEST = 9
_HALF = "float16"


def check(path: Path) -> None:
    """Whether ``build`` knows all of a graph, by its header alone. Raises UnsupportedModelError
    that names every operator which it does not know.
    """
    header = reader.read(path)
    opset = max((header.opsets.get(each, 0) for each in _DOMAINS), default=0)
    if opset < _OLDEST:
        raise UnsupportedModelError(
            f"{path.name} is of opset {opset}; TFLite is made of opset {_OLDEST} and later",
            hint="onnx.version_converter makes it newer",
        )
    unknown = Counter(
        node.op_type if node.domain in _DOMAINS else f"{node.domain}.{node.op_type}"
        for node in header.nodes
        if node.domain not in _DOMAINS or node.op_type not in {*_OPERATORS, "Constant"}
    )
    if unknown:
        named = ", ".join(f"{shown(name)} ({count})" for name, count in unknown.most_common())
        raise UnsupportedModelError(
            f"{path.name} has operators that edgekit cannot make TFLite of: {named}", hint=HINT
        )
    if any(each.dtype == _HALF for each in header.initializers):
        raise UnsupportedModelError(
            f"{path.name} holds weights in {_HALF}", hint="give the float32 file it was made of"
        )


def pinned(
    path: Path, steps: Preprocessing, length: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """The shape of every input, and the open axes with the size that each gets: batches of one,
    texts of ``length`` tokens, images of their own size.

    Raises UnsupportedModelError for an open axis that nothing tells the size of.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    open_axes: dict[str, int] = {}
    for value in reader.read(path).inputs:
        sizes: list[int] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) and size > 0:
                sizes.append(size)
                continue
            name = f"axis {axis} of {shown(value.name)}"
            if isinstance(size, str):
                name = size if size.isidentifier() else shown(size)
            if axis == 0:
                found = 1
            elif steps.text and axis == 1:
                found = length
            elif steps.image and value.name == steps.image.input and axis in (1, 2, 3):
                image = steps.image
                found = (0, len(image.mean), image.height, image.width)[axis]
            elif name in open_axes:
                found = open_axes[name]
            else:
                raise UnsupportedModelError(
                    f"the axis {axis} of {shown(value.name)} has any size ({name}), and a TFLite"
                    " file has one",
                    hint="python -m onnxruntime.tools.make_dynamic_shape_fixed --input_name"
                    f" {shown(value.name)} --input_shape SIZES IN OUT gives it one",
                )
            open_axes[name] = found
            sizes.append(found)
        shapes[value.name] = tuple(sizes)
    return shapes, open_axes


def build(path: Path, steps: Preprocessing, length: int) -> TracedModel:
    """The graph as a module, with an example of zeros and ones. ``length`` is that of texts.

    Raises UnsupportedModelError for what ``check`` and ``pinned`` refuse, and for forms of
    operators that need values which only a run tells.
    """
    check(path)
    shapes, _ = pinned(path, steps, length)
    header = reader.read(path)
    generator = torch.Generator().manual_seed(0)
    examples = []
    for value in header.inputs:
        kind = getattr(torch, value.dtype, None)
        if not isinstance(kind, torch.dtype):
            raise UnsupportedModelError(f"the input {shown(value.name)} is of type {value.dtype}")
        example = torch.randint(0, 2, shapes[value.name], generator=generator)
        examples.append(example.to(kind))
    names = [value.name for value in header.inputs]
    outputs = [value.name for value in header.outputs]
    with torch.no_grad():
        model = onnx_graph.load(path)
        onnx_gelu.apply(model)
        module = _Graph(model, dict(zip(names, examples, strict=True)), outputs)
    return TracedModel(module.eval(), tuple(examples), tuple(names), tuple(outputs), {}, steps)


class _Graph(torch.nn.Module):  # type: ignore[misc]
    """The operators that depend on inputs, in their order, and what they take beside those."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], outputs: Sequence[str]) -> None:
        """Runs the graph once on ``inputs``: what depends on none of them is a constant."""
        super().__init__()
        self._given, self._wanted = tuple(inputs), tuple(outputs)
        self._steps: list[tuple[Node, tuple[str, ...], tuple[str, ...]]] = []
        opset = max(each.version for each in model.opset_import if each.domain in _DOMAINS)
        fixed = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
            for tensor in model.graph.initializer
        }
        values: dict[str, Any] = dict(inputs)
        for made in model.graph.node:
            if made.op_type == "Constant":
                fixed[made.output[0]] = _constant(made)
                continue
            node, takes = _ready(made, opset, fixed)
            x = [fixed[name] if name in fixed else values.get(name) for name in takes]
            found = _answers(node, x, len([name for name in made.output if name]))
            known = made.op_type in _SIZES or all(name in fixed for name in takes if name)
            here = fixed if known else values
            here.update(zip(made.output, found, strict=False))
            if not known:
                self._steps.append((node, tuple(takes), tuple(made.output)))
        self._places = {}
        used = {name for _, takes, _ in self._steps for name in takes} | set(outputs)
        for number, name in enumerate(name for name in fixed if name in used):
            self._places[name] = f"constant_{number}"
            self.register_buffer(f"constant_{number}", fixed[name].contiguous())

    def forward(self, *tensors: Any) -> tuple[Any, ...]:
        """``tensors`` in the order of the file's inputs; its outputs in theirs."""
        values = {name: getattr(self, place) for name, place in self._places.items()}
        values |= dict(zip(self._given, tensors, strict=True))
        for node, takes, makes in self._steps:
            x = [values.get(name) for name in takes]
            found = _answers(node, x, len([name for name in makes if name]))
            values.update(zip(makes, found, strict=False))
        return tuple(values[name] for name in self._wanted)


def _ready(made: Any, opset: int, fixed: dict[str, Any]) -> tuple[Node, list[str]]:
    """The node, and its inputs. A layer's matrix is turned here, once: what lowers the module knows
    layers by their own form alone.
    """
    attributes = {each.name: _attribute(each) for each in made.attribute}
    takes = list(made.input)
    kind = made.op_type
    if kind == "Split":
        attributes["outputs"] = len(made.output)
    weights = fixed.get(takes[1]) if len(takes) > 1 else None
    turned = kind == "MatMul" or (kind == "Gemm" and not attributes.get("transB", 0))
    if turned and weights is not None and weights.dim() == 2 and takes[0] not in fixed:
        name = f"{takes[1]} turned"
        fixed.setdefault(name, weights.t().contiguous())
        takes[1], kind = name, "Gemm"
        attributes["transB"] = 1
    node = Node(made.name, kind, opset, attributes)
    for place, name in enumerate(takes):
        if not name:
            node.constants[place] = None
        elif name in fixed:
            node.constants[place] = fixed[name].numpy()
    return node, takes


def _answers(node: Node, x: Sequence[Any], count: int) -> tuple[Any, ...]:
    try:
        found = _OPERATORS[node.op](node, x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise node.refused(f"fails in torch ({reason[:100]})") from error
    made = tuple(found) if isinstance(found, tuple | list) else (found,)
    if count > len(made):
        raise node.refused(f"gives {count} values")
    return made


def _attribute(given: Any) -> Any:
    value = helper.get_attribute_value(given)
    return numpy_helper.to_array(value) if given.HasField("t") else value


def _constant(made: Any) -> Any:
    (value,) = (_attribute(each) for each in made.attribute)
    kinds = {"value_float": torch.float32, "value_floats": torch.float32}
    (name,) = (each.name for each in made.attribute)
    if name == "value":
        return torch.from_numpy(value.copy())
    return torch.tensor(value, dtype=kinds.get(name, torch.int64))
