"""Benchmarks run, print their tables, write only where they are told, and name what is missing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = ROOT / "exporters" / "calibration.txt"  # any text shows that it runs


def _benchmark(
    name: str, *arguments: str | Path, shelf: str = "llm"
) -> subprocess.CompletedProcess[str]:
    program = ROOT / "benchmarks" / shelf / f"{name}.py"
    return subprocess.run(
        [sys.executable, "-B", program, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def tools() -> Path:
    """llama.cpp's programs, compiled once per machine."""
    built = subprocess.run([ROOT / "scripts" / "build", "--tools"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return Path(built.stdout.strip())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models made by one benchmark serve the next."""
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("peers", (), {"bytes", "build_commit"}),
        ("runtime", (), {"same_settings", "automatic", "best_rows", "rss_bytes"}),
        ("bench", (), {"speeds", "loop_us"}),
        ("export", (), {"export", "same", "imatrix"}),
        ("presets", ("--text", HELD_OUT), {"rows", "speed"}),
        ("evaluate", ("--text", HELD_OUT), {"rows"}),
    ],
)
def test_a_quick_run_prints_tables_and_keeps_its_figures(
    name: str, options: tuple[Any, ...], keys: set[str], tools: Path, scratch: Path, tmp_path: Path
) -> None:
    before = sorted((ROOT / "benchmarks").rglob("*"))
    figures = tmp_path / "figures.json"
    done = _benchmark(
        name, "--quick", "--tools", tools, "--scratch", scratch, "--json", figures, *options
    )
    assert done.returncode == 0, done.stderr
    assert "load average" in done.stdout and "\n|---|" in done.stdout
    assert json.loads(figures.read_text()).keys() == keys | {"machine"}
    assert sorted((ROOT / "benchmarks").rglob("*")) == before


@pytest.mark.parametrize("name", ["peers", "runtime", "bench", "export", "evaluate"])
def test_missing_peers_are_one_clear_line(name: str, tmp_path: Path) -> None:
    done = _benchmark(name, "--tools", tmp_path, "--scratch", tmp_path / "scratch")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning")]
    assert errors == [
        f"error: {tmp_path} has no program llama-bench",
        "hint: scripts/build --tools compiles it",
    ]


def test_a_missing_held_out_text_is_one_clear_line(tmp_path: Path) -> None:
    done = _benchmark("presets", "--text", tmp_path / "none.txt", "--scratch", tmp_path)
    assert done.returncode == 2
    assert f"error: cannot read {tmp_path / 'none.txt'}: No such file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("vision/calibrators", ("none",)),
        ("vision/start", ("none",)),
        ("vision/settings", ("none",)),
        ("vision/peers", ("efficientnet_lite0", "none", "none", "--scratch", "scratch")),
        ("train/table", ("none",)),
        pytest.param(
            *("train/front_prune", ("a=none", "--data", "none", "--out", "front.png")),
            marks=pytest.mark.slow,  # torch
        ),
    ],
)
def test_a_missing_folder_is_one_clear_line(
    program: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    shelf, _, name = program.partition("/")
    here = [tmp_path / word if word in ("none", "scratch") else word for word in arguments]
    done = _benchmark(name, *here, shelf=shelf)
    assert done.returncode in (2, 4, 5, 10), done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "none" in line


@pytest.mark.parametrize("recipe", ["minimal", "edgekit-tiny", "finetune", "prune", "front-prune"])
def test_settings_of_ones_own_take_the_place_of_a_trainings(recipe: str) -> None:
    script = ROOT / "benchmarks" / "train" / "run"
    done = subprocess.run(
        [script, recipe, "steps=7", "threads=2", "seed=3"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "echo", "OUT": "out"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    trainings = [line.split() for line in done.stdout.splitlines() if " edgekit train " in line]
    assert trainings
    for words in trainings:
        pairs = [word for flag, word in itertools.pairwise(words) if flag == "--set"]
        settings = dict(pair.split("=", 1) for pair in pairs)
        assert len(settings) == len(pairs), words
        assert (settings["steps"], settings["threads"], settings["seed"]) == ("7", "2", "3")
