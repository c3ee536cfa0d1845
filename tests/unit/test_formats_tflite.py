"""The reader of TFLite files against files made from the schema's own Python classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_tflite

from edgekit import graph_file, tflite_cost
from edgekit.errors import CorruptArtifactError, SourceError, VersionError
from edgekit.formats import tflite

Change = Callable[[tiny_tflite.Builder], None]


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _sound() -> tiny_tflite.Builder:
    """A product of 8 by 4 weights of 8 bits with a scale each channel, and a custom operator."""
    build = tiny_tflite.Builder()
    given, out, last = (build.tensor(n, (1, w)) for n, w in (("x", 4), ("y", 8), ("z", 8)))
    weights = build.constant("w", np.arange(32, dtype=np.int8).reshape(8, 4))
    scales = tiny_tflite.schema.QuantizationParametersT()
    scales.scale, scales.zeroPoint, scales.quantizedDimension = [0.5] * 8, [0] * 8, 0
    build.graph.tensors[weights].quantization = scales
    build.operator("FULLY_CONNECTED", [given, weights, -1], [out], "FullyConnectedOptions")
    build.operator("CUSTOM", [out], [last])
    build.model.operatorCodes[-1].customCode = "Mine"
    build.ends({"first": given}, {"answer": last})
    return build


def test_a_header_says_what_was_built(tmp_path: Path) -> None:
    header = tflite.read(_write(tmp_path / "m.tflite", _sound().build()))
    assert header.description == "made by hand"
    assert [operator.kind for operator in header.main.operators] == [
        "FULLY_CONNECTED",
        "custom Mine",
    ]
    assert header.main.operators[0].inputs == (0, 3, -1)
    assert (header.inputs, header.outputs) == ({"first": 0}, {"answer": 2})
    (weights,) = header.constants
    assert (weights.name, weights.dtype, weights.shape) == ("w", "int8", (8, 4))
    assert (weights.scales, weights.size_bytes, header.parameters) == (8, 32, 32)
    assert header.main.tensors[0].buffer is None


def test_an_open_size_has_no_number(tmp_path: Path) -> None:
    build = _sound()
    build.graph.tensors[0].shapeSignature = [-1, 4]
    header = tflite.read(_write(tmp_path / "m.tflite", build.build()))
    assert header.main.tensors[0].shape == (None, 4)
    assert header.main.tensors[0].elements == 4


def test_without_a_signature_tensors_keep_their_own_names(tmp_path: Path) -> None:
    build = _sound()
    build.model.signatureDefs = []
    header = tflite.read(_write(tmp_path / "m.tflite", build.build()))
    assert (header.inputs, header.outputs) == ({"x": 0}, {"z": 2})


def test_the_cost_of_a_run_is_counted(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.tflite", tiny_tflite.dense())
    found = graph_file.read(path)
    assert found.cost().flops == 2 * 10 * tiny_tflite.PIXELS
    assert (found.least_bits, found.stands, found.format) == (32, "F32", "tflite")
    assert graph_file.read(_write(tmp_path / "q.tflite", _sound().build())).stands == "int8"


def test_a_cost_without_weights_to_multiply_is_one_clear_error(tmp_path: Path) -> None:
    build = _sound()
    build.graph.operators[0].inputs = [0]
    header = tflite.read(_write(tmp_path / "m.tflite", build.build()))
    with pytest.raises(SourceError, match="FULLY_CONNECTED"):
        tflite_cost.cost(header)


def _version(build: tiny_tflite.Builder) -> None:
    build.model.version = 2


def test_another_version_is_named(tmp_path: Path) -> None:
    build = _sound()
    _version(build)
    with pytest.raises(VersionError, match="version 2"):
        tflite.read(_write(tmp_path / "m.tflite", build.build()))


def _no_graph(build: tiny_tflite.Builder) -> None:
    build.model.subgraphs, build.model.signatureDefs = [], []


def _lost_tensor(build: tiny_tflite.Builder) -> None:
    build.graph.operators[0].outputs = [9]


def _negative_output(build: tiny_tflite.Builder) -> None:
    build.graph.operators[0].outputs = [-1]


def _lost_input(build: tiny_tflite.Builder) -> None:
    build.graph.inputs = [4]


def _lost_kind(build: tiny_tflite.Builder) -> None:
    build.graph.operators[0].opcodeIndex = 2


def _lost_buffer(build: tiny_tflite.Builder) -> None:
    build.graph.tensors[3].buffer = 2


def _short_weights(build: tiny_tflite.Builder) -> None:
    build.model.buffers[1].data = build.model.buffers[1].data[:-1]


def _overflow(build: tiny_tflite.Builder) -> None:
    build.graph.tensors[0].shape = [1 << 30] * 4


def _negative(build: tiny_tflite.Builder) -> None:
    build.graph.tensors[0].shape = [-1, 4]


def _many_axes(build: tiny_tflite.Builder) -> None:
    build.graph.tensors[0].shape = [1] * 17


def _two_shapes(build: tiny_tflite.Builder) -> None:
    build.graph.tensors[0].shapeSignature = [-1]


def _unknown_type(build: tiny_tflite.Builder) -> None:
    build.graph.tensors[0].type = 99


def _other_scales(build: tiny_tflite.Builder) -> None:
    build.graph.tensors[3].quantization.scale = [0.5] * 7


def _beyond(build: tiny_tflite.Builder) -> None:
    build.model.buffers[1].data = None
    build.model.buffers[1].offset, build.model.buffers[1].size = 1 << 62, 32


def _signature_of_nothing(build: tiny_tflite.Builder) -> None:
    build.model.signatureDefs[0].subgraphIndex = 1


def _twice_named(build: tiny_tflite.Builder) -> None:
    build.model.signatureDefs[0].inputs *= 2


def _outside(build: tiny_tflite.Builder) -> None:
    build.graph.tensors[3].externalBuffer = 1


def _lost_metadata(build: tiny_tflite.Builder) -> None:
    entry = tiny_tflite.schema.MetadataT()
    entry.name, entry.buffer = "m", 7
    build.model.metadata = [entry]


@pytest.mark.parametrize(
    "change",
    [
        _no_graph,
        _lost_tensor,
        _negative_output,
        _lost_input,
        _lost_kind,
        _lost_buffer,
        _short_weights,
        _overflow,
        _negative,
        _many_axes,
        _two_shapes,
        _unknown_type,
        _other_scales,
        _beyond,
        _signature_of_nothing,
        _twice_named,
        _outside,
        _lost_metadata,
    ],
)
def test_what_contradicts_itself_is_refused(change: Change, tmp_path: Path) -> None:
    build = _sound()
    change(build)
    with pytest.raises(CorruptArtifactError) as error:
        tflite.read(_write(tmp_path / "m.tflite", build.build()))
    assert error.value.hint and error.value.message.isprintable()


@pytest.mark.parametrize("data", [b"", b"TFL3", b"\0" * 8, b"\x08\0\0\0TFL3", b"\xff" * 64])
def test_what_is_no_flatbuffer_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError):
        tflite.read(_write(tmp_path / "m.tflite", data))


def test_the_same_table_again_and_again_ends_soon(tmp_path: Path) -> None:
    """A small file whose lists lead to the same graph a hundred thousand times."""
    raw = bytearray(tiny_tflite.dense())
    root = int.from_bytes(raw[:4], "little")
    places = root - int.from_bytes(raw[root : root + 4], "little", signed=True)
    field = root + int.from_bytes(raw[places + 4 + 4 : places + 4 + 6], "little")  # subgraphs
    vector = field + int.from_bytes(raw[field : field + 4], "little")
    graph = vector + 4 + int.from_bytes(raw[vector + 4 : vector + 8], "little")
    places = graph - int.from_bytes(raw[graph : graph + 4], "little", signed=True)
    field = graph + int.from_bytes(raw[places + 4 : places + 6], "little")  # its tensors
    first = field + int.from_bytes(raw[field : field + 4], "little") + 4
    tensor = first + int.from_bytes(raw[first : first + 4], "little")
    # A list of 100,000 entries at the end of the file cannot lead back: offsets are positive. So
    # the tensor is copied behind it, with its own table of fields.
    raw += bytes(-len(raw) % 4)
    raw[field : field + 4] = (len(raw) - field).to_bytes(4, "little")
    count = 100_000
    start = len(raw) + 4
    target = start + 4 * count
    own = tensor - int.from_bytes(raw[tensor : tensor + 4], "little", signed=True)
    raw += count.to_bytes(4, "little")
    raw += b"".join((target - (start + 4 * i)).to_bytes(4, "little") for i in range(count))
    raw += (target - own).to_bytes(4, "little", signed=True) + bytes(64)
    with pytest.raises(CorruptArtifactError):
        tflite.read(_write(tmp_path / "m.tflite", bytes(raw)))
