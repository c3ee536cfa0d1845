"""The recipes distill and nas at toy length: what they leave, compare and refuse."""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from training_data import picture_folder

import edgekit
from edgekit.errors import EdgekitError, RecipeError, TrainError, UnknownNameError
from edgekit.registry import RECIPES
from edgekit.training.recipe import train
from edgekit.training.settings import with_pairs

TOY = ("side=8", "channels=1", "flip=no", "shift=1", "threads=1", "batch=16", "lr=1e-2")
QUICK = ("latency=no", "eval_every=0", "steps=60")
DISTILL = ("widths=8,12", "blocks=1,1", "teacher_steps=100", "held_images=24")
HINTS = ("features=1", "attention=1")
NAS = ("stages=2", "widest=16", "most_blocks=1", "trial_steps=12", "board=rpi5", "held_images=16")


def trained(recipe: str, out: Path, *pairs: str) -> dict[str, Any]:
    return train(recipe, pairs, out, resume=True, say=lambda status: None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("data") / "pictures", each=60)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "taught"
    trained("distill", out, f"data={pictures}", *TOY, *QUICK, *DISTILL, *HINTS, "keep=0.25")
    return out


def test_both_students_are_as_large_and_learn_as_long(taught: Path) -> None:
    body = json.loads((taught / "training.json").read_text())
    rows = {row["name"]: row["figures"] for row in body["results"]}
    assert list(rows) == ["distilled", "alone", "teacher"]
    assert rows["distilled"]["parameters"] == rows["alone"]["parameters"]
    assert rows["alone"]["parameters"] < 0.3 * rows["teacher"]["parameters"]
    steps = {phase["name"]: phase["steps"] for phase in body["phases"]}
    assert steps["distilled"] == steps["alone"] == 60 and steps["teacher"] == 100
    remarks = " ".join(body["remarks"])
    assert "gave back" in remarks or "there is no gap" in remarks
    assert "paired bootstrap" in remarks


def test_a_teacher_may_come_from_a_folder(taught: Path, pictures: Path, tmp_path: Path) -> None:
    settings = [f"data={pictures}", *TOY, "latency=no", "eval_every=0", "steps=5", *DISTILL]
    out = tmp_path / "again"
    body = trained("distill", out, *settings, f"teacher={taught / 'teacher'}", "student=narrow")
    assert [phase["name"] for phase in body["phases"]] == ["distilled", "alone"]
    before = json.loads((taught / "training.json").read_text())["results"]
    assert body["results"][2]["figures"]["accuracy"] == before[2]["figures"]["accuracy"]
    assert edgekit.source(out / "teacher").family == "residual"


def test_a_teacher_of_other_images_is_refused(taught: Path, tmp_path: Path) -> None:
    other = picture_folder(tmp_path / "pictures", side=16)
    pairs = [f"data={other}", *TOY, *QUICK, *DISTILL, f"teacher={taught / 'teacher'}"]
    pairs[1] = "side=16"
    with pytest.raises(RecipeError, match="other images"):
        trained("distill", tmp_path / "out", *pairs)
    with pytest.raises(EdgekitError):
        trained("distill", tmp_path / "none", *pairs[:-1], f"teacher={tmp_path}")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "searched"
    pairs = (f"data={pictures}", *TOY, *QUICK, *NAS, "hours=0.0017", "workers=1", "slowest=1.5")
    trained("nas", out, *pairs)
    return out


def test_a_search_ends_with_its_clock_and_leaves_study_table_and_picture(searched: Path) -> None:
    names = {path.name for path in searched.iterdir()}
    assert {"study.db", "trials.csv", "front.png", "model.safetensors"} <= names
    body = json.loads((searched / "training.json").read_text())
    assert [row["name"] for row in body["results"]] == ["found", "by-hand"]
    with (searched / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    ends = [row["end"] for row in rows]
    assert ends.count("complete") >= 1 and len(rows) >= 2
    complete = [row for row in rows if row["end"] == "complete"]
    assert all(row["rungs"] == "3" and float(row["latency_ms"]) > 0 for row in complete)
    told = body["remarks"][0]
    assert f"{len(rows)} trials" in told and "0.00 hours" in told


def test_proposals_too_slow_to_be_chosen_are_not_trained(searched: Path) -> None:
    body = json.loads((searched / "training.json").read_text())
    by_hand = body["results"][1]["figures"]["convolutions_ms"]
    with (searched / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    slow = [float(row["latency_ms"]) > 1.5 * by_hand for row in rows]
    ends = [row["end"] == "pruned" and row["rungs"] == "0" for row in rows]
    assert slow == ends
    assert f"{sum(slow)} too slow to be worth training" in body["remarks"][0]


def test_what_was_found_can_be_exported(searched: Path, tmp_path: Path) -> None:
    artifact = edgekit.export(searched, "onnx", type="F32", out=tmp_path / "found", receipt=False)
    assert artifact.manifest.source["kind"] == "run"


@pytest.mark.slow
def test_a_search_in_which_nothing_ends_says_so(pictures: Path, tmp_path: Path) -> None:
    pairs = [f"data={pictures}", *TOY, *QUICK, *NAS, "hours=1e-7"]
    with pytest.raises(TrainError, match="not one trial"):
        trained("nas", tmp_path / "out", *pairs)
    pairs = [f"data={pictures}", *TOY, *QUICK, *NAS, "hours=0.0005", "slowest=1e-6"]
    with pytest.raises(TrainError, match="not one trial") as caught:
        trained("nas", tmp_path / "other", *pairs)
    assert "slowest" in str(caught.value.hint)


def test_a_board_that_nobody_knows_is_refused(pictures: Path, tmp_path: Path) -> None:
    pairs = [f"data={pictures}", *TOY, *QUICK, *NAS, "hours=1"]
    with pytest.raises(UnknownNameError, match="rpi6"):
        trained("nas", tmp_path / "other", *[p for p in pairs if "board" not in p], "board=rpi6")


@pytest.mark.slow
def test_a_search_that_is_killed_keeps_its_trials_and_leaves_no_workers(
    pictures: Path, tmp_path: Path
) -> None:
    pairs = (f"data={pictures}", *TOY, *QUICK, *NAS, "hours=0.02", "workers=2")
    out = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path; from edgekit.training.recipe import train;"
        "train('nas', sys.argv[2:], Path(sys.argv[1]), resume=True, say=lambda status: None)"
    )
    command = [sys.executable, "-c", code, str(out), *pairs]
    study = tmp_path / "run.training" / "study.db"
    seen = 0
    for more in (1, 2, 3):  # trials that end before the kill, which comes in the middle of others
        seen = _killed_at(command, study, seen + more)
    body = trained("nas", out, *pairs)
    assert seen and int(body["remarks"][0].split()[0]) >= seen
    assert not out.with_name("run.training").exists()


def _killed_at(command: list[str], study: Path, trials: int) -> int:
    """Kill the search when so many trials have ended, however busy the machine is; how many had."""
    process = subprocess.Popen(command)
    until_s = time.monotonic() + 120
    while not study.exists() or _trials(study) < trials:
        assert time.monotonic() < until_s and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until_s = time.monotonic() + 60
    while _workers(process.pid):
        assert time.monotonic() < until_s, "workers outlive their search"
        time.sleep(0.1)
    return _trials(study)


def _trials(study: Path) -> int:
    """How many have ended; 0 while the file is being made."""
    with closing(sqlite3.connect(study)) as file, suppress(sqlite3.OperationalError):
        query = "select count(*) from trials where state in ('COMPLETE', 'PRUNED')"
        return int(file.execute(query).fetchone()[0])
    return 0


def _workers(parent: int) -> list[int]:
    """Processes of a search's workers that lost their parent."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes()
            status = (entry / "status").read_text()
        except OSError:
            continue
        if b"search_worker" in words and entry.name.isdigit():
            above = int(status.partition("PPid:")[2].split()[0])
            if above in (1, parent) and entry.name != str(os.getpid()):
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("recipe", "pair"),
    [
        ("distill", "keep=1"),
        ("distill", "answers=2"),
        ("distill", "temperature=0"),
        ("distill", "held_images=-1"),
        ("nas", "hours=0"),
        ("nas", "widest=20"),
        ("nas", "rungs=0"),
        ("nas", "slowest=0"),
        ("distill", "student_images=-1"),
        ("nas", "keep=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(recipe: str, pair: str) -> None:
    with pytest.raises(RecipeError):
        with_pairs(RECIPES.load(recipe).settings, [pair])
