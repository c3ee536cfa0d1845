"""Children run fenced: in time, in memory, and never longer than their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgekit import _proc
from edgekit.errors import CorruptArtifactError, DeadlineError, EdgekitError, EngineCrashedError

CHILD = """
import os, time
from edgekit import _proc
from edgekit.errors import CorruptArtifactError

def add(a, b):
    print("engines write to stdout")
    _proc.report({"half": a})
    return a + b

def fail():
    raise CorruptArtifactError("broken", hint="mend it")

def foreign():
    raise KeyError("x")

def crash():
    os.abort()

def hang():
    time.sleep(600)

def tick():
    for _ in range(8):
        time.sleep(0.4)
        _proc.report("alive")
    return "done"

def borrow():
    import mistral_common

def eat():
    return len(bytearray(4 << 30))
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "child_module.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)

    def run(name: str, timeout_s: float = 60, **fields: Any) -> Any:
        arguments = fields.pop("arguments", {})
        return _proc.call(
            f"child_module:{name}", arguments, timeout_s=timeout_s, what="the work", **fields
        )

    return run


def test_the_answer_and_the_reports_come_back(call: Any) -> None:
    heard: list[Any] = []
    assert call("add", arguments={"a": 1, "b": 2}, on_report=heard.append) == 3
    assert heard == [{"half": 1}]


def test_our_errors_keep_class_message_and_hint(call: Any) -> None:
    with pytest.raises(CorruptArtifactError, match="broken") as caught:
        call("fail")
    assert caught.value.hint == "mend it"


def test_foreign_exceptions_and_crashes_become_ours(call: Any) -> None:
    with pytest.raises(EngineCrashedError, match="KeyError"):
        call("foreign")
    with pytest.raises(EngineCrashedError, match="SIGABRT"):
        call("crash")


def test_a_hang_ends_at_the_deadline(call: Any) -> None:
    started_s = time.monotonic()
    with pytest.raises(DeadlineError, match="the work took longer than 1 s"):
        call("hang", timeout_s=1)
    assert time.monotonic() - started_s < 5


def test_silence_is_bounded_but_work_is_not(call: Any) -> None:
    assert call("tick", silence_s=2.0) == "done"
    with pytest.raises(DeadlineError, match="gave no sign of life for 1 s"):
        call("hang", silence_s=1.0)


def test_nothing_is_imported_from_the_current_folder(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model repository may hold a module that some library tries to import.
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "mistral_common.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(repository)
    with pytest.raises(EngineCrashedError, match="ModuleNotFoundError"):
        call("borrow")
    assert not (repository / "ran").exists()


def test_memory_is_bounded(call: Any) -> None:
    with pytest.raises(EngineCrashedError, match="MemoryError"):
        call("eat", memory_bytes=1 << 30)


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import os, time\nfrom edgekit import _proc\n"
        "def sleep():\n    _proc.report(os.getpid())\n    time.sleep(600)\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from edgekit import _proc\n"
        "_proc.call('sleeper:sleep', {}, timeout_s=None, what='x',"
        " on_report=lambda pid: print(pid, flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    for _ in range(100):
        if _gone(child_pid):
            return
        time.sleep(0.05)
    os.kill(child_pid, signal.SIGKILL)
    pytest.fail("the child outlived its parent")


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_programs_run_without_a_shell() -> None:
    assert _proc.run(["echo", "$HOME; true"], timeout_s=10) == "$HOME; true\n"
    with pytest.raises(EdgekitError, match="ended with exit code 3"):
        _proc.run(["sh", "-c", "exit 3"], timeout_s=10)
    with pytest.raises(EdgekitError, match="cannot start"):
        _proc.run(["no-such-program"], timeout_s=10)
    with pytest.raises(DeadlineError):
        _proc.run(["sleep", "5"], timeout_s=0.2)


# What a library registers to run whenever Python forks, as logging and torch do; this one takes so
# long that the signal comes meanwhile.
FORKS = """
import os, signal, sys
from edgekit import _proc

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
os.register_at_fork(before=lambda: os.kill(os.getpid(), getattr(signal, sys.argv[2])))
if sys.argv[1] == "call":
    _proc.call("json:dumps", {"obj": 1}, timeout_s=60, what="a call")
else:
    _proc.Worker("edgekit._proc:_answer", timeout_s=5, what="a worker")
print("it went on")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("how", ["call", "worker"])
def test_a_signal_that_comes_while_a_child_is_forked_is_not_lost(how: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORKS, how, name], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == (-signal.SIGINT if name == "SIGINT" else 143), done.stderr
