"""Hostile ONNX files: each is read or refused, quickly, in little memory, with an error of ours."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzz import graphs
from fuzz.bounded import in_pieces, refused

import edgekit
from edgekit import onnx_cost
from edgekit.errors import EdgekitError
from edgekit.formats import onnx

COUNT = 2000


SEEDS = graphs.onnx_seeds()


def mutants(count: int, label: str) -> Iterator[bytes]:
    """As many of each seed."""
    for name, raw in SEEDS.items():
        yield from graphs.onnx_mutants(raw, count // len(SEEDS), f"{label} {name}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a mutant goes; the weights of those that keep them elsewhere lie beside it."""
    graphs.beside(tmp_path)
    return tmp_path / "mutant.onnx"


@pytest.mark.parametrize("name", SEEDS)
def test_each_seed_is_sound(name: str, path: Path) -> None:
    path.write_bytes(SEEDS[name])
    with edgekit.load(path, n_threads=1) as session:
        assert session.run({"x": np.zeros((1, 1, 8, 8), np.float32)})["y"].shape == (32, 8)


@pytest.mark.parametrize("count", [300, pytest.param(COUNT, marks=pytest.mark.fuzz)])
def test_every_mutant_is_read_or_refused_within_a_second(count: int, path: Path) -> None:
    found = refused(mutants(count, "read"), path, onnx.read, memory_bytes=1 << 20)
    assert found > count // 4


@pytest.mark.parametrize("count", [300, pytest.param(COUNT, marks=pytest.mark.fuzz)])
def test_every_mutant_is_counted_or_refused_within_a_second(count: int, path: Path) -> None:
    counted = 0
    for raw in mutants(count, "cost"):
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
def test_no_mutant_takes_the_process_with_it(count: int, piece: int, path: Path) -> None:
    ran = 0
    for raw in mutants(count, f"load{piece or ''}"):
        path.write_bytes(raw)
        with contextlib.suppress(EdgekitError), edgekit.load(path, n_threads=1) as session:
            session.run({"x": np.zeros((1, 1, 8, 8), np.float32)})
            ran += 1
    path.write_bytes(SEEDS["float"])
    with edgekit.load(path, n_threads=1) as session:
        assert session.run({"x": np.zeros((1, 1, 8, 8), np.float32)})["y"].shape == (32, 8)
    assert ran < count
