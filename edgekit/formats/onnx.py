"""Reads an ONNX file: its graph, the shapes and types of its tensors, and where their bytes lie.

Must never read a weight, import numpy or the package onnx, or follow a name out of the folder.

Format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit import _fs
from edgekit.errors import CorruptArtifactError, UnsafePathError, VersionError
from edgekit.formats.foreign import Malformed, opened, shown
from edgekit.formats.protobuf import MAX_LIST, VARINT, Field, Messages, signed

# onnxruntime 1.31 loads IR version 13 and operator set 26, and refuses the next of either; files
# of before version 3 are from 2017.
IR_VERSIONS = range(3, 14)
MAX_OPSET = 26

# Several times what the largest known models use. They bound time and memory on hostile files.
MAX_NODES = 1 << 18
MAX_DIMENSIONS = 64
MAX_DEPTH = 8
MAX_INT64 = (1 << 63) - 1
MAX_NUMBERS = 64  # of which the values are kept: shapes are that short

# data_type of a TensorProto -> (name, bits of a value; 0: of no fixed size).
DTYPES = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    8: ("string", 0),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8),
    19: ("float8e5m2", 8),
    20: ("float8e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4e2m1", 4),
    24: ("float8e8m0", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
}
_WHOLE = {
    "int64": struct.Struct("<q"),
    "int32": struct.Struct("<i"),
    "bool": struct.Struct("<B"),
}
_EXTERNAL = 1  # data_location


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """A constant of the graph. ``external`` names the file beside the model that holds its bytes,
    None where they are in the model; ``size_bytes`` is the size of its values. ``numbers`` are the
    values of a short list of whole numbers: shapes are computed from such.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    external: str | None = None
    numbers: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """An input, an output or an inner value. A dimension is a size, a name, or None if unknown;
    ``dtype`` is "" for what is no tensor.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """An operator. Attributes are int, float, str or tuples of one of these; a tensor is an
    OnnxTensor, and an attribute of another kind (a graph) is None.
    """

    op_type: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class OnnxHeader:
    """All of an ONNX file but its weights. Nodes of subgraphs are checked, and left out."""

    ir_version: int
    opsets: dict[str, int]
    producer: str
    metadata: dict[str, str]
    nodes: tuple[OnnxNode, ...]
    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    initializers: tuple[OnnxTensor, ...]
    value_info: tuple[OnnxValue, ...]
    file_size: int

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(tensor.elements for tensor in self.initializers)

    @property
    def beside(self) -> list[str]:
        """The files beside the model that hold weights."""
        return sorted({tensor.external for tensor in self.initializers if tensor.external})


def read(path: Path, *, whole: bool = True) -> OnnxHeader:
    """The graph of the ONNX file at ``path``; ``whole`` False: files beside it may be missing.

    Raises SourceError if there is no regular file to read, VersionError for versions that the
    engine does not know, UnsafePathError for weights outside of the folder, CorruptArtifactError
    for anything that breaks the format or exceeds the limits above.
    """
    with opened(path) as (file, size):
        reader = _Reader(Messages(file, size), path, whole)
        try:
            return reader.model(size)
        except Malformed as error:
            raise CorruptArtifactError(
                f"{path.name}: {error}", hint="download or export the file again"
            ) from None


@dataclass
class _Graph:
    """What a GraphProto holds, as far as it was read."""

    nodes: list[OnnxNode] = field(default_factory=list)
    inputs: list[OnnxValue] = field(default_factory=list)
    outputs: list[OnnxValue] = field(default_factory=list)
    initializers: list[OnnxTensor] = field(default_factory=list)
    value_info: list[OnnxValue] = field(default_factory=list)


class _Reader:
    """Messages to objects. Each method reads the message between two places of the file."""

    def __init__(self, messages: Messages, path: Path, whole: bool) -> None:
        self._messages, self._path, self._whole = messages, path, whole
        self._nodes = 0

    def model(self, size: int) -> OnnxHeader:
        version, producer = 0, ""
        opsets: dict[str, int] = {}
        metadata: dict[str, str] = {}
        graph: _Graph | None = None
        for each in self._messages.fields(0, size):
            match each.number:
                case 1:
                    version = self._messages.number(each)
                case 2:
                    producer = self._messages.text(each)
                case 7:
                    if graph is not None:
                        raise Malformed("has two graphs")
                    graph = self._graph(each, depth=0)
                case 8:
                    domain, opset = self._opset(each)
                    opsets[domain] = opset
                case 14:
                    key, value = self._entry(each)
                    metadata[key] = value
                case 20:
                    raise Malformed("holds a training graph, which edgekit does not read")
                case 25:  # functions: their nodes count, and their tensors must be safe too
                    self._function(each)
        if graph is None:
            raise Malformed("is not an ONNX file: it has no graph")
        self._check_versions(version, opsets)
        return OnnxHeader(
            ir_version=version,
            opsets=opsets,
            producer=producer,
            metadata=metadata,
            nodes=tuple(graph.nodes),
            inputs=tuple(graph.inputs),
            outputs=tuple(graph.outputs),
            initializers=tuple(graph.initializers),
            value_info=tuple(graph.value_info),
            file_size=size,
        )

    def _check_versions(self, version: int, opsets: dict[str, int]) -> None:
        if version not in IR_VERSIONS:
            raise VersionError(
                f"{self._path.name} has ONNX IR version {version};"
                f" {IR_VERSIONS.start} to {IR_VERSIONS.stop - 1} are read"
            )
        opset = opsets.get("", opsets.get("ai.onnx", 0))
        if not 1 <= opset <= MAX_OPSET:
            raise VersionError(
                f"{self._path.name} needs operator set {opset}; 1 to {MAX_OPSET} are known"
            )

    # Graphs

    def _graph(self, message: Field, depth: int) -> _Graph:
        if depth > MAX_DEPTH:
            raise Malformed("has graphs inside graphs inside graphs")
        found = _Graph()
        for each in self._messages.inside(message):
            match each.number:
                case 1:
                    found.nodes.append(self._node(each, depth))
                case 5:
                    found.initializers.append(self._tensor(each))
                case 11:
                    found.inputs.append(self._value(each))
                case 12:
                    found.outputs.append(self._value(each))
                case 13:
                    found.value_info.append(self._value(each))
                case 15:
                    raise Malformed("has sparse weights, which edgekit does not read")
        names = [tensor.name for tensor in found.initializers]
        if len(set(names)) != len(names):
            raise Malformed("has two weights of one name")
        return found

    def _function(self, message: Field) -> None:
        for each in self._messages.inside(message):
            if each.number == 7:
                self._node(each, 1)
            elif each.number == 11:  # the default of an attribute
                self._attribute(each, 1)

    def _node(self, message: Field, depth: int) -> OnnxNode:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise Malformed(f"has more than {MAX_NODES} nodes")
        texts = {3: "", 4: "", 7: ""}
        inputs: list[str] = []
        outputs: list[str] = []
        attributes: dict[str, Any] = {}
        for each in self._messages.inside(message):
            if each.number in texts:
                texts[each.number] = self._messages.text(each)
            elif each.number in (1, 2):
                (inputs if each.number == 1 else outputs).append(self._messages.text(each))
            elif each.number == 5:
                name, value = self._attribute(each, depth)
                attributes[name] = value
        if not texts[4]:
            raise Malformed("has a node without an operator")
        return OnnxNode(texts[4], texts[7], texts[3], tuple(inputs), tuple(outputs), attributes)

    def _attribute(self, message: Field, depth: int) -> tuple[str, Any]:
        name = ""
        single: Any = None
        lists: dict[int, list[Any]] = {}
        for each in self._messages.inside(message):
            match each.number:
                case 1:
                    name = self._messages.text(each)
                case 2:
                    single = self._messages.real(each)
                case 3:
                    single = signed(self._messages.number(each))
                case 4:
                    single = self._messages.text(each)
                case 5 | 10:
                    single = self._tensor(each)
                case 6 | 11:
                    self._graph(each, depth + 1)
                case 7:
                    lists.setdefault(7, []).extend(self._messages.reals(each))
                case 8:
                    lists.setdefault(8, []).extend(self._messages.numbers(each))
                case 9:
                    lists.setdefault(9, []).append(self._messages.text(each))
                case 22 | 23:
                    raise Malformed("has sparse weights, which edgekit does not read")
            if any(len(values) > MAX_LIST for values in lists.values()):
                raise Malformed(f"has a list of more than {MAX_LIST} values")
        for values in lists.values():
            single = tuple(values)
        return name, single

    def _value(self, message: Field) -> OnnxValue:
        name, dtype = "", ""
        shape: tuple[int | str | None, ...] = ()
        for each in self._messages.inside(message):
            if each.number == 1:
                name = self._messages.text(each)
            elif each.number == 2:
                dtype, shape = self._type(each)
        return OnnxValue(name, dtype, shape)

    def _type(self, message: Field) -> tuple[str, tuple[int | str | None, ...]]:
        dtype, shape = "", []
        for each in self._messages.inside(message):
            if each.number != 1:  # a sequence, a map, an optional
                continue
            for part in self._messages.inside(each):
                if part.number == 1:
                    dtype = self._dtype(self._messages.number(part))[0]
                elif part.number == 2:
                    shape = [
                        self._dimension(dim)
                        for dim in self._messages.inside(part)
                        if dim.number == 1
                    ]
        if len(shape) > MAX_DIMENSIONS:
            raise Malformed("has a value of too many dimensions")
        return dtype, tuple(shape)

    def _dimension(self, message: Field) -> int | str | None:
        found: int | str | None = None
        for each in self._messages.inside(message):
            if each.number == 1:
                found = signed(self._messages.number(each))
                if found < 0:
                    raise Malformed("has a negative dimension")
            elif each.number == 2:
                found = self._messages.text(each)
        return found or (found if found == 0 else None)

    # Weights

    def _tensor(self, message: Field) -> OnnxTensor:
        name, number, location = "", 0, 0
        dims: list[int] = []
        external: dict[str, str] = {}
        stored: dict[int, int] = {}  # field -> bytes of its data
        data: list[Field] = []
        for each in self._messages.inside(message):
            match each.number:
                case 1 if len(dims) <= MAX_DIMENSIONS:
                    dims += self._messages.numbers(each)
                case 2:
                    number = self._messages.number(each)
                case 8:
                    name = self._messages.text(each)
                case 9 if each.wire == VARINT:
                    raise Malformed("has a number where the bytes of a weight belong")
                case 4 | 5 | 6 | 7 | 9 | 10 | 11:
                    if len(data) <= MAX_NUMBERS:
                        data.append(each)
                    stored[each.number] = stored.get(each.number, 0) + max(
                        1 if each.wire == VARINT else 0, each.end - each.start
                    )
                case 13:
                    key, value = self._entry(each)
                    external[key] = value
                case 14:
                    location = self._messages.number(each)
        dtype, bits = self._dtype(number)
        if len(dims) > MAX_DIMENSIONS or any(d < 0 for d in dims):
            raise Malformed(f"weight {shown(name)} has an impossible shape")
        elements = math.prod(dims)
        if elements > MAX_INT64 >> 7:
            raise Malformed(f"weight {shown(name)} has an impossible shape")
        size_bytes = -(-elements * bits // 8)
        if location == _EXTERNAL or external:
            place = self._external(name, external, size_bytes)
            return OnnxTensor(name, dtype, tuple(dims), size_bytes, place)
        self._check_stored(name, elements, size_bytes, bits, stored)
        numbers = self._numbers(dtype, data) if elements <= MAX_NUMBERS else None
        return OnnxTensor(name, dtype, tuple(dims), size_bytes, numbers=numbers)

    def _numbers(self, dtype: str, data: list[Field]) -> tuple[int, ...] | None:
        """The values of a short list of whole numbers."""
        if dtype not in _WHOLE:
            return None
        found: list[int] = []
        for each in data:
            if each.number == 9:
                kind = _WHOLE[dtype]
                found += (value for (value,) in kind.iter_unpack(self._messages.data(each)))
            else:
                found += self._messages.numbers(each)
        return tuple(found)

    @staticmethod
    def _check_stored(
        name: str, elements: int, size_bytes: int, bits: int, stored: dict[int, int]
    ) -> None:
        if len(stored) > 1:
            raise Malformed(f"weight {shown(name)} has its values twice")
        for number, found in stored.items():
            if number == 9:
                good = found == size_bytes
            elif number in (4, 10):  # float_data, double_data; a complex value takes two of them
                good = found * 8 == elements * bits
            elif number == 6:  # string_data
                good = True
            else:  # varints of one to ten bytes; several small values may share one
                good = found * 8 >= elements * min(bits, 8) and found <= 10 * max(1, elements)
            if not good:
                raise Malformed(f"weight {shown(name)} has not the size of its shape")
        if elements and not stored:
            raise Malformed(f"weight {shown(name)} has no values")

    def _external(self, name: str, entries: dict[str, str], size_bytes: int) -> str:
        """The checked name of the file beside the model that holds a weight."""
        location = entries.get("location", "")
        numbers = {}
        for key in ("offset", "length"):
            text = entries.get(key, "0" if key == "offset" else str(size_bytes))
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise Malformed(f"weight {shown(name)} has the {key} {shown(text)}")
            numbers[key] = int(text)
        if numbers["length"] != size_bytes:
            raise Malformed(f"weight {shown(name)} has not the size of its shape")
        place = self._contained(location)
        if not self._whole:
            return location
        try:
            status = os.lstat(place)
        except (OSError, ValueError):
            raise CorruptArtifactError(
                f"{self._path.name} keeps weights in {shown(location)}, which is missing",
                hint="copy it beside the model",
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise self._unsafe(location, "is no plain file")
        if numbers["offset"] + numbers["length"] > status.st_size:
            raise Malformed(f"weight {shown(name)} lies beyond the end of {shown(location)}")
        return location

    def _contained(self, location: str) -> Path:
        if not location or "\\" in location or ":" in location or not location.isprintable():
            raise self._unsafe(location, "is no plain name")
        try:
            place = _fs.contained(self._path.parent, location)
        except (UnsafePathError, ValueError, OSError):
            raise self._unsafe(location, "is not beside it") from None
        if place == self._path:
            raise self._unsafe(location, "is the model itself")
        return place

    def _unsafe(self, location: str, why: str) -> UnsafePathError:
        return UnsafePathError(
            f"{self._path.name} sends to {shown(location)} for weights, which {why}",
            hint="do not use this model",
        )

    def _dtype(self, number: int) -> tuple[str, int]:
        if number not in DTYPES:
            raise Malformed(f"has the unknown type of values {number}")
        return DTYPES[number]

    # Small messages and numbers

    def _opset(self, message: Field) -> tuple[str, int]:
        domain, version = "", 0
        for each in self._messages.inside(message):
            if each.number == 1:
                domain = self._messages.text(each)
            elif each.number == 2:
                version = signed(self._messages.number(each))
        return domain, version

    def _entry(self, message: Field) -> tuple[str, str]:
        pair = ["", ""]
        for each in self._messages.inside(message):
            if each.number in (1, 2):
                pair[each.number - 1] = self._messages.text(each)
        return pair[0], pair[1]
