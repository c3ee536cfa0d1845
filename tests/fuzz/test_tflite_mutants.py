"""Hostile TFLite files: each is read or refused, soon, in little memory, with an error of ours."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_tflite
from fuzz.bounded import in_pieces, refused

import edgekit
from edgekit import graph_file
from edgekit.errors import EdgekitError
from edgekit.formats import tflite

COUNT = 2000
_LIES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@pytest.fixture(scope="module")
def sound() -> bytes:
    return tiny_tflite.table()


def mutants(raw: bytes, count: int, seed: str) -> Iterator[bytes]:
    """Flips, cuts, doubled and lost stretches, and numbers that lie: the same for the same seed.

    Most of them where the tables are: the middle of the file is weights.
    """
    rng = random.Random(seed)
    ends = [*range(1200), *range(len(raw) - 1200, len(raw))]
    for _ in range(count):
        out = bytearray(raw)
        start = rng.choice(ends)
        end = min(len(out), start + rng.randrange(1, 64))
        match rng.randrange(6):
            case 0 | 1:
                for _ in range(rng.choice((1, 1, 2, 16))):
                    out[rng.choice(ends)] ^= 1 << rng.randrange(8)
            case 2:
                del out[rng.randrange(len(out)) :]
            case 3:
                out[start:end] = rng.choice((b"", out[start:end] * 2, rng.randbytes(end - start)))
            case _:
                at = start & ~3
                out[at : at + 4] = rng.choice(_LIES).to_bytes(4, "little")
        yield bytes(out)


@pytest.mark.parametrize("count", [200, pytest.param(COUNT, marks=pytest.mark.fuzz)])
def test_every_mutant_is_read_or_refused_within_a_second(
    count: int, sound: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "mutant.tflite"
    found = refused(
        mutants(sound, count, "read"),
        path,
        lambda path: graph_file.read(path).cost(),
        memory_bytes=4 << 20,
    )
    assert count // 5 < found < count


@pytest.mark.timeout(1200)
@in_pieces
def test_no_mutant_takes_the_process_with_it(
    count: int, piece: int, sound: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "mutant.tflite"
    feeds = {
        name: np.zeros((1, tiny_tflite.LENGTH), np.int32) for name in tflite_inputs(sound, path)
    }
    ran = 0
    for raw in mutants(sound, count, f"load{piece or ''}"):
        path.write_bytes(raw)
        with contextlib.suppress(EdgekitError), edgekit.load(path, n_threads=1) as session:
            session.run(feeds)
            ran += 1
    path.write_bytes(sound)
    with edgekit.load(path, n_threads=1) as session:
        (found,) = session.run(feeds).values()
    assert found.shape == (1, tiny_tflite.LENGTH, tiny_tflite.WIDTH)
    assert ran < count


def tflite_inputs(raw: bytes, path: Path) -> list[str]:
    path.write_bytes(raw)
    return list(tflite.read(path).inputs)
