"""What runs on a board while edgekit talks to it: tells facts, takes files, runs programs, ends.

Knows Python 3.9's standard library and the frames on its stdin and stdout. Never edgekit, which may
not be there yet: this file is sent whole, and must need nothing beside it.

A frame is a line of JSON, with ``size`` bytes behind it where it says so. When stdin ends, or says
nothing for PATIENCE_S seconds, every program that was started here is killed, with all that it
started itself, and so ends this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any

HELLO = b"edgekit board agent 1\n"
BEAT_S = 2.0
PATIENCE_S = 25.0
_CHUNK = 1 << 18
_LOCK_S = 20.0
_RESERVE_BYTES = 16 << 20  # a full disk makes a board unusable
_FACT_BYTES = 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Refused(Exception):
    """Something that was asked for cannot be done. ``kind`` is one of edgekit's error classes."""

    def __init__(self, kind: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.answer = {"error": kind, "message": message, "hint": hint}


class Wire:
    """Frames in, frames out. Any thread may send; one reads."""

    def __init__(self) -> None:
        self._stream: Any = sys.stdin.buffer
        self._rest = b""
        self._lock = threading.Lock()
        self._waiting_since: float | None = None

    def request(self) -> tuple[dict[str, Any], bytes]:
        """The next frame. Raises EOFError when the other side has left."""
        while b"\n" not in self._rest:
            self._fill()
        line, _, self._rest = self._rest.partition(b"\n")
        request = json.loads(line)
        size = request.get("size", 0)
        while len(self._rest) < size:
            self._fill()
        body, self._rest = self._rest[:size], self._rest[size:]
        return request, body

    def _fill(self) -> None:
        self._waiting_since = time.monotonic()
        piece = self._stream.read1(_CHUNK)
        self._waiting_since = None
        if not piece:
            raise EOFError
        self._rest += piece

    @property
    def silent_s(self) -> float:
        """Seconds that the reader has waited for the other side by now."""
        since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    def send(self, message: dict[str, Any], data: bytes = b"") -> None:
        """One frame. A reader that is gone is the end."""
        if data:
            message["size"] = len(data)
        frame = json.dumps(message).encode() + b"\n" + data
        try:
            with self._lock:
                _write(1, frame)
        except OSError:
            die()


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


# Facts


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_FACT_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def home() -> str:
    """The one folder on this board that is edgekit's."""
    own = os.environ.get("EDGEKIT_HOME")
    if own:
        return os.path.join(own, "board")
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(data, "edgekit")


def identify(_request: dict[str, Any]) -> dict[str, Any]:
    """What this board is, as the kernel and Python tell it; the other side makes sense of it."""
    root = os.environ.get("EDGEKIT_SYSROOT", "/")  # a tree of fixtures can play any board
    cpuinfo = _read(os.path.join(root, "proc/cpuinfo"))
    libc, version = platform.libc_ver()
    return {
        "board": _read(os.path.join(root, "proc/device-tree/model")).strip("\0 \n"),
        "cpuinfo": cpuinfo,
        "meminfo": _read(os.path.join(root, "proc/meminfo")),
        "architecture": _architecture(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "glibc": version if libc == "glibc" else "",
        "os": _system(),
        "free_bytes": _free_bytes(),
        "home": home(),
        "edgekit": _installed(),
        "emulated": _emulated(cpuinfo),
    }


def _architecture() -> str:
    """What wheels must be made for: a 64-bit kernel may carry a 32-bit system."""
    name = platform.machine()
    if sys.maxsize > 1 << 32:
        return "aarch64" if name == "arm64" else name
    return {"aarch64": "armv7l", "x86_64": "i686"}.get(name, name)


def _system() -> str:
    for line in _read("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip("\"'")
    return platform.platform()


def _free_bytes() -> int:
    folder = home()
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def _installed() -> str | None:
    """The version of edgekit in its own environment here, if there is one."""
    pattern = "venv/lib/python3*/site-packages/edgekit_deploy-*.dist-info"
    for path in sorted(glob.glob(os.path.join(glob.escape(home()), pattern))):
        return os.path.basename(path)[len("edgekit_deploy-") : -len(".dist-info")]
    return None


def _emulated(cpuinfo: str) -> bool:
    """Whether QEMU's user mode runs this: /proc tells, where it does not forge it."""
    with contextlib.suppress(OSError):
        if "qemu" in os.readlink(f"/proc/self/task/{threading.get_native_id()}/exe"):
            return True
    forged = "flags" in cpuinfo and platform.machine() == "aarch64"
    return forged or "QEMU_CPU" in os.environ


# Files


class Store:
    """Files by their SHA-256, and places: folders of links to them.

    ``home/blobs/HASH`` is a whole file, ``HASH.partial`` the part of it that has arrived.
    ``home/KIND/HASH`` is a place: complete, or not there.
    """

    def __init__(self) -> None:
        self._lock: int | None = None
        self._place = ""
        self._files: list[Any] = []
        self._open: tuple[str, int] | None = None  # SHA-256 and descriptor

    def begin(self, request: dict[str, Any]) -> dict[str, Any]:
        """What is still wanted of the files of a place; nothing if the place is there already."""
        self._take_lock(request["key"])
        self._place = os.path.join(home(), request["kind"], request["name"])
        self._files = request["files"]
        if any(os.path.isabs(path) or ".." in path.split("/") for path, _, _ in self._files):
            raise Refused("TransferError", "a file's name leaves its folder")
        wanted: dict[str, Any] = {}
        needed = _RESERVE_BYTES
        there = os.path.isdir(self._place)
        for _, size, sha256 in self._files:
            if there or sha256 in wanted or os.path.exists(_blob(sha256)):
                continue
            offset, prefix = _arrived(sha256, size)
            wanted[sha256] = {"sha256": sha256, "offset": offset, "prefix": prefix}
            needed += size - offset
        free = _free_bytes()
        if there or (wanted and free < needed):
            self._release()
        if wanted and free < needed:
            words = f"{free / 1e6:.1f} MB are free there, {needed / 1e6:.1f} MB are needed"
            raise Refused("TransferError", words, "make room on the board")
        return {"place": self._place, "there": there, "wanted": list(wanted.values())}

    def _take_lock(self, key: str) -> None:
        """One agent at a time; an earlier one of the same ``key``, its line dead, has to go."""
        self._release()
        os.makedirs(home(), mode=0o700, exist_ok=True)
        os.makedirs(os.path.join(home(), "blobs"), exist_ok=True)
        self._lock = os.open(os.path.join(home(), ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + _LOCK_S
        while True:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise Refused("TransferError", "another edgekit sends files there")
            _end_earlier(self._lock, key)
            time.sleep(0.2)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()} {key}".encode(), 0)

    def _release(self) -> None:
        for descriptor in (self._open and self._open[1], self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._open = self._lock = None

    def file(self, request: dict[str, Any]) -> dict[str, Any]:
        """What comes next belongs to this file, from ``offset`` on."""
        path = _blob(request["sha256"]) + ".partial"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        self._open = request["sha256"], descriptor
        os.ftruncate(descriptor, request["offset"])
        return {}

    def data(self, piece: bytes) -> dict[str, Any] | None:
        """Append to the open file; None once that has failed, for more is on its way."""
        if self._open is None:
            return None
        sha256, descriptor = self._open
        try:
            _write(descriptor, piece)
        except OSError as error:
            with contextlib.suppress(OSError):  # what fills the disk must go
                os.unlink(_blob(sha256) + ".partial")
            self._release()
            words = f"the file did not fit there: {error.strerror}"
            raise Refused("TransferError", words, "make room on the board") from None
        return {"value": len(piece)}

    def finish(self, _request: dict[str, Any]) -> dict[str, Any]:
        """Read the file again, from the disk, and give it its name if every byte is right."""
        assert self._open is not None
        sha256, descriptor = self._open
        self._open = None
        partial = _blob(sha256) + ".partial"
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        if _sha256(partial) != sha256:
            os.unlink(partial)
            raise Refused("TransferError", "a file arrived damaged (SHA-256)", "try it again")
        os.replace(partial, _blob(sha256))
        _fsync(os.path.dirname(partial))
        return {}

    def commit(self, _request: dict[str, Any]) -> dict[str, Any]:
        """All files are there: the place appears, whole."""
        partial = self._place + ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        for path, _, sha256 in self._files:
            target = os.path.join(partial, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.link(_blob(sha256), target)
        for folder, _, _ in os.walk(partial):
            _fsync(folder)
        os.replace(partial, self._place)
        _fsync(os.path.dirname(self._place))
        self._release()
        return {}


def _end_earlier(lock: int, key: str) -> None:
    """Kill the agent that holds ``lock``, if it serves whoever has ``key``."""
    pid, _, owner = os.pread(lock, 200, 0).decode("utf-8", "replace").partition(" ")
    # Between taking a lock and signing it, it bears the name of one that may be long dead.
    if owner == key and "board_agent.py" in _read(f"/proc/{pid}/cmdline"):
        with contextlib.suppress(OSError):
            os.kill(int(pid), signal.SIGKILL)


def _blob(sha256: str) -> str:
    return os.path.join(home(), "blobs", sha256)


def _arrived(sha256: str, size: int) -> tuple[int, str]:
    """How much of a file is here already, and the hash of that much."""
    path = _blob(sha256) + ".partial"
    try:
        if os.path.getsize(path) > size:
            os.unlink(path)
        return os.path.getsize(path), _sha256(path)
    except OSError:
        return 0, hashlib.sha256().hexdigest()


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def _fsync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(request: dict[str, Any]) -> dict[str, Any]:
    """Take away a place, or the whole of edgekit's folder; and files that no place needs then."""
    own, place = os.path.realpath(home()), os.path.normpath(request["place"])
    place = os.path.join(os.path.realpath(os.path.dirname(place)), os.path.basename(place))
    if place != own and not place.startswith(own + os.sep):
        raise Refused("RemoteCommandError", f"edgekit removes nothing outside {own}")
    there = os.path.lexists(place)
    if os.path.isdir(place) and not os.path.islink(place):
        shutil.rmtree(place)
    elif there:
        os.unlink(place)
    for blob in glob.glob(os.path.join(glob.escape(home()), "blobs", "*")):
        if not blob.endswith(".partial") and os.stat(blob).st_nlink == 1:
            os.unlink(blob)
    return {"removed": there}


# Programs

_running: set[int] = set()


class Program:
    """A program that was started here, and what it says."""

    def __init__(self, wire: Wire, argv: list[str], cwd: str | None, stdin: bytes) -> None:
        self._wire = wire

        def last_will() -> None:
            if _LIBC is not None:
                _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=cwd or (home() if os.path.isdir(home()) else "/"),
                bufsize=0,
                start_new_session=True,
                preexec_fn=last_will,
            )
        except (OSError, ValueError) as error:
            words = getattr(error, "strerror", None) or str(error)
            raise Refused(
                "RemoteCommandError", f"{argv[0]} cannot be started there: {words}"
            ) from None
        _running.add(self._process.pid)
        pipes = {"stdout": self._process.stdout, "stderr": self._process.stderr}
        pumps = [threading.Thread(target=self._pump, args=pair) for pair in pipes.items()]
        feeder = threading.Thread(target=self._feed, args=(stdin,))
        waiter = threading.Thread(target=self._wait, args=(pumps,))
        for thread in (feeder, *pumps, waiter):
            thread.daemon = True
            thread.start()

    def _feed(self, stdin: bytes) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError), pipe:  # it may not want to hear the rest
            _write(pipe.fileno(), stdin)

    def _pump(self, name: str, pipe: IO[bytes]) -> None:
        for piece in iter(lambda: os.read(pipe.fileno(), _CHUNK), b""):
            self._wire.send({"said": name}, piece)

    def _wait(self, pumps: list[threading.Thread]) -> None:
        code = self._process.wait()
        kill_all()  # what it left behind holds its pipes open
        _running.discard(self._process.pid)
        for pump in pumps:
            pump.join()
        self._wire.send({"finished": code})


def kill_all() -> None:
    """Kill all that this process started, and all that those started: none can hide from it.

    Orphans come to this process, for it is their subreaper (prctl(2)).
    """
    for group in list(_running):  # all there is to do where there is no /proc
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and (living := _descendants()):
        for pid in living:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _descendants() -> set[int]:
    """Processes below this one, but for those that are dead and unburied."""
    above, dead = {}, set()
    for path in glob.glob("/proc/[0-9]*/stat"):
        fields = _read(path).rpartition(")")[2].split()  # its name may hold anything
        if len(fields) > 1:
            pid = int(path.split("/")[2])
            above[pid] = int(fields[1])
            if fields[0] == "Z":
                dead.add(pid)
    found: set[int] = set()
    edge = {os.getpid()}
    while edge:
        edge = {pid for pid, parent in above.items() if parent in edge} - found
        found |= edge
    return found - dead


def die() -> None:
    """Leave nothing running."""
    kill_all()
    os._exit(0)


def _watch(wire: Wire) -> None:
    """Tell the other side that this one lives, and end when the other one does not."""
    while True:
        wire.send({"beat": True})
        if wire.silent_s > PATIENCE_S:
            die()
        time.sleep(BEAT_S)


def serve() -> None:
    """Answer until the other side leaves."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: die())
    wire, store = Wire(), Store()
    os.write(1, HELLO)
    threading.Thread(target=_watch, args=(wire,), daemon=True).start()
    calls = {"identify": identify, "remove": remove, "begin": store.begin, "file": store.file}
    calls |= {"finish": store.finish, "commit": store.commit}
    while True:
        try:
            request, body = wire.request()
        except (EOFError, ValueError):
            die()
        kind = request["do"]
        try:
            if kind == "run":
                Program(wire, request["argv"], request["cwd"], body)
            elif kind == "kill":
                kill_all()
            elif kind == "data":
                answer = store.data(body)
                if answer is not None:
                    wire.send(answer)
            elif kind != "ping":
                wire.send({"value": calls[kind](request)})
        except Refused as error:
            wire.send(error.answer)
        except OSError as error:
            words = f"{error.filename or 'a file there'}: {error.strerror}"
            wire.send({"error": "TransferError", "message": words, "hint": None})


if __name__ == "__main__":
    serve()
