"""An export that is killed, stopped or out of disk leaves nothing half-made."""

from __future__ import annotations

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

import pytest
import tiny
import tiny_torch
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


def onnx_export(folder: Path) -> tuple[str, ...]:
    """A ViT of two blocks to ONNX, without its receipt."""
    model = tiny_torch.vit_folder(folder / "model")
    return (str(model), "--format", "onnx", "--chunks", "8", "--no-receipt")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_at_25_points_of_an_onnx_export(folder: Path, tmp_path: Path) -> None:
    kill_at_random_points(folder, 25, onnx_export(tmp_path))


@pytest.mark.parametrize(
    "stage",
    [
        "trace",
        pytest.param("quantize", marks=pytest.mark.slow),
        pytest.param("fuse", marks=pytest.mark.slow),
        pytest.param("compare answers", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_onnx_export_leaves_nothing_within_5_s(
    folder: Path, tmp_path: Path, stage: str
) -> None:
    what = [word for word in onnx_export(tmp_path) if word != "--no-receipt"]
    process = subprocess.Popen(
        [*EDGEKIT, "export", *what, "--out", str(folder / "artifact")],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage.encode()):
            break
    stopped_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert time.monotonic() - stopped_s < 5
    assert process.returncode == 130
    assert list(folder.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a tmpfs of so many bytes."""
    mounted: list[Path] = []

    def mount(size_bytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)],
            capture_output=True,
        )
        if done.returncode:
            pytest.skip("mounting a tmpfs needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


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


@pytest.mark.parametrize(
    "steals", [pytest.param(False, marks=pytest.mark.slow), True], ids=["small", "stolen"]
)
def test_a_full_disk_is_one_clear_error_of_an_onnx_export(
    small_disk: Callable[[int], Path], tmp_path: Path, steals: bool
) -> None:
    size = (8 << 20) if steals else (1 << 20)
    disk = small_disk(size)
    old = build(disk / "artifact")
    process = start(disk / "artifact", onnx_export(tmp_path))
    if steals:
        while not (disk / "artifact.partial").exists() and process.poll() is None:
            time.sleep(0.01)
        hog(disk, size - (400 << 10))
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 6, stderr
    assert b"error: " in stderr and b"hint: " in stderr and b"Traceback" not in stderr
    assert visible(disk) == (["artifact", "hog"] if steals else ["artifact"])
    assert Artifact.open(disk / "artifact").sha256 == old.sha256
    old.verify()


def hog(disk: Path, size_bytes: int) -> None:
    """Another writer takes ``size_bytes`` of the disk."""
    with (disk / "hog").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)


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
