"""A board on this machine: a real sshd on loopback, with its own keys, home and ssh_config.

A fixture tree can play its /proc and /sys. Nothing of the user's own ssh is read or changed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
_SSH = shutil.which("ssh")


class Board:
    """The sshd, and what tests do to it."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.home = folder / "home" / "board"
        self.port = _free_port()
        self._config = folder / "sshd_config"
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("host", "other_host", "user", "wrong_user"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(make, check=True)
        (folder / "authorized").write_text((folder / "user.pub").read_text())
        # Nor does a login script of the user's own have a say.
        given = {"EDGEKIT_HOME": f"{folder}/home", "HOME": f"{folder}/home"}
        given |= {"PATH": f"{folder}/there:/usr/bin:/bin", **env}
        words = " ".join(f'"{name}={value}"' for name, value in given.items())
        self._config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/authorized\nUsePAM no\nStrictModes no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitUserRC no\n"
            f"PermitRootLogin prohibit-password\nSetEnv {words}\n"
        )
        self.know("host")
        self.configure()
        (folder / "there").mkdir()
        self.python(f'exec {sys.executable} "$@"')
        (folder / "bin").mkdir()
        # The user's ssh reads this file instead of ~/.ssh/config; all else is as it is called.
        (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {_SSH} -F {folder}/config "$@"\n')
        (folder / "bin" / "ssh").chmod(0o755)

    def configure(
        self, key: str = "user", host: str = "127.0.0.1", port: int | None = None
    ) -> None:
        """What ~/.ssh/config says of the host alias ``board``."""
        lines = (
            "Host board\n",
            f"HostName {host}\nPort {port or self.port}\nIdentityFile {self.folder}/{key}\n",
            f"IdentitiesOnly yes\nIdentityAgent none\nUserKnownHostsFile {self.folder}/known\n",
            "GlobalKnownHostsFile /dev/null\nHostKeyAlias board\n",
        )
        (self.folder / "config").write_text("".join(lines))

    def know(self, key: str | None) -> None:
        """The host key that is known; None for none."""
        kind, text, *_ = (self.folder / f"{key or 'host'}.pub").read_text().split()
        (self.folder / "known").write_text(f"board {kind} {text}\n" if key else "")

    def python(self, code: str) -> None:
        """What the board's python3 is: a shell script."""
        (self.folder / "there/python3").write_text(f"#!/bin/sh\n{code}\n")
        (self.folder / "there/python3").chmod(0o755)

    def start(self) -> None:
        """Listen. Only root's sshd asks for this folder."""
        assert _SSHD is not None
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self._process = subprocess.Popen(
            [_SSHD, "-D", "-e", "-f", str(self._config)], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                return socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.02)
        raise AssertionError("sshd did not start")

    def connections(self) -> list[int]:
        """The processes of sshd that serve a connection, each with what it started."""
        assert self._process is not None
        return _below(self._process.pid)

    def signal(self, number: signal.Signals) -> None:
        """To all connections, and what runs in them: a reboot (SIGKILL), a hang (SIGSTOP)."""
        for pid in self.connections():
            _send(pid, number)

    def cut(self) -> None:
        """Kill sshd's own processes, as when the link drops; programs are left to themselves."""
        for pid in self.connections():
            if _name(pid).startswith("sshd"):
                _send(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Off."""
        if self._process is not None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port: int = asked.getsockname()[1]
        return port


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _below(root: int) -> list[int]:
    above: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            above[int(stat.parent.name)] = int(fields[1])
    found: list[int] = []
    edge = [root]
    while edge:
        edge = [pid for pid, parent in above.items() if parent in edge]
        found += edge
    return found


def processes_with(word: str) -> list[int]:
    """Living processes with ``word`` among their arguments."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = file.read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            continue
        if word in arguments and int(file.parent.name) != os.getpid():
            found.append(int(file.parent.name))
    return found


def eventually(true: Callable[[], bool], within_s: float = 10) -> bool:
    """Whether something becomes true within so many seconds."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return true()


@contextmanager
def board(folder: Path, monkeypatch: pytest.MonkeyPatch, **env: str) -> Iterator[Board]:
    """A board that answers to the alias ``board``, with this environment's edgekit set up on it.

    ``env`` is the environment of what runs there.
    """
    if _SSHD is None or _SSH is None:
        pytest.skip("this needs sshd and ssh: scripts/need sshd=openssh-server ssh=openssh-client")
    made = Board(folder, env)
    made.home.mkdir(parents=True)
    (made.home / "venv").symlink_to(sys.prefix)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    made.start()
    try:
        yield made
    finally:
        made.stop()
