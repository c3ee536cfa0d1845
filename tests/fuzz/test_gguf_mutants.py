"""Two thousand hostile GGUF files: each is read or refused, quickly and in little memory."""

from __future__ import annotations

import contextlib
import random
import time
import tracemalloc
from pathlib import Path

import pytest
from fuzz.mutate import mutants
from fuzz.parts import take_apart
from fuzz.seeds import seeds

from edgekit.errors import EdgekitError
from edgekit.formats import gguf

COUNT = 2000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return seeds(tmp_path_factory.mktemp("seeds"))


def test_the_seeds_are_small_and_sound(sound: dict[str, bytes], tmp_path: Path) -> None:
    for name, raw in sound.items():
        assert len(raw) < 20_000
        assert take_apart(raw).build() == raw
        (tmp_path / name).write_bytes(raw)
        assert gguf.read(tmp_path / name).file_size == len(raw)


def test_the_same_random_seed_gives_the_same_mutants(sound: dict[str, bytes]) -> None:
    raw = sound["llama-q4_0"]
    once, again = (list(mutants(raw, 60, random.Random(5))) for _ in range(2))
    assert once == again


@pytest.mark.parametrize("name", ["llama-q4_0", "llama-f16", "vocabulary"])
def test_every_mutant_is_read_or_refused_within_a_second(
    name: str, sound: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "mutant.gguf"
    refused = 0
    for label, raw in mutants(sound[name], COUNT // len(sound) + 1, random.Random(name)):
        path.write_bytes(raw)
        start = time.process_time()
        try:
            gguf.read(path)
        except EdgekitError as error:
            refused += 1
            assert error.message.isprintable(), label
        assert time.process_time() - start < 1, label
    assert refused > COUNT // len(sound) // 2


def test_no_mutant_makes_the_reader_reserve_what_the_file_does_not_hold(
    sound: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "mutant.gguf"
    worst = ("", 0)
    tracemalloc.start()
    try:
        for label, raw in mutants(sound["llama-q4_0"], 300, random.Random(1)):
            path.write_bytes(raw)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(EdgekitError):
                gguf.read(path)
            used = tracemalloc.get_traced_memory()[1] - before - 64 * len(raw)
            worst = max(worst, (label, used), key=lambda each: each[1])
    finally:
        tracemalloc.stop()
    assert worst[1] < 1 << 20, worst
