"""Reads a TFLite file: its graphs, the types, shapes and sizes of its tensors, its signatures.

Must never read a weight, import numpy or an engine, or open another file.

Format: https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs; the
fields of its tables go by their place there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import CorruptArtifactError, VersionError
from edgekit.formats.flatbuffer import Flatbuffer, Table
from edgekit.formats.foreign import Malformed, opened, shown
from edgekit.formats.tflite_names import BITS, CUSTOM, DTYPES, OPERATORS

IDENTIFIER = b"TFL3"
VERSION = 3

# Several times what the largest known models use. They bound time and memory on hostile files.
MAX_GRAPHS = 256
MAX_TENSORS = MAX_OPERATORS = MAX_BUFFERS = 1 << 17
MAX_KINDS = 1 << 12
MAX_SIGNATURES = 256
MAX_DIMENSIONS = 16
MAX_ELEMENTS = (1 << 63) >> 7
_BLOCKWISE = 2  # QuantizationDetails


@dataclass(frozen=True, slots=True)
class TfliteTensor:
    """A tensor of a graph. A dimension is None where it may have any size; ``buffer`` numbers the
    bytes of a constant, which tensors may share, and is None for what is computed. ``scales`` is 0
    for floats, 1 for one scale, or the number of channels with one each; ``block`` the number of
    values that share a scale, 0 where none do.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    size_bytes: int
    buffer: int | None
    scales: int
    block: int

    @property
    def elements(self) -> int:
        """Values of a batch of one, where the shape is open."""
        return math.prod(size or 0 if size is not None else 1 for size in self.shape)


@dataclass(frozen=True, slots=True)
class TfliteOperator:
    """An operator; ``inputs`` and ``outputs`` number tensors, -1 is an input that is left out."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class TfliteGraph:
    """A graph: the first one is the model, others are branches, loops or further signatures."""

    name: str
    tensors: tuple[TfliteTensor, ...]
    operators: tuple[TfliteOperator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class TfliteSignature:
    """A way to call a graph: tensors' numbers by the names that callers use."""

    key: str
    graph: int
    inputs: dict[str, int]
    outputs: dict[str, int]


@dataclass(frozen=True)
class TfliteHeader:
    """All of a TFLite file but its weights."""

    description: str
    graphs: tuple[TfliteGraph, ...]
    signatures: tuple[TfliteSignature, ...]
    file_size: int

    @property
    def main(self) -> TfliteGraph:
        """The graph that engines run where nobody names a signature."""
        return self.graphs[0]

    @property
    def constants(self) -> tuple[TfliteTensor, ...]:
        """Every constant once, in the file's order."""
        found: dict[int, TfliteTensor] = {}
        for graph in self.graphs:
            for tensor in graph.tensors:
                if tensor.buffer is not None:
                    found.setdefault(tensor.buffer, tensor)
        return tuple(found.values())

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(tensor.elements for tensor in self.constants)

    @property
    def inputs(self) -> dict[str, int]:
        """The main graph's inputs: tensors' numbers by the names that callers use, which are those
        of its first signature, or the tensors' own where it has none.
        """
        return self._named("inputs")

    @property
    def outputs(self) -> dict[str, int]:
        """The main graph's outputs, named as its inputs."""
        return self._named("outputs")

    def _named(self, which: str) -> dict[str, int]:
        numbers: tuple[int, ...] = getattr(self.main, which)
        for signature in self.signatures:
            names: dict[str, int] = getattr(signature, which)
            if signature.graph == 0 and sorted(names.values()) == sorted(numbers):
                return names
        return {self.main.tensors[number].name: number for number in numbers}


def read(path: Path) -> TfliteHeader:
    """The graphs of the TFLite file at ``path``.

    Raises SourceError if there is no regular file to read, VersionError for a version that the
    engine does not know, CorruptArtifactError for anything that breaks the format, exceeds the
    limits above, or sends for weights to another file.
    """
    with opened(path) as (file, size):
        try:
            return _Reader(Flatbuffer(file, size)).model(size)
        except Malformed as error:
            raise CorruptArtifactError(
                f"{path.name}: {error}", hint="download or export the file again"
            ) from None


class _Reader:
    """Tables to objects."""

    def __init__(self, buffer: Flatbuffer) -> None:
        self._buffer = buffer
        self._kinds: list[str] = []
        self._sizes: list[int] = []  # of each buffer, in bytes
        self._tensors = self._operators = 0
        self._siblings = 0  # tensors of the graph at hand

    def model(self, size: int) -> TfliteHeader:
        root = self._buffer.root(IDENTIFIER)
        version = root.number(0, "I")
        if version != VERSION:
            raise VersionError(
                f"the file has TFLite schema version {version}, edgekit reads {VERSION}"
            )
        if root.extent(8, 4)[1] or root.extent(9, 4)[1]:
            raise Malformed("keeps weights in other files, which edgekit does not read")
        self._kinds = [self._kind(each) for each in root.tables(1, MAX_KINDS)]
        self._sizes = [self._stored(each) for each in root.tables(4, MAX_BUFFERS)]
        graphs = tuple(self._graph(each) for each in root.tables(2, MAX_GRAPHS))
        if not graphs:
            raise Malformed("has no graph")
        for each in root.tables(6, MAX_KINDS):  # metadata
            if each.number(1, "I") >= len(self._sizes):
                raise Malformed("has metadata in a buffer that it has not")
        signatures = tuple(self._signature(each, graphs) for each in root.tables(7, MAX_SIGNATURES))
        return TfliteHeader(root.text(3), graphs, signatures, size)

    def _kind(self, table: Table) -> str:
        # Files of before 2020 have room for 127 kinds only: the larger number counts.
        number = max(table.number(0, "b"), table.number(3, "i"))
        if number < 0:
            raise Malformed(f"has the impossible operator {number}")
        if number == CUSTOM:
            return f"custom {table.text(1)}"
        return OPERATORS[number] if number < len(OPERATORS) else f"operator {number}"

    def _stored(self, table: Table) -> int:
        """Bytes of a buffer, which all lie in the file."""
        offset, size = table.number(1, "Q"), table.number(2, "Q")
        if offset > 1:  # beyond the flatbuffer, whose offsets reach 2 GB; 1 is a placeholder
            if not self._buffer.holds(offset, size):
                raise Malformed("has a buffer that leads out of the file")
            return int(size)
        return table.extent(0)[1]

    # Graphs

    def _graph(self, table: Table) -> TfliteGraph:
        self._siblings = table.extent(0, 4)[1]
        tensors = tuple(self._tensor(each) for each in table.tables(0, MAX_TENSORS))
        operators = tuple(
            self._operator(each, len(tensors)) for each in table.tables(3, MAX_OPERATORS)
        )
        ends = [self._numbers(table, field, len(tensors), least=0) for field in (1, 2)]
        return TfliteGraph(table.text(4), tensors, operators, *ends)

    @staticmethod
    def _numbers(table: Table, field: int, count: int, least: int) -> tuple[int, ...]:
        """A list of numbers of tensors, of which there are ``count``."""
        found: tuple[int, ...] = table.numbers(field, "i")
        if any(not least <= number < count for number in found):
            raise Malformed("names a tensor that it has not")
        return found

    def _operator(self, table: Table, tensors: int) -> TfliteOperator:
        self._operators += 1
        if self._operators > MAX_OPERATORS:
            raise Malformed(f"has more than {MAX_OPERATORS} operators")
        kind = table.number(0, "I")
        if kind >= len(self._kinds):
            raise Malformed("has an operator of a kind that it does not name")
        table.extent(5)  # custom options
        offset, size = table.number(9, "Q"), table.number(10, "Q")
        if offset > 1 and not self._buffer.holds(offset, size):
            raise Malformed("has an operator whose options lead out of the file")
        inputs = self._numbers(table, 1, tensors, least=-1)
        outputs = self._numbers(table, 2, tensors, least=0)
        self._numbers(table, 8, tensors, least=-1)  # intermediates
        return TfliteOperator(self._kinds[kind], inputs, outputs)

    def _tensor(self, table: Table) -> TfliteTensor:
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise Malformed(f"has more than {MAX_TENSORS} tensors")
        name = table.text(3)
        number = table.number(1, "b")
        if number not in DTYPES:
            raise Malformed(f"has the unknown type of values {number}")
        dtype, _ = DTYPES[number]
        sizes, signature = table.numbers(0, "i"), table.numbers(7, "i")
        if signature and len(signature) != len(sizes):
            raise Malformed(f"tensor {shown(name)} has two shapes")
        if len(sizes) > MAX_DIMENSIONS or any(size < 0 for size in sizes):
            raise Malformed(f"tensor {shown(name)} has an impossible shape")
        if math.prod(sizes) > MAX_ELEMENTS:
            raise Malformed(f"tensor {shown(name)} has an impossible shape")
        shape = tuple(
            None if free == -1 else size
            for size, free in zip(sizes, signature or sizes, strict=True)
        )
        if table.number(10, "I"):
            raise Malformed("keeps weights in other files, which edgekit does not read")
        buffer = self._constant(table, name, dtype, math.prod(sizes))
        scales, block = self._scales(table, name, sizes)
        size_bytes = self._sizes[buffer] if buffer is not None else 0
        return TfliteTensor(name, dtype, shape, size_bytes, buffer, scales, block)

    def _constant(self, table: Table, name: str, dtype: str, elements: int) -> int | None:
        """The number of the buffer that holds a tensor's values, if it is a constant."""
        number: int = table.number(2, "I")
        if number >= max(1, len(self._sizes)):
            raise Malformed(f"tensor {shown(name)} has its values in a buffer that is not there")
        size = self._sizes[number] if self._sizes else 0
        if not size:
            return None
        expected = -(-elements * BITS[dtype] // 8)
        if BITS[dtype] and not table.has(6) and size != expected:  # 6: sparse values
            raise Malformed(f"tensor {shown(name)} has {size} bytes, its shape needs {expected}")
        return number

    def _scales(self, table: Table, name: str, sizes: tuple[int, ...]) -> tuple[int, int]:
        """How many scales a tensor has, and how many of its values share one of a block."""
        found = table.table(4)
        if found is None:
            return 0, 0
        scales, zeros = found.extent(2, 4)[1], found.extent(3, 8)[1]
        axis = found.number(6, "i")
        if scales > 1 and not (0 <= axis < len(sizes) and sizes[axis] == scales):
            raise Malformed(f"tensor {shown(name)} has {scales} scales for another shape")
        if zeros not in (0, 1, scales):
            raise Malformed(f"tensor {shown(name)} has {zeros} zero points for {scales} scales")
        block = 0
        if found.number(4, "B") == _BLOCKWISE and (details := found.table(5)) is not None:
            block = details.number(2, "i")
            if block < 1 or not 0 <= details.number(0, "i") < self._siblings:
                raise Malformed(f"tensor {shown(name)} has blocks without scales")
        return scales, block

    def _signature(self, table: Table, graphs: tuple[TfliteGraph, ...]) -> TfliteSignature:
        graph = table.number(4, "I")
        if graph >= len(graphs):
            raise Malformed("has a signature for a graph that it has not")
        count = len(graphs[graph].tensors)
        ends = [self._map(table, field, count) for field in (0, 1)]
        return TfliteSignature(table.text(2), graph, *ends)

    @staticmethod
    def _map(table: Table, field: int, count: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for each in table.tables(field, MAX_TENSORS):
            name, number = each.text(0), each.number(1, "I")
            if number >= count or name in found:
                raise Malformed("has a signature that names a tensor twice, or one that is missing")
            found[name] = number
        return found
