"""The agent and the line to it, on this machine: what a board would do, without ssh."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd

import edgekit
from edgekit import _proc, board_link, target
from edgekit.board_agent import HELLO
from edgekit.errors import ConnectError, RemoteCommandError, TransferError, UsageError
from edgekit.target import Local, Target


@pytest.fixture
def here(home: Path) -> Iterator[Local]:
    with Local() as opened:
        yield opened


def _folder(root: Path, **files: bytes) -> Path:
    root.mkdir()
    for name, data in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return root


def test_this_machine_says_what_it_is(here: Local, home: Path) -> None:
    found = here.identify()
    assert found.home == str(home / "board")
    assert found.cores == os.cpu_count()
    assert found.python == sys.version.split()[0]
    assert found.architecture == os.uname().machine
    assert found.edgekit == edgekit.__version__
    assert found.free_bytes > 0 and (found.memory_bytes or 0) > 1 << 20


def test_a_tree_of_fixtures_plays_any_board(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = _folder(
        tmp_path / "pi",
        **{
            "proc__cpuinfo": b"processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\n"
            b"CPU part\t: 0xd0b\n",
            "proc__meminfo": b"MemTotal:        8244944 kB\n",
        },
    )
    (tree / "proc/device-tree").mkdir()
    (tree / "proc/device-tree/model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    monkeypatch.setenv("EDGEKIT_SYSROOT", str(tree))
    with Local() as here:
        found = here.identify()
    assert found.board == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.cpu == "Cortex-A76"
    assert found.features == ("NEON", "DOTPROD", "FP16_VECTOR_ARITHMETIC")
    assert found.memory_bytes == 8244944 << 10


def test_a_folder_arrives_whole_under_the_hash_of_what_it_holds(
    here: Local, tmp_path: Path
) -> None:
    big = os.urandom(3 << 20)
    folder = _folder(tmp_path / "art", model=big, sub__empty=b"", same=big)
    place = Path(here.put(folder, kind="artifacts"))
    assert place.parent == Path(here.identify().home) / "artifacts" and len(place.name) == 64
    assert (place / "model").read_bytes() == big == (place / "same").read_bytes()
    assert (place / "sub/empty").read_bytes() == b""
    assert here.sent_bytes == len(big), "equal files travel once"


def test_what_is_there_is_not_sent_again(here: Local, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    first = here.put(_folder(tmp_path / "a", model=data), kind="artifacts")
    assert here.put(tmp_path / "a", kind="artifacts") == first
    other = here.put(_folder(tmp_path / "b", model=data, note=b"new"), kind="artifacts")
    assert other != first
    assert here.sent_bytes == len(data) + len(b"new")


def test_a_file_alone_is_a_folder_with_it(here: Local, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"weights")
    place = here.put(tmp_path / "m.gguf", kind="wheels")
    assert (Path(place) / "m.gguf").read_bytes() == b"weights"


def _blob(home: Path, data: bytes) -> Path:
    blobs = home / "board" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    return blobs / f"{hashlib.sha256(data).hexdigest()}.partial"


def test_an_upload_goes_on_where_it_stopped(here: Local, home: Path, tmp_path: Path) -> None:
    data = os.urandom(2 << 20)
    _blob(home, data).write_bytes(data[: 1 << 20])
    here.put(_folder(tmp_path / "a", model=data), kind="artifacts")
    assert here.sent_bytes == 1 << 20


@pytest.mark.parametrize("damage", ["zeros", "longer"])
def test_what_a_power_cut_left_is_not_believed(
    here: Local, home: Path, tmp_path: Path, damage: str
) -> None:
    data = os.urandom(1 << 20)
    left = bytes(1 << 19) if damage == "zeros" else data + b"more"
    _blob(home, data).write_bytes(left)
    place = here.put(_folder(tmp_path / "a", model=data), kind="artifacts")
    assert (Path(place) / "model").read_bytes() == data


def test_a_file_that_changes_on_the_way_never_appears(
    here: Local, home: Path, tmp_path: Path
) -> None:
    folder = _folder(tmp_path / "a", model=os.urandom(2 << 20))

    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("upload") and not done:
            (folder / "model").write_bytes(os.urandom(2 << 20))

    with pytest.raises(TransferError, match="damaged"):
        here.put(folder, kind="artifacts", progress=progress)
    assert not list((home / "board").rglob("model"))
    assert not list((home / "board" / "blobs").iterdir())


def test_without_room_nothing_is_sent(
    here: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    with (folder / "model").open("wb") as file:
        file.truncate(here.identify().free_bytes + (1 << 30))  # sparse: it takes no room here
    monkeypatch.setattr("edgekit._fs.sha256_file", lambda path, on_bytes=None: "0" * 64)
    with pytest.raises(TransferError, match="are needed"):
        here.put(folder, kind="artifacts")
    assert here.sent_bytes == 0


@pytest.mark.parametrize("what", ["link", "nothing", "pipe"])
def test_only_plain_files_travel(here: Local, tmp_path: Path, what: str) -> None:
    folder = _folder(tmp_path / "a")
    if what == "link":
        (folder / "passwd").symlink_to("/etc/passwd")
    elif what == "pipe":
        os.mkfifo(folder / "pipe")
    with pytest.raises(UsageError):
        here.put(folder, kind="artifacts")


def test_a_program_gets_its_words_and_its_stdin_without_a_shell(here: Local) -> None:
    code = "import sys; print(sys.argv[1:], sys.stdin.read()); print('no', file=sys.stderr)"
    words = ["$(id)", "; rm -rf /", "'", "*", "-o ProxyCommand=x", "\n"]
    done = here.run([sys.executable, "-c", code, *words], stdin=b"in" * 100_000)
    assert done.code == 0
    assert done.stdout == f"{words} {'in' * 100_000}\n"
    assert done.stderr == "no\n"


def test_lines_are_heard_as_they_are_said(here: Local) -> None:
    heard: list[tuple[str, str, float]] = []
    code = "import time; print('one', flush=True); time.sleep(0.5); print('two')"
    here.run(
        [sys.executable, "-c", code],
        on_line=lambda stream, line: heard.append((stream, line, time.monotonic())),
    )
    assert [entry[:2] for entry in heard] == [("stdout", "one"), ("stdout", "two")]
    assert heard[1][2] - heard[0][2] > 0.3


def test_exit_codes_and_signals_come_back(here: Local) -> None:
    assert here.run([sys.executable, "-c", "raise SystemExit(7)"]).code == 7
    assert here.run([sys.executable, "-c", "import os; os.abort()"]).code == -6


def test_a_program_that_is_not_there_is_an_error_of_ours(here: Local) -> None:
    with pytest.raises(RemoteCommandError, match="cannot be started"):
        here.run(["/no/such/program"])
    assert here.run([sys.executable, "-c", ""]).code == 0, "and the line still works"


# A program whose child hides in a session of its own, as a bench's workers do.
_HIDDEN = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c',"
    " 'import time; time.sleep(600)', sys.argv[1]], start_new_session=True);"
    " print('started', flush=True); time.sleep(600)"
)


@pytest.mark.parametrize("end", ["close", "silence", "interrupt", "its own end"])
def test_nothing_that_was_started_lives_on(home: Path, end: str) -> None:
    word = f"edgekit-test-{os.getpid()}-{end}"
    with Local() as here:

        def on_line(stream: str, line: str) -> None:
            assert sshd.processes_with(word)
            if end == "close":
                here.close()
            if end == "interrupt":
                raise KeyboardInterrupt

        code = _HIDDEN if end != "its own end" else _HIDDEN.rpartition(";")[0]
        argv = [sys.executable, "-c", code, word]
        if end == "its own end":
            assert here.run(argv, on_line=on_line).code == 0
        else:
            kinds = {"silence": RemoteCommandError, "close": ConnectError}
            with pytest.raises(kinds.get(end, KeyboardInterrupt)):
                here.run(argv, on_line=on_line, silence_s=1 if end == "silence" else None)
        assert sshd.eventually(lambda: not sshd.processes_with(word))
        if end in ("silence", "interrupt"):
            assert here.run([sys.executable, "-c", ""]).code == 0, "the line still works"


def test_nothing_outside_its_home_is_removed(here: Local, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", model=b"x")
    place = here.put(folder, kind="artifacts")
    home = here.identify().home
    for path in (str(tmp_path), home + "/..", home + "-other", "/", home + "/../../" + folder.name):
        with pytest.raises(RemoteCommandError, match="nothing outside"):
            here.remove(path)
    assert (folder / "model").exists()
    here.remove(place)
    assert not os.path.exists(place)
    assert not list(Path(home, "blobs").iterdir()), "files that no place needs go too"
    here.remove(home)
    assert not os.path.exists(home)


def test_a_link_is_removed_and_not_what_it_points_to(here: Local, tmp_path: Path) -> None:
    kept = _folder(tmp_path / "kept", model=b"x")
    home = Path(here.identify().home)
    home.mkdir(parents=True)
    (home / "venv").symlink_to(kept)
    here.remove(f"{home}/venv")
    assert not (home / "venv").is_symlink() and (kept / "model").exists()


# A stranger in the place of an agent.

_GREETING = f"import sys; out = sys.stdout.buffer; out.write({HELLO!r}); out.flush();"


def _stranger(code: str) -> Target:
    def connect(hello_s: float) -> board_link.Link:
        process = _proc.start([sys.executable, "-c", code])
        return board_link.Link(
            "board", process, lambda code, words: ConnectError(f"it ended: {words}"), hello_s
        )

    return Target("board", connect)


@pytest.mark.parametrize(
    "answer",
    [
        b"no JSON\n",
        b"[1, 2]\n",
        b'{"value": {"home": "../x"}}\n',
        b'{"value": 5, "size": -1}\n',
        b'{"value": 5, "size": 99999999999}\n',
        b'{"error": ["x"], "message": {"a": 1}}\n',
        b'{"error": "SystemExit", "message": "\\u001b[2Jcleared"}\n',
        (b"[", 100_000),
        (b"x", 3 << 20),
        b"",
    ],
    ids=range(10),
)
def test_nonsense_from_a_board_is_an_error_of_ours(answer: bytes | tuple[bytes, int]) -> None:
    piece, times = answer if isinstance(answer, tuple) else (answer, 1)
    code = f"{_GREETING} sys.stdin.readline(); out.write({piece!r} * {times}); out.flush()"
    with _stranger(code) as board, pytest.raises((ConnectError, RemoteCommandError)) as caught:
        board.identify()
    assert caught.value.message.isprintable()


def test_what_a_login_script_prints_does_no_harm() -> None:
    source = Path(str(target.__file__)).with_name("board_agent.py")
    code = (
        "print('Welcome!', flush=True); import sys; b = sys.stdin.buffer;"
        f"exec(compile(b.read(int(b.readline())), {str(source)!r}, 'exec'))"
    )
    with _stranger(code) as board:
        assert board.identify().cores == os.cpu_count()


def test_a_board_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_link, "_SILENCE_S", 1.0)
    monkeypatch.setattr(board_link, "_CLOSE_S", 0.5)
    began = time.monotonic()
    with (
        _stranger(f"{_GREETING} import time; time.sleep(60)") as board,
        pytest.raises(ConnectError, match="silent"),
    ):
        board.identify()
    assert time.monotonic() - began < 10


def test_a_board_that_never_speaks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_HELLO_S", 0.5)
    monkeypatch.setattr(board_link, "_CLOSE_S", 0.5)
    with pytest.raises(ConnectError, match="no answer"):
        _stranger("import time; time.sleep(60)")


def test_an_agent_whose_other_side_fell_silent_ends_and_kills_its_programs(tmp_path: Path) -> None:
    word = f"edgekit-silent-{os.getpid()}"
    source = Path(str(target.__file__)).with_name("board_agent.py").read_text()
    (tmp_path / "agent.py").write_text(source.replace("PATIENCE_S = 25.0", "PATIENCE_S = 1.0"))
    agent = _proc.start([sys.executable, str(tmp_path / "agent.py")])
    assert agent.stdin is not None
    code = "import time; time.sleep(600)"
    request = f'{{"do": "run", "argv": ["{sys.executable}", "-c", "{code}", "{word}"], "cwd": "/"}}'
    agent.stdin.write(request.encode() + b"\n")
    assert sshd.eventually(lambda: bool(sshd.processes_with(word)))
    assert _proc.wait(agent, 10) == 0
    assert not sshd.processes_with(word)
