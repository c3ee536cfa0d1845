"""The line to a board's agent: a child process, frames both ways, and signs of life.

Knows pipes, threads and how long silence may last; never what is asked for, and it trusts nothing
that comes back.
"""

from __future__ import annotations

import io
import json
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

from edgekit import _proc
from edgekit.board_agent import HELLO
from edgekit.errors import ConnectError, DeviceError, RemoteCommandError, TransferError

# The agent says every two seconds that it lives.
_SILENCE_S = 18.0
_PING_S = 5.0
_CLOSE_S = 3.0
_NOISE_BYTES = 1 << 16  # what a login script may print first
_LINE_BYTES = 1 << 20
_DATA_BYTES = 1 << 20
_WORDS_BYTES = 1 << 14
_WAITING = 64  # frames that were read and not yet asked for
_REFUSALS: dict[str, type[DeviceError]] = {
    "TransferError": TransferError,
    "RemoteCommandError": RemoteCommandError,
}

# The exit code (None: it lives, or was stopped) and stderr of the process, as an error of ours.
Say = Callable[[int | None, str], DeviceError]


class Link:
    """A running agent. One thread asks; nothing here blocks for longer than the silence allowed."""

    def __init__(self, name: str, process: _proc.Process, say: Say, hello_s: float) -> None:
        """Send the agent through ``process``, which runs Python, and wait for its first word.

        That has ``hello_s`` seconds. Raises ConnectError, or what ``say`` makes of the way the
        process ends.
        """
        assert process.stdin and process.stdout and process.stderr
        self.name = name
        self.file_bytes = 0
        self._process = process
        self._say = say
        self._to = process.stdin.fileno()
        os.set_blocking(self._to, False)
        self._ear = _Ear(process.stdout.fileno())
        self._words = b""
        self._inbox: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING)
        self._closed = threading.Event()
        self._sending = threading.RLock()
        self._death: DeviceError | None = None
        self._threads = [
            threading.Thread(target=work, daemon=True)
            for work in (self._read, self._listen, self._ping)
        ]
        self._ready = threading.Event()
        for thread in self._threads:
            thread.start()
        try:
            source = resources.files("edgekit").joinpath("board_agent.py").read_bytes()
            self._write(b"%d\n" % len(source) + source)
            self._await_hello(hello_s)
        except BaseException:
            self.close()
            raise

    @property
    def heard_s(self) -> float:
        """When the device was last heard, in the seconds of ``time.monotonic``."""
        return self._ear.heard_s

    def _await_hello(self, hello_s: float) -> None:
        deadline = time.monotonic() + hello_s
        while not self._ready.wait(0.05):
            if not self._threads[0].is_alive():
                raise self._lost()
            if time.monotonic() > deadline:
                raise ConnectError(
                    f"{self.name} gave no answer within {hello_s:.0f} s",
                    hint="is it the right host, and is the board busy?",
                )

    # Out

    def ask(self, message: dict[str, Any]) -> Any:
        """The answer to one request. Raises TransferError, RemoteCommandError, ConnectError."""
        self.send(message)
        return self.answer()

    def answer(self) -> Any:
        """The next answer to an earlier ``send``."""
        while True:
            found = self.message(timeout_s=1.0)
            if found is not None and "value" in found:
                return found["value"]
            if found is not None:
                raise self.refusal(found)

    def send(self, message: dict[str, Any], data: bytes = b"") -> None:
        """One frame, ``data`` behind it. Raises ConnectError."""
        body = message | {"size": len(data)} if data else message
        self._write(json.dumps(body).encode() + b"\n" + data)

    def _write(self, frame: bytes) -> None:
        view = memoryview(frame)
        poll = select.poll()
        poll.register(self._to, select.POLLOUT)
        with self._sending:
            while view:
                self._check_alive()
                if not poll.poll(500):
                    self._check_silence()
                    continue
                try:
                    view = view[os.write(self._to, view) :]
                except BlockingIOError:
                    continue
                except (BrokenPipeError, OSError):
                    raise self._lost() from None

    def _ping(self) -> None:
        """The agent ends when it hears nothing: this says that we live."""
        while not self._closed.wait(_PING_S):
            if self._ready.is_set():
                try:
                    self.send({"do": "ping"})
                except DeviceError:
                    return  # whoever asks next will hear of it

    # In

    def message(self, timeout_s: float) -> dict[str, Any] | None:
        """The next frame, its bytes under "data"; None if there is none in ``timeout_s`` seconds.

        Raises ConnectError when the line is dead, or silent for too long.
        """
        self._check_alive()
        try:
            found = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            self._check_silence()
            return None
        if found is None:
            raise self._lost()
        return found

    def refusal(self, message: dict[str, Any]) -> DeviceError:
        """The error that a frame speaks of."""
        kind = _REFUSALS.get(str(message.get("error")), ConnectError)
        text, hint = message.get("message"), message.get("hint")
        if not isinstance(text, str) or not isinstance(hint, str | None):
            return ConnectError(f"{self.name} answers what nobody asked")
        return kind(f"{self.name}: {printable(text)}", hint=hint and printable(hint))

    def _read(self) -> None:
        """In a thread: frames into the inbox, None at the end."""
        stream = io.BufferedReader(self._ear, 1 << 16)
        try:
            noise = 0
            while (line := stream.readline(_LINE_BYTES)) != HELLO:
                noise += len(line)
                if not line or noise > _NOISE_BYTES:
                    return
            self._ready.set()
            while line := stream.readline(_LINE_BYTES):
                message = json.loads(line)
                size = message.get("size", 0)
                if type(size) is not int or not 0 <= size <= _DATA_BYTES:
                    return
                message["data"] = stream.read(size)
                if "beat" not in message:
                    self._offer(message)
        except (OSError, ValueError, AttributeError, RecursionError):
            pass  # no JSON, or no object: a line that lies is as good as none
        finally:
            self._offer(None)

    def _offer(self, message: dict[str, Any] | None) -> None:
        while not self._closed.is_set():
            try:
                return self._inbox.put(message, timeout=0.2)
            except queue.Full:
                continue

    def _listen(self) -> None:
        """In a thread: the last words on stderr."""
        assert self._process.stderr is not None
        descriptor = self._process.stderr.fileno()
        try:
            while piece := os.read(descriptor, 1 << 12):
                self._words = (self._words + piece)[-_WORDS_BYTES:]
        except OSError:
            pass

    # Death

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death
        if self._closed.is_set():
            raise ConnectError(f"the connection to {self.name} was closed")

    def _check_silence(self) -> None:
        self._check_alive()
        if self._ready.is_set() and time.monotonic() - self._ear.heard_s > _SILENCE_S:
            self._death = ConnectError(
                f"{self.name} has been silent for {_SILENCE_S:g} s",
                hint="is the board still on, and in this network? What arrived there is kept",
            )
            self.close()
            raise self._death

    def _lost(self) -> DeviceError:
        """Why the line is dead; it is closed then."""
        if self._death is None:
            code = _proc.wait(self._process, 1.0)
            if code is None:  # it speaks, but nonsense
                _proc.kill(self._process)
            self._threads[1].join(1)
            self._death = self._say(code, self._words.decode("utf-8", "replace"))
            self.close()
        return self._death

    def close(self) -> None:
        """End the agent, which ends all that it runs; then the process. Twice is fine."""
        if self._closed.is_set():
            return
        self._closed.set()
        assert self._process.stdin and self._process.stdout and self._process.stderr
        with self._sending:
            self._process.stdin.close()
        if _proc.wait(self._process, _CLOSE_S) is None:
            _proc.kill(self._process)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_CLOSE_S)
        self._process.stdout.close()
        self._process.stderr.close()


class _Ear(io.RawIOBase):
    """Reads a pipe, and knows when it last heard something."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.heard_s = time.monotonic()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = os.read(self._descriptor, len(buffer))
        self.heard_s = time.monotonic()
        buffer[: len(piece)] = piece
        return len(piece)


def printable(text: str) -> str:
    """A stranger's text on one line, without control characters, and of a sensible length."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:300].strip()
