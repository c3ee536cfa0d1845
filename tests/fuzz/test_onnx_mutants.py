"""Hostile ONNX files: each is read or refused, quickly, in little memory, with an error of ours."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzz.bounded import in_pieces, refused
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit import onnx_cost
from edgekit.errors import EdgekitError
from edgekit.formats import onnx

COUNT = 2000


@pytest.fixture(scope="module")
def sound() -> bytes:
    """A small network: weights, attributes, a subgraph, names of free axes."""
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), "w")
    kernel = numpy_helper.from_array(rng.standard_normal((4, 1, 3, 3)).astype(np.float32), "k")
    shape = numpy_helper.from_array(np.array([-1, 8], np.int64), "s")
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Reshape", ["r", "s"], ["flat"], name="reshape"),
        helper.make_node("MatMul", ["flat", "w"], ["y"], name="product"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8])],
        [weights, kernel, shape],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def mutants(raw: bytes, count: int, seed: str) -> Iterator[bytes]:
    """Flips, cuts, doubled and lost stretches, and lengths that lie: the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        out = bytearray(raw)
        start = rng.randrange(len(out))
        end = min(len(out), start + rng.randrange(1, 64))
        match rng.randrange(5):
            case 0:
                for _ in range(rng.choice((1, 1, 2, 16))):
                    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            case 1:
                del out[start:]
            case 2:
                out[start:end] = out[start:end] * 2
            case 3:
                del out[start:end]
            case _:
                out[start : start + 1] = rng.choice((b"\xff" * 9 + b"\x01", b"\xff\xff\x7f", b"\0"))
        yield bytes(out)


@pytest.mark.parametrize("count", [300, pytest.param(COUNT, marks=pytest.mark.fuzz)])
def test_every_mutant_is_read_or_refused_within_a_second(
    count: int, sound: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "mutant.onnx"
    found = refused(mutants(sound, count, "read"), path, onnx.read, memory_bytes=1 << 20)
    assert found > count // 4


@pytest.mark.parametrize("count", [300, pytest.param(COUNT, marks=pytest.mark.fuzz)])
def test_every_mutant_is_counted_or_refused_within_a_second(
    count: int, sound: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "mutant.onnx"
    counted = 0
    for raw in mutants(sound, count, "cost"):
        path.write_bytes(raw)
        started = time.process_time()
        try:
            onnx_cost.cost(onnx.read(path))
            counted += 1
        except EdgekitError as error:
            assert error.message.isprintable()
        assert time.process_time() - started < 1
    assert count // 20 < counted < count


@pytest.mark.timeout(1200)
@in_pieces
def test_no_mutant_takes_the_process_with_it(
    count: int, piece: int, sound: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "mutant.onnx"
    ran = 0
    for raw in mutants(sound, count, f"load{piece or ''}"):
        path.write_bytes(raw)
        with contextlib.suppress(EdgekitError), edgekit.load(path, n_threads=1) as session:
            session.run({"x": np.zeros((1, 1, 8, 8), np.float32)})
            ran += 1
    path.write_bytes(sound)
    with edgekit.load(path, n_threads=1) as session:
        assert session.run({"x": np.zeros((1, 1, 8, 8), np.float32)})["y"].shape == (32, 8)
    assert ran < count
