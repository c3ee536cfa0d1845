"""bench, run, eval and probe on a board behind a real sshd, with the real SmolLM2."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reports
import sshd

import edgekit
from edgekit import _fs, evaluate, remote, report
from edgekit.errors import ConnectError, LoadError, RemoteCommandError, UsageError
from edgekit.runtime import GenerateParams
from edgekit.target import Local, open_target

TINY = ("-t", "1", "-p", "16", "-n", "8", "-r", "2", "--no-probe", "--no-session")


_PI5 = {
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0b\n" * 4,
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/meminfo": "MemTotal: 8244944 kB\nMemAvailable: 7000000 kB\n",
    "sys/class/thermal/thermal_zone0/temp": "55000\n",
    "usr/bin/vcgencmd": "#!/bin/sh\necho '  A_A current(0)=1.5A\n  A_V volt(8)=2.0V'\n",
}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Board]:
    """A board that a tree of files makes a Raspberry Pi 5; it keeps what was once sent."""
    folder = tmp_path_factory.mktemp("board")
    for name, text in _PI5.items():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_text(text)
    (folder / "tree/usr/bin/vcgencmd").chmod(0o755)
    with (
        pytest.MonkeyPatch.context() as patch,
        sshd.board(folder, patch, EDGEKIT_SYSROOT=f"{folder}/tree") as made,
    ):
        yield made


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sshd.Board]:
    """A board without edgekit."""
    with sshd.board(tmp_path, monkeypatch) as made:
        (made.home / "venv").unlink()
        yield made


def _works(board: sshd.Board) -> bool:
    """Whether edgekit runs on the board now."""
    return bool(sshd.processes_with(f"{board.home}/venv/bin/python"))


def test_a_bench_on_a_board_is_the_same_bench(
    board: sshd.Board, cli: Callable[..., Any], smollm2_gguf: Path, tmp_path: Path
) -> None:
    done = cli("bench", smollm2_gguf, "--device", "board", *TINY, "--out", "r.json")
    assert done.code == 0, done.stderr
    found = report.read(tmp_path / "r.json")
    assert found.device == "board" and found.machine.emulated is False
    assert [(row.test, row.model) for row in found.rows] == [
        ("pp16", smollm2_gguf.name),
        ("tg8", smollm2_gguf.name),
    ]
    assert found.models[0].sha256 == _fs.sha256_file(smollm2_gguf)
    assert (found.machine.board, found.machine.cpu) == (
        "Raspberry Pi 5 Model B Rev 1.0",
        "Cortex-A76",
    )
    assert found.profile == "rpi5" and len(found.rows[0].predicted_tok_s) == 3
    assert found.moments[0].temperature_c == 55.0
    assert found.moments[0].power_w == pytest.approx(3.0 * 1.1451 + 0.5879, abs=1e-3)
    assert "upload to board" in done.stderr and "measure ..." in done.stderr
    assert not _works(board)


@pytest.mark.slow
def test_devices_side_by_side_make_one_table_and_one_failure_spoils_no_other(
    board: sshd.Board, cli: Callable[..., Any], smollm2_gguf: Path, tmp_path: Path
) -> None:
    with (board.folder / "config").open("a") as config:
        config.write("Host off\nHostName 127.0.0.1\nPort 1\n")
    done = cli("bench", smollm2_gguf, "--device", "board,off,local", *TINY, "--out", "r.csv")
    assert done.code == 8
    lines = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert lines == ["device", "board", "board", "local", "local"]
    assert "off: no connection to off" in done.stderr
    assert (tmp_path / "r-board.csv").exists() and (tmp_path / "r-local.csv").exists()


def test_an_answer_from_a_board_is_the_same_answer(
    board: sshd.Board, cli: Callable[..., Any], smollm2_gguf: Path
) -> None:
    words = (
        "run",
        smollm2_gguf,
        "Name a colour: $(id) `id`",
        "--max-tokens",
        "8",
        "--threads",
        "1",
    )
    here, there = cli(*words), cli(*words, "--device", "board")
    assert there.code == 0, there.stderr
    assert here.stdout == there.stdout
    as_json = json.loads(cli(*words, "--device", "board", "--json").stdout)
    assert as_json["text"] + "\n" == here.stdout and len(as_json["tokens"]) <= 8


@pytest.mark.slow
def test_an_embedding_from_a_board_is_the_same_vector(
    board: sshd.Board, smollm2_gguf: Path
) -> None:
    with open_target("board") as there, Local() as here:
        vectors = [
            remote.embed_on(target, smollm2_gguf, "a", pooling="mean", fields={"n_threads": 1})
            for target in (there, here)
        ]
    assert vectors[0] == vectors[1] and len(vectors[0]) == 576


def test_an_evaluation_on_a_board_is_the_same_evaluation(
    board: sshd.Board, smollm2_gguf: Path
) -> None:
    text = evaluate.read_text(None)[:4000]
    how: dict[str, Any] = {"n_ctx": 64, "chunks": 2, "threads": 1}
    here = evaluate.perplexity(smollm2_gguf, text, **how)
    with open_target("board") as there:
        found = remote.perplexity_on(there, smollm2_gguf, text, **how)
    assert found.value == here.value and found.tokens == here.tokens


@pytest.mark.slow
def test_a_comparison_on_a_board_brings_both_models_over(
    board: sshd.Board, smollm2_gguf: Path
) -> None:
    text = evaluate.read_text(None)[:4000]
    how: dict[str, Any] = {"n_ctx": 64, "chunks": 2, "threads": 1}
    with open_target("board") as there:
        found = remote.compare_on(there, smollm2_gguf, smollm2_gguf, text, **how)
    assert found.max_kl == 0.0 and len(found.token_kl) == found.tokens


def test_what_edgekit_raises_there_is_raised_here(board: sshd.Board, smollm2_gguf: Path) -> None:
    with open_target("board") as there:
        given: dict[str, Any] = {"params": GenerateParams(), "on_piece": print}
        with pytest.raises(UsageError, match="board: ") as caught:
            remote.run_on(there, smollm2_gguf, "x", fields={"kv_type": "q9"}, **given)
        assert "q9" in caught.value.message
        broken = board.folder / "broken.gguf"
        broken.write_bytes(smollm2_gguf.read_bytes()[: 1 << 20])
        with pytest.raises((LoadError, edgekit.EdgekitError), match="board: "):
            remote.run_on(there, broken, "x", fields={}, **given)


def test_a_board_without_edgekit_or_with_another_version_says_how_to_set_it_up(
    bare: sshd.Board,
) -> None:
    with open_target("board") as there:
        with pytest.raises(RemoteCommandError, match="has no edgekit") as caught:
            remote.probe_on(there)
        assert caught.value.hint == "edgekit devices setup board"
        dist = bare.home / "venv/lib/python3.11/site-packages/edgekit_deploy-9.9.dist-info"
        dist.mkdir(parents=True)
        with pytest.raises(RemoteCommandError, match=r"has edgekit 9\.9"):
            remote.probe_on(there)


@pytest.mark.parametrize(
    "fault",
    [
        "drop",
        pytest.param("reboot", marks=pytest.mark.slow),
        pytest.param("interrupt", marks=pytest.mark.slow),
    ],
)
def test_a_bench_that_ends_in_the_middle_leaves_nothing_running(
    board: sshd.Board, smollm2_gguf: Path, fault: str
) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "measure":
            if fault == "interrupt":
                raise KeyboardInterrupt
            board.cut() if fault == "drop" else board.signal(signal.SIGKILL)

    began = time.monotonic()
    expected = KeyboardInterrupt if fault == "interrupt" else ConnectError
    with pytest.raises(expected):
        edgekit.bench(
            smollm2_gguf,
            device="board",
            probe=False,
            sessions=False,
            progress=progress,
            threads=(1,),
            prompts=(),
            answers=(2000,),
        )
    assert time.monotonic() - began < 60
    # Its workers, which have sessions of their own, run that Python too.
    assert sshd.eventually(lambda: not _works(board))


@pytest.mark.parametrize("devices", ["board", pytest.param("board,board2", marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_bench_there_and_here_within_five_seconds(
    board: sshd.Board, smollm2_gguf: Path, devices: str
) -> None:
    same = (board.folder / "config").read_text().replace("Host board\n", "Host board board2\n")
    (board.folder / "config").write_text(same)
    words = ["bench", str(smollm2_gguf), "--device", devices, "--no-probe", "-n", "4000"]
    with subprocess.Popen(
        [sys.executable, "-m", "edgekit", *words], stderr=subprocess.PIPE, text=True
    ) as process:
        assert sshd.eventually(lambda: _works(board), within_s=60)
        process.send_signal(signal.SIGINT)
        _, words_on_stderr = process.communicate(timeout=10)
    assert process.returncode == 130 and words_on_stderr.endswith("stopped\n")
    assert sshd.eventually(lambda: not _works(board), within_s=5)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_bench_that_is_cut_at_fifty_moments_leaves_nothing_and_goes_on_when_repeated(
    board: sshd.Board, smollm2_gguf: Path
) -> None:
    """From the first byte of the model to the last repetition; then the same bench once more."""
    dice = random.Random(4)
    sweep: dict[str, Any] = {"threads": (1,), "prompts": (16,), "answers": (8,), "repetitions": 2}
    sweep |= {"probe": False, "sessions": False}
    size, cuts = smollm2_gguf.stat().st_size, 0
    for _ in range(50):
        with open_target("board") as there:
            there.remove(str(board.home / "artifacts"))
            cut = threading.Timer(dice.uniform(0, 6), board.cut)
            cut.start()
            began = time.monotonic()
            try:
                remote.bench_on(there, smollm2_gguf, **sweep)
            except ConnectError:
                cuts += 1
            assert time.monotonic() - began < 30
            cut.cancel()
            sent = there.sent_bytes
        assert sshd.eventually(lambda: not _works(board))
        with open_target("board") as there:
            found = remote.bench_on(there, smollm2_gguf, **sweep)
            assert sent + there.sent_bytes <= 1.05 * size
        assert len(found.rows) == 2 and found.models[0].sha256 == _fs.sha256_file(smollm2_gguf)
    assert cuts > 10  # the others hit the upload, which goes on by itself, or came too late


_JUMPING = """
import itertools, time
real, jumps = time.time, itertools.cycle((0, -86400, 86400 * 365))
time.time = lambda: real() + next(jumps)
"""


@pytest.mark.slow
def test_a_bench_minds_no_clock_that_jumps_here_or_there(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A board without a battery learns the date when the network tells it."""
    (tmp_path / "jumping").mkdir()
    (tmp_path / "jumping/sitecustomize.py").write_text(_JUMPING)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    began = time.monotonic()
    with (
        sshd.board(tmp_path, monkeypatch, PYTHONPATH=f"{tmp_path}/jumping"),
        open_target("board") as there,
    ):
        code = "import time; print(time.time() > time.time() - 1, time.time() < time.time())"
        venv = f"{there.identify().home}/venv/bin/python"
        assert "False" in there.run([venv, "-c", code]).stdout, "its clock does jump"
        sweep: dict[str, Any] = {"threads": (1,), "prompts": (16,), "answers": (8,)}
        found = remote.bench_on(there, smollm2_gguf, probe=False, repetitions=2, **sweep)
    spent_s = time.monotonic() - began
    assert all(0 < seconds < spent_s for row in found.rows for seconds in row.samples_s)
    assert all(0 < session.warm_load_s < spent_s for session in found.sessions)
    assert all(0 <= moment.at_s < spent_s for moment in found.moments)


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("bench", "MODEL", "--profile"), "--profile looks into the engine", "on the device"),
        (("bench", "--compare", "MODEL", "MODEL", "OTHER"), "looks at one device", "--device a"),
        (("bench", "--compare", "r.json", "MODEL"), "measures both sides", "--out new.json"),
        (("eval", "MODEL", "--tasks", "q.jsonl"), "--device means nothing", "leave out --device"),
        (("eval", "MODEL", "--needle"), "--device means nothing", "leave out --device"),
        (("eval", "MODEL", "--sensitivity"), "--device means nothing", "leave out --device"),
    ],
    ids=["profile", "two devices", "an old report", "tasks", "needle", "sensitivity"],
)
def test_what_a_device_is_not_asked_for_says_why_and_what_to_do(
    cli: Callable[..., Any],
    smollm2_gguf: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
    hint: str,
) -> None:
    (tmp_path / "r.json").write_bytes(reports.made().to_json())
    given = [str(smollm2_gguf) if word == "MODEL" else word for word in words if word != "OTHER"]
    done = cli(*given, "--device", "a,b" if "OTHER" in words else "a")
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr and hint in done.stderr


def test_a_chat_on_a_terminal_stays_here(smollm2_gguf: Path) -> None:
    ours, theirs = os.openpty()
    words = ["run", str(smollm2_gguf), "--device", "a"]
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", *words], stdin=theirs, capture_output=True, text=True
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 2 and "--device answers one PROMPT" in done.stderr
    assert "edgekit run" in done.stderr


@pytest.mark.slow
def test_two_models_are_compared_on_a_board(
    board: sshd.Board, cli: Callable[..., Any], smollm2_gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "b.gguf").write_bytes(smollm2_gguf.read_bytes())
    words = ("-t", "1", "-p", "16", "-n", "8", "-r", "3", "--no-session")
    done = cli("bench", "--compare", smollm2_gguf, "b.gguf", "--device", "board", *words)
    assert done.code == 0, done.stderr
    assert "measured together, in pairs" in done.stdout and "tg8" in done.stdout


def test_a_device_that_answers_nonsense_is_an_error_of_ours(bare: sshd.Board) -> None:
    fake = bare.home / "venv/bin/python"
    fake.parent.mkdir(parents=True)
    dist = f"edgekit_deploy-{edgekit.__version__}.dist-info"
    (bare.home / "venv/lib/python3.11/site-packages" / dist).mkdir(parents=True)
    for answer in (
        "no json",
        '{"value": {"rows": []}}',
        '["value"]',
        '{"error": "SystemExit"}',
        "",
    ):
        fake.write_text(f"#!/bin/sh\ncat >/dev/null; echo '{answer}'\n")
        fake.chmod(0o755)
        with open_target("board") as there, pytest.raises(edgekit.EdgekitError) as caught:
            remote.probe_on(there)
        assert caught.value.message.isprintable()


@pytest.mark.slow
def test_a_probe_measures_and_saves_what_the_next_plan_takes(
    board: sshd.Board, cli: Callable[..., Any], home: Path
) -> None:
    began = time.monotonic()
    done = cli("devices", "probe", "board", "--save", "--json")
    assert done.code == 0, done.stderr
    assert time.monotonic() - began < 60
    body = json.loads(done.stdout)
    assert {row["unit"] for row in body["figures"]} >= {"GB/s", "GFLOP/s"}
    assert (home / "config/profiles/board.yaml").exists()
    assert cli("devices", "show", "board").code == 0


def test_a_device_is_added_listed_and_removed(cli: Callable[..., Any]) -> None:
    assert (
        cli("devices", "add", "kitchen", "--ssh", "pi@kitchen.local", "--profile", "rpi5").code == 0
    )
    assert "pi@kitchen.local" in cli("devices", "list").stdout
    assert cli("devices", "add", "bad", "--ssh=-oProxyCommand=id").code == 2
    assert cli("devices", "add", "x", "--ssh", "x", "--profile", "rpi6").code == 2
    assert cli("devices", "remove", "kitchen").code == 0
    assert cli("devices", "remove", "kitchen").code == 2


def test_local_is_identified_without_ssh(cli: Callable[..., Any]) -> None:
    done = cli("devices", "probe", "local", "--identify", "--json")
    body = json.loads(done.stdout)
    assert body["board"]["edgekit"] == edgekit.__version__
    assert body["board"]["cores"] == os.cpu_count()
