"""Hostile ONNX and TFLite files through inspect and export: nothing crashes, hangs or leaks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from fuzz import graphs

from edgekit.cli.inspect import command
from edgekit.errors import EdgekitError

EXPORT = Path(__file__).with_name("export_each.py")
HANG_S = 30
# What becomes of a graph: copied, halved, dynamic, weights alone in 8 and in 4 bits, static.
TYPES = (
    "F32",
    "F16",
    "dynamic_wi8_afp32",
    "weight_only_wi8_afp32",
    "weight_only_wi4b32",
    "static_wi8_ai8",
)
Mutants = Callable[[bytes, int, str], Iterator[bytes]]
KINDS: dict[str, tuple[dict[str, bytes], Mutants]] = {
    "onnx": (graphs.onnx_seeds(), graphs.onnx_mutants),
    "tflite": (graphs.tflite_seeds(), graphs.tflite_mutants),
}


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("count", [48, pytest.param(2000, marks=pytest.mark.fuzz)])
def test_every_mutant_is_shown_or_refused(format: str, count: int, tmp_path: Path) -> None:
    seeds, mutants = KINDS[format]
    graphs.beside(tmp_path)
    path = tmp_path / f"mutant.{format}"
    ends = {"shown": 0, "refused": 0}
    for name, raw in seeds.items():
        for mutant in mutants(raw, count // len(seeds), f"inspect {name}"):
            path.write_bytes(mutant)
            for flags in ([], ["--tensors"], ["--json"]):
                started_s = time.process_time()
                error = CliRunner().invoke(command, [str(path), *flags]).exception
                assert time.process_time() - started_s < 2
                if error is not None and not isinstance(error, EdgekitError):
                    raise error
                ends["shown" if error is None else "refused"] += 1
    assert min(ends.values()) > 0, ends


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("dynamic_wi8_afp32", 8),
        *(pytest.param(kind, 2000 // len(TYPES), marks=pytest.mark.fuzz) for kind in TYPES),
    ],
)
def test_every_mutant_is_exported_or_refused(kind: str, count: int, tmp_path: Path) -> None:
    folder = tmp_path / "mutants"
    folder.mkdir()
    graphs.beside(folder)
    seeds, mutants = KINDS["onnx"]
    for name, raw in seeds.items():
        # Half of them broken as files, half as graphs: those come further.
        half = count // len(seeds) // 2
        broken = (make(raw, half, f"export {name}") for make in (mutants, graphs.rewired))
        for number, mutant in enumerate(itertools.chain(*broken)):
            (folder / f"{name}-{number:04}.onnx").write_bytes(mutant)
    (folder / "sound.onnx").write_bytes(seeds["float"])
    done = subprocess.run(
        [sys.executable, str(EXPORT), str(folder), kind], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ends) == len(list(folder.glob("*.onnx")))
    for end in ends:
        assert end["signal"] == 0, end
        assert "leak" not in end, f"{end['name']}: {end['leak']}"
        assert end["seconds"] < HANG_S, end
        assert end["said"] == "", "stdout is for --json"
        assert end.get("message", "").isprintable(), end
    made = {path.name for path in folder.iterdir() if path.suffix != ".onnx"} - {graphs.WEIGHTS}
    exported = {Path(end["name"]).with_suffix(".out").name for end in ends if "error" not in end}
    assert made == exported, "nothing half-made is left"
    assert "sound.out" in made and len(made) < len(ends)
