"""Hostile TFLite files: each is read or refused, soon, in little memory, with an error of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tflite
from fuzz import graphs
from fuzz.bounded import in_pieces, refused

import edgekit
from edgekit import graph_file
from edgekit.errors import EdgekitError

COUNT = 2000
SEEDS = graphs.tflite_seeds()


def mutants(count: int, label: str) -> Iterator[tuple[str, bytes]]:
    """As many of each seed, with its name."""
    for name, raw in SEEDS.items():
        for mutant in graphs.tflite_mutants(raw, -(-count // len(SEEDS)), f"{label} {name}"):
            yield name, mutant


def feeds(path: Path) -> dict[str, dict[str, Any]]:
    """What each seed takes: nothing but zeros."""
    found = {}
    for name, raw in SEEDS.items():
        path.write_bytes(raw)
        with edgekit.load(path, n_threads=1) as session:
            found[name] = {
                spec.name: np.zeros(
                    [n if isinstance(n, int) else 1 for n in spec.shape], spec.dtype
                )
                for spec in session.inputs
            }
            assert all(np.isfinite(each).all() for each in session.run(found[name]).values())
    return found


@pytest.mark.parametrize("count", [200, pytest.param(COUNT, marks=pytest.mark.fuzz)])
def test_every_mutant_is_read_or_refused_within_a_second(count: int, tmp_path: Path) -> None:
    path = tmp_path / "mutant.tflite"
    found = refused(
        (raw for _, raw in mutants(count, "read")),
        path,
        lambda path: graph_file.read(path).cost(),
        memory_bytes=4 << 20,
    )
    assert count // 5 < found < count


@pytest.mark.timeout(1200)
@in_pieces
def test_no_mutant_takes_the_process_with_it(count: int, piece: int, tmp_path: Path) -> None:
    path = tmp_path / "mutant.tflite"
    sound = feeds(path)
    ran = 0
    for name, raw in mutants(count, f"load{piece or ''}"):
        path.write_bytes(raw)
        with contextlib.suppress(EdgekitError), edgekit.load(path, n_threads=1) as session:
            session.run(sound[name])
            ran += 1
    path.write_bytes(SEEDS["float"])
    with edgekit.load(path, n_threads=1) as session:
        (found,) = session.run(sound["float"]).values()
    assert found.shape == (1, tiny_tflite.LENGTH, tiny_tflite.WIDTH)
    assert ran < count
