"""A board behind a real sshd: what works over ssh, and what every failure of it is called."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd

import edgekit
from edgekit import device_config
from edgekit.device_config import Address, Device
from edgekit.errors import ConnectError, DeviceError, HostKeyError, RemoteCommandError
from edgekit.target import Local, Ssh, open_target


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sshd.Board]:
    with sshd.board(tmp_path, monkeypatch) as made:
        yield made


def test_a_board_is_identified_filled_used_and_emptied(board: sshd.Board, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "m.bin").write_bytes(data)
    with open_target("board") as there:
        assert isinstance(there, Ssh)
        facts = there.identify()
        assert facts.home == str(board.home)
        assert facts.edgekit == edgekit.__version__
        place = there.put(tmp_path / "m.bin", kind="artifacts")
        assert Path(place, "m.bin").read_bytes() == data
        assert there.put(tmp_path / "m.bin", kind="artifacts") == place
        assert there.sent_bytes == len(data)
        done = there.run(["/bin/echo", "$HOME; `id`"])
        assert (done.code, done.stdout) == (0, "$HOME; `id`\n")
        there.remove(place)
        assert not os.path.exists(place)


def test_a_device_that_was_added_is_found_by_its_name(board: sshd.Board) -> None:
    device_config.add(Device("kitchen", Address("board"), "rpi5"))
    with open_target("kitchen") as there:
        assert there.name == "kitchen"
        assert there.run(["/bin/true"]).code == 0


def test_local_is_this_machine() -> None:
    assert isinstance(device_config.find("local"), Device)
    with open_target("local") as here:
        assert isinstance(here, Local)


def _closed_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def _changed_key(board: sshd.Board) -> None:
    board.know("other_host")


def _unknown_key(board: sshd.Board) -> None:
    board.know(None)


def _wrong_key(board: sshd.Board) -> None:
    board.configure(key="wrong_user")


def _off(board: sshd.Board) -> None:
    board.configure(port=_closed_port())


def _nowhere(board: sshd.Board) -> None:
    board.configure(host="no-such-board.invalid")


@pytest.mark.parametrize(
    ("fault", "kind", "message", "hint"),
    [
        (_changed_key, HostKeyError, "another host key", "ssh-keygen -R"),
        (_unknown_key, HostKeyError, "not known", "run `ssh board` once"),
        (_wrong_key, ConnectError, "does not let this user in", "ssh-copy-id"),
        (_off, ConnectError, "refused", "is the board on"),
        (_nowhere, ConnectError, "nobody knows the host", "devices add"),
    ],
)
def test_every_way_not_to_connect_has_its_name_and_its_hint(
    board: sshd.Board, fault: object, kind: type[DeviceError], message: str, hint: str
) -> None:
    assert callable(fault)
    fault(board)
    began = time.monotonic()
    with pytest.raises(kind, match=message) as caught:
        open_target("board")
    assert type(caught.value) is kind
    assert hint in (caught.value.hint or "")
    assert time.monotonic() - began < 30


def test_a_changed_host_key_is_not_learnt(board: sshd.Board, tmp_path: Path) -> None:
    board.know("other_host")
    known = (tmp_path / "known").read_bytes()
    for _ in range(2):
        with pytest.raises(HostKeyError):
            open_target("board")
    assert (tmp_path / "known").read_bytes() == known


@pytest.mark.slow
def test_a_host_that_accepts_and_says_nothing_is_given_up_in_time(board: sshd.Board) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        board.configure(port=mute.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(ConnectError):
            open_target("board")
        assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exec no-such-python3", "has no python3"),
        ("exit 94", "older than 3.9"),
        ("echo broken >&2; exit 3", "exit code 3: broken"),
    ],
)
def test_a_board_without_a_python_that_serves_says_so(
    board: sshd.Board, python: str, message: str
) -> None:
    board.python(python)
    with pytest.raises(RemoteCommandError, match=message):
        open_target("board")


def test_a_board_without_any_python_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        sshd.board(tmp_path, monkeypatch, PATH="/nowhere"),
        pytest.raises(RemoteCommandError, match="has no python3"),
    ):
        open_target("board")


def test_a_login_script_that_talks_does_no_harm(board: sshd.Board) -> None:
    board.python(f"echo 'Welcome to your board!'; exec {sys.executable} \"$@\"")
    with open_target("board") as there:
        assert there.run(["/bin/true"]).code == 0
