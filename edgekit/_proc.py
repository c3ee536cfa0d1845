"""Child processes with limits: time, memory, and no shell.

Knows nothing of what the children compute. ``call`` is the fence around engines that may crash or
hang on a hostile file: a function by name, JSON in, JSON out.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

from edgekit import errors
from edgekit.errors import DeadlineError, EdgekitError, EngineCrashedError

_LIBC = ctypes.CDLL(None)


# -P: never import from the current folder, which may be a stranger's model repository.
_PYTHON = (sys.executable, "-P", "-c")
_PR_SET_PDEATHSIG = 1
_report_pipe: BinaryIO | None = None


def _own_group() -> None:
    """In the child, before exec: a process group of its own, and no core dumps."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _prepare(memory_bytes: int | None) -> None:
    """In the child, before exec: a group of its own, limits, and death when its caller dies."""
    _own_group()
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Inside the block signals with handlers of Python's are noted; behind it they are handled.

    While Python forks it runs hooks of its libraries (logging, torch), and what a handler raises in
    one of those is printed and lost: Ctrl-C would be ignored. A large process forks for long.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone runs handlers
        yield
        return
    noted: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: h for number in numbers if callable(h := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for came in noted:
            signal.raise_signal(came)


def call(
    function: str,
    arguments: dict[str, Any],
    *,
    timeout_s: float | None = None,
    silence_s: float | None = None,
    memory_bytes: int | None = None,
    what: str,
    on_report: Callable[[Any], None] | None = None,
) -> Any:
    """Run ``"module:function"`` with keyword arguments in a fresh Python, and return its answer.

    Arguments and answer must be JSON. An EdgekitError raised there is raised here again with its
    class, message and hint. A death by signal or a foreign exception becomes EngineCrashedError, a
    run longer than ``timeout_s`` seconds, or ``silence_s`` seconds without a report, becomes
    DeadlineError; ``what`` names the work in both.
    ``memory_bytes`` bounds the child's address space. ``on_report`` hears what the child says
    through ``report`` while it works. The child never outlives this process.
    """
    read_end, write_end = os.pipe()
    code = _python("edgekit._proc:_answer")
    request = {"function": function, "arguments": arguments, "fd": write_end}
    process: subprocess.Popen[bytes] | None = None
    answer: dict[str, Any] | None = None
    limit_s = timeout_s if silence_s is None else silence_s
    try:
        with _signals_wait():
            process = subprocess.Popen(
                [*_PYTHON, code],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(write_end,),
                preexec_fn=lambda: _prepare(memory_bytes),
            )
        os.close(write_end)
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request).encode())
                process.stdin.close()
            except BrokenPipeError:
                pass  # it died at once: its exit code tells below
            for line in _lines(pipe, limit_s, each=silence_s is not None):
                message = json.loads(line)
                if "report" not in message:
                    answer = message
                elif on_report:
                    on_report(message["report"])
        if answer is None:
            process.wait()
    except TimeoutError:
        how = "took longer than" if silence_s is None else "gave no sign of life for"
        raise DeadlineError(f"{what} {how} {limit_s:g} s and was stopped") from None
    finally:
        if process is not None:
            kill(process)
    if answer is None:
        how = describe_exit(process.returncode)
        raise EngineCrashedError(f"{what} failed: the engine's process {how}")
    return value_of(answer)


def value_of(answer: dict[str, Any]) -> Any:
    """What ``answer_of`` was made of: its value returned, its error raised."""
    if "value" in answer:
        return answer["value"]
    kind = getattr(errors, str(answer.get("error")), None)
    if kind is errors.MissingExtraError:
        raise errors.MissingExtraError(str(answer.get("extra")), missing=str(answer.get("missing")))
    if not (isinstance(kind, type) and issubclass(kind, EdgekitError)):
        kind = EngineCrashedError
    raise kind(str(answer.get("message")), hint=answer.get("hint"))


def answer_of(work: Callable[[], Any]) -> dict[str, Any]:
    """The value of ``work()``, or its error, as JSON to send to another process."""
    try:
        return {"value": work()}
    except EdgekitError as error:
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        if isinstance(error, errors.MissingExtraError):
            answer |= {"extra": error.extra, "missing": error.missing}
        return answer
    except Exception as error:  # the fence: whatever a lower library raises ends as one of ours
        words = f"the engine failed: {type(error).__name__}: {error}"
        return {"error": "EngineCrashedError", "message": words, "hint": None}


def _python(function: str) -> str:
    """Code that calls ``"module:function"`` in a fresh Python.

    sys.path travels along, so that a checkout that was never installed works in the child too.
    """
    module, _, name = function.partition(":")
    paths = [path for path in sys.path if path]
    return f"import sys; sys.path[:0] = {paths!r}; from {module} import {name}; {name}()"


class Worker:
    """A child that stays: it reads one JSON line after the other and answers each with one.

    ``"module:function"`` runs there without arguments; its first line says that it is ready. It
    must end when its stdin ends, for then this process is gone. (A death signal as in ``call``
    would fire when the thread ends that started it, while other threads may still ask.)
    """

    def __init__(self, function: str, *, timeout_s: float, what: str) -> None:
        """Raises EngineCrashedError if the child is not ready within ``timeout_s`` seconds."""
        with _signals_wait():  # the child ends with its stdin, should one raise here
            self._process = subprocess.Popen(
                [*_PYTHON, _python(function)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                preexec_fn=_own_group,
            )
        if self._line(timeout_s) is None:
            self.close()
            raise EngineCrashedError(f"{what} did not start")

    def ask(self, request: Any, *, timeout_s: float) -> Any:
        """The answer to ``request``; None, for good, if the child dies or takes too long."""
        assert self._process.stdin is not None
        try:
            write_all(self._process.stdin, json.dumps(request).encode() + b"\n")
        except (BrokenPipeError, ValueError):
            return None
        line = self._line(timeout_s)
        if line is None:
            self.close()
            return None
        return json.loads(line)

    def _line(self, timeout_s: float) -> bytes | None:
        assert self._process.stdout is not None
        try:
            return next(_lines(self._process.stdout, timeout_s), None)
        except TimeoutError:
            return None

    def close(self) -> None:
        """End the child; closing twice is fine."""
        if self._process.returncode is None:
            kill(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _lines(
    pipe: BinaryIO | io.FileIO | IO[bytes], timeout_s: float | None, *, each: bool = False
) -> Iterator[bytes]:
    """Whole lines until the writer closes; TimeoutError once ``timeout_s`` seconds have passed.

    With ``each`` the time starts anew whenever something was read.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    rest = b""
    poll = select.poll()  # select() refuses descriptors above 1023
    poll.register(pipe, select.POLLIN)
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not poll.poll(None if left is None else left * 1e3):
            raise TimeoutError
        piece = pipe.read(1 << 16)
        if not piece:
            return
        if each and timeout_s is not None:
            deadline = time.monotonic() + timeout_s
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def report(message: Any) -> None:
    """Inside a child of ``call``: tell the parent something (JSON). Elsewhere: nothing happens."""
    if _report_pipe is not None:
        write_all(_report_pipe, json.dumps({"report": message}).encode() + b"\n")


def _answer() -> None:
    """The child's side of ``call``."""
    global _report_pipe
    request = json.loads(sys.stdin.buffer.read())
    module, _, name = request["function"].partition(":")
    _report_pipe = os.fdopen(request["fd"], "wb", buffering=0)
    answer = answer_of(
        lambda: getattr(importlib.import_module(module), name)(**request["arguments"])
    )
    write_all(_report_pipe, json.dumps(answer).encode() + b"\n")
    # Engines may crash in their own clean-up; the answer is out, so leave without it.
    os._exit(0)


def write_all(pipe: BinaryIO | IO[bytes], data: bytes) -> None:
    """Write until all is out: an unbuffered pipe takes what it has room for."""
    while data:
        data = data[pipe.write(data) :]


def kill(process: subprocess.Popen[Any]) -> None:
    """End a child and its whole process group, and reap it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def describe_exit(code: int) -> str:
    """``-11`` -> "was killed by SIGSEGV"; ``1`` -> "ended with exit code 1"."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def run(argv: Sequence[str], *, timeout_s: float, input_text: str | None = None) -> str:
    """Run a program without a shell and return its stdout.

    Raises DeadlineError after ``timeout_s`` seconds, EdgekitError when it cannot be started or
    ends with an exit code other than 0.
    """
    try:
        done = subprocess.run(
            list(argv), input=input_text, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise DeadlineError(f"{argv[0]} took longer than {timeout_s:g} s") from None
    except OSError as error:
        raise EdgekitError(f"cannot start {argv[0]}: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise EdgekitError(f"{argv[0]} {describe_exit(done.returncode)}: {last}")
    return done.stdout


Process = subprocess.Popen[bytes]


def start(argv: Sequence[str], *, env: dict[str, str] | None = None) -> Process:
    """A program with three unbuffered pipes, in a session of its own: no Ctrl-C reaches it.

    ``env`` is added to this process's. Raises OSError when it cannot be started.
    """
    return subprocess.Popen(
        list(argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=os.environ | (env or {}),
        start_new_session=True,
    )


def wait(process: Process, timeout_s: float) -> int | None:
    """The exit code; None if the program still runs after ``timeout_s`` seconds."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
