"""How to reach a device and what to do there: identify, put, run, remove; this machine or over ssh.

Knows ssh's options and words, and the frames of ``board_agent``, which it sends over and talks to.
Never what the files and programs mean. The only place that starts ssh: its arguments are a list of
constants, a checked host and a checked user; all else travels as JSON on stdin.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from edgekit import __version__, _proc, device_config, machine, upload
from edgekit.board_link import Link, printable
from edgekit.device_config import LOCAL, Address, Device
from edgekit.errors import ConnectError, DeviceError, HostKeyError, RemoteCommandError, UsageError
from edgekit.exporter import Progress, no_progress

KINDS = ("artifacts", "wheels")
# The whole of what a shell over there ever sees. The program itself comes through stdin.
_TOO_OLD = 94
REMOTE_COMMAND = (
    "exec python3 -I -u -c '"
    f"import sys; sys.version_info < (3, 9) and sys.exit({_TOO_OLD}); b = sys.stdin.buffer; "
    'exec(compile(b.read(int(b.readline())), "board_agent.py", "exec"))'
    "'"
)
_LOCAL_CODE = REMOTE_COMMAND.partition("'")[2].removesuffix("'")
# What the user's ssh_config says holds, but for what would ask, wait, or share a connection: a
# shared one is kept alive by somebody else's rules.
_OPTIONS = (
    *("BatchMode=yes", "StrictHostKeyChecking=yes", "UpdateHostKeys=no"),
    *("ConnectTimeout=10", "ConnectionAttempts=1"),
    *("ServerAliveInterval=5", "ServerAliveCountMax=2"),
    *("ControlMaster=no", "ControlPath=none", "ClearAllForwardings=yes"),
    *("ForwardAgent=no", "ForwardX11=no", "PermitLocalCommand=no"),
    *("RemoteCommand=none", "EscapeChar=none", "LogLevel=INFO"),
)
_MAX_OUTPUT_BYTES = 64 << 20
_STOP_S = 10.0
# From the call to the first word: two seconds on a small board, more if it is busy.
_HELLO_S = 25.0
# An upload whose line breaks takes it up again, at once and then ever more patiently, for so long
# after the device was heard last. A silent device is given up by its link when 18 s are over.
_AWAY_S = 28.0
_PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0)
_CONNECT_S = 5.0  # less time makes no connection
_IN_VAIN = 2  # lines in a row that broke before a byte went over
_MOST_LINES = 100
_NO_SSH = "sudo apt install openssh-client, or what your system calls it"


@dataclass(frozen=True)
class BoardFacts:
    """What a board says of itself.

    ``cpu`` is the core's name, ``architecture`` what its Python runs as ("aarch64"), ``features``
    are llama.cpp's names. ``python`` and ``glibc`` are versions, ``free_bytes`` are those of the
    disk that holds ``home``, edgekit's folder there. ``edgekit`` is the version installed in it,
    None without one. An ``emulated`` board's times mean nothing.
    """

    board: str | None
    cpu: str | None
    architecture: str
    cores: int
    features: tuple[str, ...]
    memory_bytes: int | None
    python: str
    glibc: str | None
    os: str
    free_bytes: int
    home: str
    edgekit: str | None
    emulated: bool


@dataclass(frozen=True)
class Finished:
    """How a program on the device ended; its words as UTF-8, wrong bytes replaced."""

    code: int
    stdout: str
    stderr: str


class Target:
    """A device with an open connection. Use it in ``with``; one thread at a time.

    Everything raises ConnectError within 20 s when the device or the way to it dies, ``put`` within
    30, and then nothing that was started there lives on.
    """

    def __init__(self, name: str, connect: Callable[[float], Link]) -> None:
        """``connect`` makes a link whose other end must speak within so many seconds."""
        self.name = name
        self._connect = connect
        self._link = connect(_HELLO_S)
        self._sent_bytes = 0  # over links that are dead
        self._key = secrets.token_hex(16)
        self._closed = False

    @property
    def sent_bytes(self) -> int:
        """Bytes of files that went over by now."""
        return self._sent_bytes + self._link.file_bytes

    def identify(self) -> BoardFacts:
        """What the board is, what it runs, and how much room it has."""
        return _facts(self.name, self._link.ask({"do": "identify"}))

    def put(
        self,
        path: Path,
        *,
        kind: str,
        also: Sequence[str] = (),
        progress: Progress = no_progress,
    ) -> str:
        """Bring a file or a folder over, and return the folder there that holds it.

        With a file come those of ``also``, names in its folder.

        Its name is the hash of what it holds. What is there already is not sent again, and an
        interrupted upload goes on where it stopped, by itself if the device is back in time; the
        place appears when every byte in it was read back and hashed there. ``kind`` is one of
        KINDS.
        Raises UsageError, TransferError, ConnectError.
        """
        if kind not in KINDS:
            raise UsageError(f"there is no kind {kind!a}", hint=f"known: {', '.join(KINDS)}")
        files = upload.listing(path, also, progress)
        in_vain = 0
        for _ in range(_MOST_LINES):
            sent_before = self.sent_bytes
            try:
                return upload.put(self._link, files, kind, self._key, progress)
            except ConnectError as error:
                lost = error
            in_vain = in_vain + 1 if self.sent_bytes == sent_before else 0
            if self._closed or in_vain > _IN_VAIN:
                break
            self._reconnect(lost)
        raise lost

    def _reconnect(self, lost: ConnectError) -> None:
        """A new link in the place of a dead one; ``lost`` again if the device stays away."""
        for pause_s in _PAUSES_S:
            left_s = self._link.heard_s + _AWAY_S - time.monotonic() - pause_s
            if left_s < _CONNECT_S or self._closed:
                break
            time.sleep(pause_s)
            try:
                fresh = self._connect(left_s)
            except ConnectError:
                continue
            self._sent_bytes += self._link.file_bytes
            self._link = fresh
            return
        raise lost

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        on_line: Callable[[str, str], None] | None = None,
        silence_s: float | None = None,
        cwd: str | None = None,
    ) -> Finished:
        """Run a program there, without a shell, in ``cwd`` (edgekit's folder).

        ``on_line`` hears ("stdout" or "stderr", a line) as it is said; then only what it was not
        told, an unfinished line, is in the result. The program and all that it starts are killed
        when this ends in whatever way. Raises RemoteCommandError if it cannot be started, or says
        nothing for ``silence_s`` seconds.
        """
        arguments = list(argv)
        if not arguments or not all(isinstance(word, str) for word in arguments):
            raise UsageError("a program is a list of words")
        self._link.send({"do": "run", "argv": arguments, "cwd": cwd}, stdin)
        heard = _Heard(on_line)
        said_at = time.monotonic()
        try:
            while True:
                message = self._link.message(timeout_s=1.0)
                if message is None:
                    if silence_s is not None and time.monotonic() - said_at > silence_s:
                        raise RemoteCommandError(
                            f"{arguments[0]} on {self.name} said nothing for {silence_s:g} s"
                        )
                elif "said" in message:
                    said_at = time.monotonic()
                    heard.take(message["said"], message["data"])
                elif type(message.get("finished")) is int:
                    return Finished(message["finished"], *heard.rest())
                else:
                    break
        except BaseException:
            self._stop()
            raise
        raise self._link.refusal(message)

    def _stop(self) -> None:
        """Kill what runs there, and leave the line clean; a link that cannot is closed."""
        deadline = time.monotonic() + _STOP_S
        try:
            self._link.send({"do": "kill"})
            while time.monotonic() < deadline:
                message = self._link.message(timeout_s=1.0)
                if message is not None and ("finished" in message or "error" in message):
                    return
        except ConnectError:
            pass
        self._link.close()

    def remove(self, place: str) -> None:
        """Take away a folder there: one below ``home``, or all of ``home``."""
        self._link.ask({"do": "remove", "place": place})

    def close(self) -> None:
        """End the connection, and with it all that runs there; twice is fine."""
        self._closed = True
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Local(Target):
    """This machine, in the same words as a board: the same agent, without ssh."""

    def __init__(self) -> None:
        argv = (sys.executable, "-I", "-u", "-c", _LOCAL_CODE)
        super().__init__(LOCAL, lambda s: Link(LOCAL, _proc.start(argv), _local_failure, s))

    def identify(self) -> BoardFacts:
        """As for a board; the edgekit here is the one that asks."""
        return replace(super().identify(), edgekit=__version__)


class Ssh(Target):
    """A board behind ssh. Raises ConnectError, HostKeyError, RemoteCommandError (no Python)."""

    def __init__(self, device: Device) -> None:
        super().__init__(device.name, lambda hello_s: _link(device, hello_s))


def _link(device: Device, hello_s: float) -> Link:
    assert device.address is not None
    try:
        # In English, for `failure` reads what ssh says.
        process = _proc.start(ssh_argv(device.address), env={"LC_ALL": "C"})
    except OSError:
        raise ConnectError("there is no ssh here", hint=_NO_SSH) from None
    return Link(device.name, process, lambda code, words: failure(device, code, words), hello_s)


def open_target(name: str) -> Target:
    """Connect to "local", a device that the user added, or an alias of ``~/.ssh/config``.

    Raises UsageError for what can be no host, and what ``Ssh`` raises.
    """
    device = device_config.find(name)
    return Local() if device.address is None else Ssh(device)


def ssh_argv(where: Address) -> list[str]:
    """The exact arguments of ssh: a golden file knows them too."""
    options = [word for option in _OPTIONS for word in ("-o", option)]
    user = [] if where.user is None else ["-l", where.user]
    return ["ssh", "-T", *options, *user, "--", where.host, REMOTE_COMMAND]


def _local_failure(_code: int | None, words: str) -> DeviceError:
    last = (words.strip().splitlines() or ["it ended"])[-1]
    return ConnectError(f"the agent on this machine: {last}")


def failure(device: Device, code: int | None, words: str) -> DeviceError:
    """ssh's exit code and what it said, as one of ours. ``code`` None: it was stopped, or lives."""
    name, where = device.name, device.address
    last = printable((words.strip().splitlines() or [""])[-1])
    if "IDENTIFICATION HAS CHANGED" in words:
        return HostKeyError(
            f"{name} shows another host key than the one that is known",
            hint="if the board was set up anew: ssh-keygen -R its host, then as for a new board;"
            " if not, somebody else answers in its place",
        )
    if "Host key verification failed" in words or "strict checking" in words:
        return HostKeyError(
            f"the host key of {name} is not known",
            hint=f"run `ssh {where}` once, and compare the fingerprint that it shows",
        )
    if "Permission denied" in words:
        return ConnectError(
            f"{name} does not let this user in: {last}", hint=f"ssh-copy-id {where} brings your key"
        )
    if "Could not resolve hostname" in words:
        return ConnectError(
            f"nobody knows the host of {name}: {last}",
            hint=f"edgekit devices add {name} --ssh USER@HOST, or name it in ~/.ssh/config",
        )
    if code == _TOO_OLD:
        return RemoteCommandError(f"the Python of {name} is older than 3.9")
    if code in (126, 127):
        return RemoteCommandError(
            f"{name} has no python3: {last}", hint="install it there: sudo apt install python3"
        )
    if code not in (None, 0, 255):
        return RemoteCommandError(f"python3 on {name} ended with exit code {code}: {last}")
    hint = "is the board on, and in this network? What arrived is kept: run it again"
    return ConnectError(f"no connection to {name}: {last or 'it ended'}", hint=hint)


def _facts(name: str, body: Any) -> BoardFacts:
    """A stranger's words, checked."""
    kinds = {"cores": int, "free_bytes": int, "emulated": bool, "edgekit": str | None}
    texts = ("board", "cpuinfo", "meminfo", "architecture", "python", "glibc", "os", "home")
    kinds |= dict.fromkeys(texts, str)
    good = isinstance(body, dict) and all(isinstance(body.get(k), kinds[k]) for k in kinds)
    if not good or not body["home"].startswith("/") or not body["home"].isprintable():
        raise ConnectError(f"{name} does not say what it is")
    cpu = machine.cpu_of(body["cpuinfo"])
    return BoardFacts(
        board=printable(body["board"]) or None,
        cpu=None if cpu.model is None else printable(cpu.model),
        architecture=printable(body["architecture"]),
        cores=body["cores"],
        features=cpu.features,
        memory_bytes=machine.total_bytes(body["meminfo"]),
        python=printable(body["python"]),
        glibc=printable(body["glibc"]) or None,
        os=printable(body["os"]),
        free_bytes=body["free_bytes"],
        home=body["home"],
        edgekit=body["edgekit"] and printable(body["edgekit"]),
        emulated=body["emulated"],
    )


class _Heard:
    """What a program said: lines to whoever listens, the rest kept, within bounds."""

    def __init__(self, on_line: Callable[[str, str], None] | None) -> None:
        self._on_line = on_line
        self._kept = {"stdout": b"", "stderr": b""}

    def take(self, stream: str, piece: bytes) -> None:
        if stream not in self._kept:
            raise ConnectError("the board speaks of a stream that there is not")
        data = self._kept[stream] + piece
        if self._on_line is not None:
            *lines, data = data.split(b"\n")
            for line in lines:
                self._on_line(stream, line.decode("utf-8", "replace"))
        if len(data) > _MAX_OUTPUT_BYTES:
            raise RemoteCommandError("the program over there says more than edgekit listens to")
        self._kept[stream] = data

    def rest(self) -> tuple[str, str]:
        out, err = (data.decode("utf-8", "replace") for data in self._kept.values())
        return out, err
