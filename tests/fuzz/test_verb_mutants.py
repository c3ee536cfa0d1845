"""Hostile GGUF files through inspect, export and load: this process lives, and says what is wrong.

A small sample always runs; ``-m fuzz`` runs two thousand.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuzz.mutate import mutants
from fuzz.seeds import seeds

import edgekit
from edgekit.cli.inspect import command
from edgekit.errors import DeadlineError, EdgekitError

NAMES = ("llama-q4_0", "llama-f16", "vocabulary")
# Two children may start, each for seconds where the other core is busy; a hang takes longer.
HANG_S = 30
Verb = Callable[[Path], object]


def _inspect(path: Path) -> object:
    for flags in ([], ["--tensors"], ["--json"]):
        result = CliRunner().invoke(command, [str(path), *flags])
        if result.exception:
            raise result.exception
    return result


def _load(path: Path) -> object:
    with edgekit.load(path, n_ctx=32, n_gpu_layers=0) as model:
        return model.complete("the käse 世界", max_tokens=2)


def _export(path: Path) -> object:
    return edgekit.export(
        path,
        format="gguf",
        type="Q8_0",
        calibration="none",
        receipt=False,
        out=path.parent / "out",
    )


def _survives(verb: Verb, count: int, folder: Path) -> dict[str, int]:
    """How many of ``count`` mutants the verb took and how many it refused."""
    ends = {"taken": 0, "refused": 0}
    path = folder / "mutant.gguf"
    sound = seeds(folder)
    for name in NAMES:
        for label, raw in mutants(sound[name], count // len(NAMES), random.Random(f"verb {name}")):
            path.write_bytes(raw)
            start, started_s = time.process_time(), time.monotonic()
            try:
                verb(path)
                ends["taken"] += 1
            except DeadlineError as error:
                raise AssertionError(f"{name} {label} hung in a child") from error
            except EdgekitError as error:
                ends["refused"] += 1
                assert error.message.isprintable(), label
            except Exception as error:
                raise AssertionError(f"{name} {label} ended in {error!r}") from error
            assert time.process_time() - start < 2, label
            assert time.monotonic() - started_s < HANG_S, label
    return ends


@pytest.mark.parametrize(
    ("verb", "count"),
    [
        (_inspect, 240),
        (_load, 30),
        (_export, 30),
        pytest.param(_inspect, 2000, marks=[pytest.mark.fuzz, pytest.mark.timeout(3600)]),
        pytest.param(_load, 2000, marks=[pytest.mark.fuzz, pytest.mark.timeout(3600)]),
        pytest.param(_export, 2000, marks=[pytest.mark.fuzz, pytest.mark.timeout(3600)]),
    ],
)
def test_every_mutant_is_taken_or_refused(verb: Verb, count: int, tmp_path: Path) -> None:
    ends = _survives(verb, count, tmp_path)
    assert min(ends.values()) > 0, ends
