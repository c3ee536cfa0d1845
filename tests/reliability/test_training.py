"""Training that is killed, spread over processes, or fed with broken data."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_data import digit_folder, picture_folder

ROOT = Path(__file__).resolve().parents[2]
FORKS = ROOT / "tests" / "training_forks.py"


def forks(*arguments: str | Path | int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, FORKS, *map(str, arguments)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def curve(path: Path) -> list[list[str]]:
    """All columns but the seconds, digit by digit."""
    with path.open() as file:
        return [row[:4] for row in csv.reader(file)]


def killed_at_random_points(folder: Path, kills: int, recipe: str, *pairs: str) -> None:
    found = forks("kill", folder, kills, 11, recipe, *pairs)
    whole, cut = folder / "whole", folder / "cut"
    assert found["ends"].count(-9) == kills
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in cut.iterdir()) == names
    for name in names:
        if name.endswith(".safetensors"):
            assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
        if name.endswith(".csv"):
            assert curve(whole / name) == curve(cut / name), name
    results = [json.loads((run / "training.json").read_text())["results"] for run in (whole, cut)]
    for row in (*results[0], *results[1]):
        row["figures"].pop("mfu", None)  # a speed
    assert results[0] == results[1]
    left = {path.name for path in folder.iterdir()}
    assert not any(name.endswith((".training", ".partial")) for name in left)


def toy_minimal(folder: Path) -> list[str]:
    pictures = picture_folder(folder / "pictures", each=40)
    toy = ("side=8", "channels=1", "widths=10,20", "blocks=1,1", "flip=no", "shift=0")
    more = ("steps=60", "batch=16", "eval_every=20", "checkpoint_every=7", "threads=1")
    return [f"data={pictures}", *toy, *more, "latency=no"]


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    killed_at_random_points(tmp_path, 2, "minimal", *toy_minimal(tmp_path))


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    pairs = [pair for pair in toy_minimal(tmp_path) if not pair.startswith("steps")]
    killed_at_random_points(tmp_path, 20, "minimal", *pairs, "steps=600")


@pytest.mark.slow
def test_three_kills_in_any_phase_of_tinyllama_change_nothing(tmp_path: Path) -> None:
    text = "\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    (tmp_path / "docs.txt").write_text(text)
    lines = [json.dumps({"prompt": f"What is {n}?", "answer": f"{n} is {n}."}) for n in range(80)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    data = (f"text={tmp_path / 'docs.txt'}", f"pairs={tmp_path / 'pairs.jsonl'}", "size=toy")
    more = ("length=64", "n_ctx=64", "steps=80", "tune_steps=40", "held_tokens=2000")
    last = ("checkpoint_every=9", "latency=no", "precision=fp32", "threads=1", "eval_every=40")
    killed_at_random_points(tmp_path, 3, "tinyllama", *data, *more, *last)


@pytest.mark.slow
def test_three_kills_in_any_phase_of_vit_qat_change_nothing(tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path / "pictures", each=40)
    size = ("side=8", "channels=1", "patch=2", "width=32", "depth=1", "heads=2", "hidden=64")
    more = ("steps=60", "tune_steps=60", "batch=16", "calibration=32", "checkpoint_every=7")
    last = ("eval_every=20", "formats=w4a4,w3a3", "threads=1", "latency=no")
    killed_at_random_points(tmp_path, 3, "vit-qat", f"data={pictures}", *size, *more, *last)


OTHERS = {
    "video": ("frames=4", "side=16", "widths=8,16", "part=4", "clips=300", "test_clips=100"),
    "dual-encoder": (
        *("side=16", "width=32", "depth=1", "text_depth=1", "heads=2", "space=16"),
        *("scenes=500", "test_scenes=100"),
    ),
    "diffusion": (
        *("side=12", "widths=16,16", "blocks=1", "generate=3", "judged=100", "judge_steps=40"),
        "ema=0.9",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OTHERS)
def test_three_kills_change_nothing_of_the_others(tmp_path: Path, recipe: str) -> None:
    digits = digit_folder(tmp_path / "digits")
    more = ("steps=60", "batch=16", "checkpoint_every=7", "eval_every=20", "threads=1")
    pairs = (f"data={digits}", *OTHERS[recipe], *more, "latency=no")
    killed_at_random_points(tmp_path, 3, recipe, *pairs)


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    found = forks("spread", tmp_path)
    one = found.pop("one")
    for name, other in found.items():
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4), name
        assert other["state"] == pytest.approx(one["state"], rel=1e-3, abs=1e-4), name
    # A sharded run that was killed goes on as the one that was not.
    assert found["stopped"]["losses"] == found["shards"]["losses"]
