"""An ONNX graph to change: who makes a value, who takes it, and what is constant.

Knows the package onnx; never a pattern, and never what a change is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit import _fs
from edgekit.errors import ExportError, UnsafePathError
from edgekit.formats import onnx as reader
from edgekit.formats.foreign import shown

MICROSOFT = "com.microsoft"
# A protobuf holds 2 GiB at most.
_INLINE_BYTES = 1500 << 20


def load(path: Path) -> Any:
    """The ModelProto of a file, its weights included; edgekit's own reader looks at it first."""
    reader.read(path)
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's own kinds
        raise ExportError(f"the package onnx cannot read {path}: {error}"[:300]) from None


def save(model: Any, path: Path) -> None:
    """Write a model so that equal models have equal bytes: no names of tools, no notes.

    Weights of more than 1.5 GiB go to ``<name>.data`` beside it, and no weight may lie elsewhere:
    raises UnsafePathError before anything is written.
    """
    _check_places(model, path)
    model.producer_name, model.producer_version = "edgekit", ""
    model.doc_string = model.graph.doc_string = ""
    model.graph.name = "model"
    del model.metadata_props[:], model.graph.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    with _fs.disk_errors(path):
        if model.ByteSize() > _INLINE_BYTES:
            onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
        else:
            path.write_bytes(model.SerializeToString(deterministic=True))


def _check_places(model: Any, path: Path) -> None:
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL and not tensor.external_data:
            continue
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        # Of two places nobody knows which one an engine takes.
        if places != [f"{path.name}.data"]:
            raise UnsafePathError(
                f"{path.name} would send to {shown(', '.join(places))} for the weight"
                f" {shown(tensor.name)}",
                hint="do not use this model",
            )
        _fs.contained(path.parent, places[0])  # a link leads elsewhere too


def _tensors(message: Any) -> Iterator[Any]:
    """All of a model, those in nodes, subgraphs, functions and training graphs too."""
    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(each)


class Graph:
    """A view of a ModelProto's main graph. After a change ask it again: nothing is kept."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes: list[Any] = list(model.graph.node)
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._arrays: dict[str, Any] = {}
        self._index()

    def _index(self) -> None:
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.takers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.takers.setdefault(name, []).append(node)
        self._outputs = {value.name for value in self.model.graph.output}

    def constant(self, name: str) -> Any:
        """The array of an initializer or of a Constant node; None for what is computed."""
        if name not in self._arrays:
            maker = self.makers.get(name)
            if name in self._constants:
                self._arrays[name] = numpy_helper.to_array(self._constants[name])
            elif maker is not None and maker.op_type == "Constant":
                self._arrays[name] = _attribute_array(maker)
            else:
                return None
        return self._arrays[name]

    def maker(self, name: str, *kinds: str) -> Any:
        """The node that makes a value, if it is of one of these kinds; else None."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in kinds else None

    def only_taker(self, name: str, *kinds: str) -> Any:
        """The one node that takes a value, if it is the only one, of one of these kinds, and the
        value is no output of the graph; else None.
        """
        takers = self.takers.get(name, [])
        if len(takers) != 1 or name in self._outputs or takers[0].op_type not in kinds:
            return None
        return takers[0]

    def add_constant(self, name: str, array: Any) -> str:
        """A new initializer; its name."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        self.model.graph.initializer.append(tensor)
        self._constants[name] = self.model.graph.initializer[-1]
        return name

    def add_float(self, name: str, array: Any) -> str:
        """A new initializer of float32; its name, which no other constant has yet."""
        while self.constant(name) is not None:
            name += "+"
        return self.add_constant(name, array.astype(np.float32))

    def replace(self, old: Iterable[Any], new: Sequence[Any]) -> None:
        """New nodes in the place of the last of the old ones."""
        gone = [id(node) for node in old]
        last = max(i for i, node in enumerate(self.nodes) if id(node) in gone)
        before = [node for node in self.nodes[: last + 1] if id(node) not in gone]
        self.nodes = [*before, *new, *self.nodes[last + 1 :]]
        self._index()

    def keep(self, nodes: Sequence[Any]) -> None:
        """These nodes alone, in this order."""
        self.nodes = list(nodes)
        self._index()

    @property
    def nested(self) -> bool:
        """Whether a node holds a graph of its own, whose look outside is not seen here."""
        return any(a.HasField("g") for node in self.nodes for a in node.attribute)

    def finish(self) -> None:
        """Write the nodes back, without what nobody needs any more."""
        self._drop_unused()
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input} | self._outputs
        kept = [tensor for tensor in self.model.graph.initializer if tensor.name in used]
        if len(kept) != len(self.model.graph.initializer):
            copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
            del self.model.graph.initializer[:]
            self.model.graph.initializer.extend(copies)
        made = {name for node in self.nodes for name in node.output}
        known = [value for value in self.model.graph.value_info if value.name in made]
        del self.model.graph.value_info[:]
        self.model.graph.value_info.extend(known)

    def _drop_unused(self) -> None:
        while True:
            used = {name for node in self.nodes for name in node.input} | self._outputs
            if self.nested:
                return
            kept = [node for node in self.nodes if used.intersection(node.output)]
            if len(kept) == len(self.nodes):
                return
            self.nodes = kept


def is_convolutional(path: Path) -> bool:
    """Whether most of a file's products are convolutions: other forms of int8 suit those."""
    kinds = [node.op_type for node in reader.read(path).nodes]
    return kinds.count("Conv") > kinds.count("MatMul") + kinds.count("Gemm")


def need_domain(model: Any, domain: str, version: int = 1) -> None:
    """Let the model use the operators of a domain."""
    if all(each.domain != domain for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(domain, version))


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    for each in node.attribute:
        if each.name == name:
            return helper.get_attribute_value(each)
    return default


def _attribute_array(node: Any) -> Any:
    value = attribute(node, "value")
    return numpy_helper.to_array(value) if value is not None else None
