"""An export that is killed, stopped or out of disk leaves nothing half-made."""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_torch
from full_disk import disks, hog
from small_artifact import build

from edgekit.artifact import Artifact

SMOLLM2 = ("smollm2-135m", "--type", "Q4_0", "--calibration", "none", "--no-receipt")
EDGEKIT = [sys.executable, "-m", "edgekit"]


def start(out: Path, what: Sequence[str] = SMOLLM2, **env: str) -> subprocess.Popen[bytes]:
    """An export in a process group of its own, as a terminal would start it."""
    return subprocess.Popen(
        [*EDGEKIT, "export", *what, "--json", "--out", str(out)],
        env=os.environ | env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def lives(pid: int) -> bool:
    """Whether a process runs: one that ended stays listed until its parent asks for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def kill_at_random_points(folder: Path, kills: int, what: Sequence[str] = SMOLLM2) -> None:
    """Kill exports of ``what`` anywhere between their start and their end; each starts anew."""
    homes = (str(folder.parent / f"home{n}") for n in itertools.count())
    out = folder / "artifact"
    started_s = time.monotonic()
    assert start(out, what, EDGEKIT_HOME=next(homes)).wait(timeout=240) == 0
    whole_s = time.monotonic() - started_s
    first = Artifact.open(out).sha256
    moments = random.Random(7)
    for number in range(kills):
        if number % 2:
            shutil.rmtree(out, ignore_errors=True)
        process = start(out, what, EDGEKIT_HOME=next(homes))
        time.sleep(moments.uniform(0, whole_s))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert set(visible(folder)) <= {"artifact", "artifact.partial"}
        if out.exists():  # the old one, or the new one just committed: whole either way
            Artifact.open(out).verify()
    assert start(out, what).wait(timeout=240) == 0
    assert visible(folder) == ["artifact"]
    assert Artifact.open(out).sha256 == first
    Artifact.open(out).verify()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place for outputs alone."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_kill_9_leaves_no_half_artifact(folder: Path) -> None:
    kill_at_random_points(folder, kills=6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_at_50_points_leaves_no_half_artifact(folder: Path) -> None:
    kill_at_random_points(folder, kills=50)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_at_50_points_of_an_export_from_a_folder(folder: Path, tmp_path: Path) -> None:
    # All stages: floats, importance matrix, quantizer.
    model = tiny.make("llama2", tmp_path / "model")
    kill_at_random_points(folder, 50, (str(model), "--bits", "4", "--chunks", "4", "--no-receipt"))


@pytest.mark.slow
def test_kill_9_during_the_proof_leaves_no_half_artifact(folder: Path, tmp_path: Path) -> None:
    model = tiny.make("llama2", tmp_path / "model")
    kill_at_random_points(folder, 4, (str(model), "--type", "Q8_0"))


@pytest.mark.parametrize(
    ("number", "code", "stage"),
    [
        (signal.SIGINT, 130, b"importance matrix"),
        (signal.SIGTERM, 143, b"importance matrix"),
        (signal.SIGINT, 130, b"float reference"),
        (signal.SIGINT, 130, b"race"),
        # A minute of export, only to come that far.
        pytest.param(signal.SIGTERM, 143, b"compare predictions", marks=pytest.mark.slow),
    ],
    ids=lambda value: value.decode() if isinstance(value, bytes) else str(value),
)
def test_a_stopped_export_leaves_nothing_within_5_s(
    tmp_path: Path, number: signal.Signals, code: int, stage: bytes
) -> None:
    options = [] if stage == b"importance matrix" else ["--calibration", "none"]
    process = subprocess.Popen(
        [*EDGEKIT, "export", "smollm2-135m", *options, "--out", str(tmp_path / "artifact")],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage):
            break
    deadline_s = time.monotonic() + 10
    while not (engine := children_of(process.pid)):
        assert time.monotonic() < deadline_s, "the engine works in a child process"
    stopped_s = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert time.monotonic() - stopped_s < 5
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []
    assert not any(lives(pid) for pid in engine)


LANGUAGE = ("fit to the text", "write the graph", "token ids", "compare predictions", "race")
GRAPHS = ("trace", "quantize", "compare answers", "race")
# What is exported -> the stages of the work and of its receipt that it goes through.
STAGES = {
    "onnx": ("load the model", *GRAPHS[:2], "fuse", *GRAPHS[2:]),
    "onnx-language": LANGUAGE,
    "tflite": ("load the model", *GRAPHS),
}


def model_of(kind: str, folder: Path) -> tuple[str, ...]:
    """Arguments of an export with its receipt: a ViT or a llama, of two blocks each."""
    if kind == "onnx-language":
        what = [str(tiny.make("llama2", folder / "model")), "--bits", "4", "--chunks", "4"]
    else:
        what = [str(tiny_torch.vit_folder(folder / "model"))]
        what += ["--chunks", "8"] if kind == "onnx" else []
    return (*what, "--format", kind.partition("-")[0])


def kinds(*always: str) -> list[Any]:
    """All kinds of graphs, those that run ``always`` and those that are slow. A trace to TFLite
    takes 1.2 GB of packages that not everybody has.
    """
    missing = importlib.util.find_spec("litert_torch") is None
    skip = pytest.mark.skipif(missing, reason="litert-torch is not installed")
    return [
        pytest.param(
            kind,
            marks=[
                *([] if kind in always else [pytest.mark.slow]),
                *([skip] if kind == "tflite" else []),
            ],
        )
        for kind in STAGES
    ]


def at_stage(out: Path, what: Sequence[str], stage: str) -> subprocess.Popen[bytes]:
    """An export that has come so far."""
    process = subprocess.Popen(
        [*EDGEKIT, "export", *what, "--out", str(out)],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith(stage.encode()):
            return process
    raise AssertionError(f"it ended without {stage}: {b''.join(seen)!r}")


def gone(pids: Sequence[int]) -> bool:
    """Whether all of them end within 5 s."""
    deadline_s = time.monotonic() + 5
    while any(map(lives, pids)):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", kinds(*STAGES))
def test_kill_9_at_25_points_of_a_graph_s_export(folder: Path, tmp_path: Path, kind: str) -> None:
    kill_at_random_points(folder, 25, (*model_of(kind, tmp_path), "--no-receipt"))


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds(*STAGES))
def test_kill_9_during_the_proof_of_a_graph_keeps_the_old_artifact(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    what = model_of(kind, tmp_path)
    old = build(folder / "artifact")
    stages = STAGES[kind]
    for stage in stages[stages.index("race") - 1 :]:
        process = at_stage(folder / "artifact", what, stage)
        engine = children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert gone(engine)
        assert set(visible(folder)) <= {"artifact", "artifact.partial"}
        assert Artifact.open(folder / "artifact").sha256 == old.sha256
        old.verify()
    assert start(folder / "artifact", (*what, "--no-receipt")).wait(timeout=240) == 0
    assert visible(folder) == ["artifact"]
    made = Artifact.open(folder / "artifact")
    made.verify()
    assert made.sha256 != old.sha256


def stops() -> Iterator[Any]:
    """Each stage of each kind by Ctrl-C, some by SIGTERM; a few of them always."""
    for kind, mark in zip(STAGES, kinds(*STAGES), strict=True):
        for stage in STAGES[kind]:
            for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
                always = (kind, stage, code) in (
                    ("onnx", "trace", 130),
                    ("onnx-language", "fit to the text", 143),
                )
                marks = [*mark.marks, *([] if always else [pytest.mark.slow])]
                yield pytest.param(
                    *(kind, stage, number, code),
                    marks=marks,
                    id=f"{kind}-{stage}-{number.name}",
                )


@pytest.mark.parametrize(("kind", "stage", "number", "code"), list(stops()))
def test_a_stopped_export_of_a_graph_leaves_nothing_within_5_s(
    folder: Path, tmp_path: Path, kind: str, stage: str, number: signal.Signals, code: int
) -> None:
    process = at_stage(folder / "artifact", model_of(kind, tmp_path), stage)
    engine = children_of(process.pid)
    stopped_s = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert time.monotonic() - stopped_s < 5
    assert process.returncode == code
    assert list(folder.iterdir()) == []
    assert not any(lives(pid) for pid in engine)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    with disks(tmp_path) as mount:
        yield mount


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_at_20_sizes(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    # The output needs 91.9 MB. Half of the sizes are found out before the work; for the others the
    # room is there at first, and taken away by another writer while the export runs.
    for number in range(20):
        steals = number % 2 == 1
        size = (120 << 20) if steals else (8 << 20) + (number << 22)
        disk = small_disk(size)
        old = build(disk / "artifact")
        process = start(disk / "artifact")
        if steals:
            while not (disk / "artifact.partial").exists() and process.poll() is None:
                time.sleep(0.01)
            hog(disk, (32 + 4 * number) << 20)
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 6, stderr
        assert stderr.startswith(b"warning:") and b"error: " in stderr and b"hint: " in stderr
        assert b"Traceback" not in stderr
        assert visible(disk) == (["artifact", "hog"] if steals else ["artifact"])
        assert Artifact.open(disk / "artifact").sha256 == old.sha256
        old.verify()


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds(*STAGES))
def test_a_small_disk_is_one_clear_error_of_a_graph_s_export(
    small_disk: Callable[[int], Path], tmp_path: Path, kind: str
) -> None:
    refused_for_room(small_disk(256 << 10), (*model_of(kind, tmp_path), "--no-receipt"), None)


@pytest.mark.parametrize("kind", kinds("onnx", "onnx-language"))
def test_a_disk_that_fills_up_is_one_clear_error_of_a_graph_s_export(
    small_disk: Callable[[int], Path], tmp_path: Path, kind: str
) -> None:
    # The llama's graph takes more than the ViT's, and its tokenizer lies beside it at once.
    left = (200 if kind == "onnx-language" else 400) << 10
    refused_for_room(small_disk(32 << 20), (*model_of(kind, tmp_path), "--no-receipt"), left)


def refused_for_room(disk: Path, what: Sequence[str], left_bytes: int | None) -> None:
    """The export ends in one error and the old artifact stays, on a disk that is too small, or
    that another writer fills but for ``left_bytes`` once the work has begun.
    """
    old = build(disk / "artifact")
    process = start(disk / "artifact", what)
    if left_bytes is not None:
        while not (disk / "artifact.partial").exists() and process.poll() is None:
            time.sleep(0.01)
        free = os.statvfs(disk)
        hog(disk, free.f_bavail * free.f_frsize - left_bytes)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 6, stderr
    assert b"error: " in stderr and b"hint: " in stderr and b"Traceback" not in stderr
    assert visible(disk) == ["artifact"] + (["hog"] if left_bytes is not None else [])
    assert Artifact.open(disk / "artifact").sha256 == old.sha256
    old.verify()


def test_a_full_disk_keeps_the_old_artifact(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(150 << 20)
    out = disk / "artifact"
    assert start(out).wait(timeout=240) == 0
    before = Artifact.open(out).sha256
    process = start(out)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 6 and b"MB free" in stderr
    assert Artifact.open(out).sha256 == before
    Artifact.open(out).verify()
    assert visible(disk) == ["artifact"]
