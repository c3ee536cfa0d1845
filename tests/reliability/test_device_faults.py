"""Boards that reboot, hang, fill up or drop: a typed error in time, nothing left, and a resume."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd

from edgekit import board_link, target
from edgekit.errors import ConnectError, HostKeyError, TransferError
from edgekit.target import open_target

_SLEEP = "import time; print('on', flush=True); time.sleep(600)"


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sshd.Board]:
    with sshd.board(tmp_path, monkeypatch) as made:
        yield made


def _upload(board: sshd.Board, file: Path, part: float, *, stays_away: bool = False) -> None:
    """Cut the line when this part is over. What arrives must be whole, and cheap.

    A board that answers again is taken up again by the same call; of one that stays away the next
    call is told.
    """
    cut = False

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal cut
        if stage.startswith("upload") and not cut and done >= part * total:
            cut = True
            if stays_away:
                board.configure(port=1)
            board.cut()

    sent = 0
    with open_target("board") as there:
        if stays_away:
            with pytest.raises(ConnectError):
                there.put(file, kind="artifacts", progress=progress)
            board.configure()
            sent = there.sent_bytes
        else:
            place = there.put(file, kind="artifacts", progress=progress)
    if stays_away:
        assert sshd.eventually(lambda: not board.connections())
        with open_target("board") as there:
            place = there.put(file, kind="artifacts")
    assert cut
    sent += there.sent_bytes
    arrived = hashlib.sha256(Path(place, file.name).read_bytes()).digest()
    assert arrived == hashlib.sha256(file.read_bytes()).digest()
    # What was on its way when the line was cut travels twice: at most 1 MiB.
    assert sent <= 1.05 * file.stat().st_size


def _file(folder: Path, size_bytes: int) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(os.urandom(size_bytes))
    return path


@pytest.mark.parametrize("part", [0.1, 0.6, 0.97])
def test_an_upload_that_was_cut_goes_on_by_itself(
    board: sshd.Board, tmp_path: Path, part: float
) -> None:
    _upload(board, _file(tmp_path, 24 << 20), part)


def test_an_upload_to_a_board_that_stays_away_fails_in_time_and_goes_on_later(
    board: sshd.Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_PAUSES_S", (0.0, 0.2))
    began = time.monotonic()
    _upload(board, _file(tmp_path, 24 << 20), 0.5, stays_away=True)
    assert time.monotonic() - began < 15


@pytest.mark.slow
def test_a_board_that_stays_away_is_given_up_within_thirty_seconds(
    board: sshd.Board, tmp_path: Path
) -> None:
    began = time.monotonic()
    _upload(board, _file(tmp_path, 24 << 20), 0.5, stays_away=True)
    assert 5 < time.monotonic() - began < 30


def test_a_frozen_line_is_replaced_and_its_agent_gives_way(
    board: sshd.Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent there does not know that nobody listens, and holds the lock on what arrived."""
    monkeypatch.setattr(board_link, "_SILENCE_S", 2.5)
    file, frozen = _file(tmp_path, 24 << 20), False

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal frozen
        if stage.startswith("upload") and not frozen and done > total // 2:
            frozen = True
            board.signal(signal.SIGSTOP)

    with open_target("board") as there:
        place = there.put(file, kind="artifacts", progress=progress)
        assert frozen and there.sent_bytes <= 1.05 * file.stat().st_size
    assert Path(place, file.name).read_bytes() == file.read_bytes()


def test_a_stranger_who_answers_in_its_place_is_sent_nothing_more(
    board: sshd.Board, tmp_path: Path
) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("upload") and done > total // 2:
            board.know("other_host")
            board.cut()

    with open_target("board") as there, pytest.raises(HostKeyError):
        there.put(_file(tmp_path, 8 << 20), kind="artifacts", progress=progress)


@pytest.mark.slow
def test_an_upload_survives_cuts_at_fifty_places(
    board: sshd.Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the boards come back at once, half of them only to the next call."""
    monkeypatch.setattr(target, "_PAUSES_S", (0.0, 0.2))
    dice = random.Random(4)
    file = _file(tmp_path, 24 << 20)
    for turn in range(50):
        file.write_bytes(os.urandom(24 << 20))
        _upload(board, file, dice.random() * 0.98, stays_away=turn % 2 == 1)
        with open_target("board") as there:
            there.remove(str(board.home / "artifacts"))


@pytest.mark.parametrize("fault", [signal.SIGKILL, "cut"], ids=["reboot", "drop"])
def test_a_board_that_goes_away_ends_the_program_there_and_the_wait_here(
    board: sshd.Board, fault: signal.Signals | str
) -> None:
    word = f"edgekit-{os.getpid()}-{fault}"
    began = time.monotonic()
    with open_target("board") as there:

        def on_line(stream: str, line: str) -> None:
            board.cut() if fault == "cut" else board.signal(signal.SIGKILL)

        with pytest.raises(ConnectError):
            there.run([sys.executable, "-c", _SLEEP, word], on_line=on_line)
    assert time.monotonic() - began < 30
    assert sshd.eventually(lambda: not sshd.processes_with(word))


@pytest.mark.slow
def test_programs_end_when_the_connection_is_cut_at_fifty_moments(board: sshd.Board) -> None:
    dice = random.Random(4)
    word = f"edgekit-{os.getpid()}-fifty"
    code = "import time\nfor _ in range(600): print('on', flush=True); time.sleep(0.01)"
    for _ in range(50):
        left = dice.randrange(1, 60)
        with open_target("board") as there:

            def on_line(stream: str, line: str) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    board.cut()

            with pytest.raises(ConnectError):
                there.run([sys.executable, "-c", code, word], on_line=on_line)
        assert sshd.eventually(lambda: not sshd.processes_with(word))


def _hangs(board: sshd.Board) -> float:
    """Seconds until a board that is frozen is given up."""
    with open_target("board") as there:
        began = time.monotonic()

        def on_line(stream: str, line: str) -> None:
            board.signal(signal.SIGSTOP)

        with pytest.raises(ConnectError, match=r"silent|no connection"):
            there.run([sys.executable, "-c", _SLEEP], on_line=on_line)
        return time.monotonic() - began


def test_a_board_that_freezes_is_given_up(
    board: sshd.Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_link, "_SILENCE_S", 2.5)
    assert _hangs(board) < 12


@pytest.mark.slow
def test_a_frozen_board_is_noticed_within_twenty_seconds_and_some(board: sshd.Board) -> None:
    assert _hangs(board) < 27


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB, 8 of which can be written to: edgekit leaves 16 free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "edgekit-test", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_without_room_is_seen_before_anything_is_sent(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _file(tmp_path, 12 << 20)
    with sshd.board(tmp_path, monkeypatch, EDGEKIT_HOME=str(small_disk)), open_target("board") as t:
        with pytest.raises(TransferError, match="MB are free there"):
            t.put(file, kind="artifacts")
        assert t.sent_bytes == 0


def test_a_disk_that_fills_up_meanwhile_keeps_no_half_file(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _file(tmp_path, 6 << 20)
    with sshd.board(tmp_path, monkeypatch, EDGEKIT_HOME=str(small_disk)), open_target("board") as t:

        def progress(stage: str, done: int, total: int) -> None:
            if stage.startswith("upload") and not (small_disk / "other").exists():
                (small_disk / "other").write_bytes(bytes(21 << 20))  # somebody else's

        with pytest.raises(TransferError, match="did not fit"):
            t.put(file, kind="artifacts", progress=progress)
        assert not list((small_disk / "board/blobs").iterdir())
        (small_disk / "other").unlink()
        place = t.put(file, kind="artifacts")
    assert Path(place, file.name).read_bytes() == file.read_bytes()


def test_a_clock_that_jumps_changes_nothing(
    board: sshd.Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_target("board") as there:
        monkeypatch.setattr(time, "time", lambda: 0.0)
        code = "import time; time.sleep(1); print('done')"
        assert there.run([sys.executable, "-c", code]).stdout == "done\n"
