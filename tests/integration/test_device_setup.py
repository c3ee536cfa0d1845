"""`devices setup` with real wheels, real pip and the agent of boards; the board is this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import board_wheels
import pytest
import sshd

from edgekit import __version__, device_setup, wheelhouse
from edgekit.device_setup import SetupReport
from edgekit.errors import DeviceError
from edgekit.target import Local, Target
from edgekit.wheelhouse import Wheelhouse


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real wheels of all that a board needs, for this machine."""
    return board_wheels.real(tmp_path_factory.mktemp("wheels") / "house")


@pytest.fixture
def board(home: Path) -> Iterator[Target]:
    """This machine as a board, with nothing on it."""
    with Local() as target:
        yield target


def _edgekit(report: SetupReport, *arguments: str) -> str:
    """What the edgekit over there prints."""
    argv = [f"{report.environment}/bin/edgekit", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=True, cwd="/").stdout


def _below(folder: Path, kind: str) -> list[str]:
    return sorted(path.name for path in (folder / kind).iterdir())


def test_a_bare_board_becomes_a_working_one_and_bare_again(
    board: Target, wheels: Path, home: Path, smollm2_gguf: Path
) -> None:
    place = home / "board"
    house = wheelhouse.read(wheels)
    chosen = house.chosen(*_facts(board))

    planned = device_setup.setup(board, house, dry_run=True)
    assert planned.dry_run and planned.upload_bytes == sum(wheel.size_bytes for wheel in chosen)
    assert not place.exists()

    # Interrupted between installing and proving: nothing is in use, and the wheels stay.
    with pytest.raises(KeyboardInterrupt):
        device_setup.setup(board, house, progress=_interrupt_at(2))
    assert not os.path.lexists(place / "venv")

    done = device_setup.setup(board, house)
    assert done.sent_bytes == 0 and not done.already
    assert done.backend is not None and done.backend in _edgekit(done, "doctor")
    assert _edgekit(done, "--version").strip().endswith(__version__)
    inspected = json.loads(_edgekit(done, "inspect", "--json", str(smollm2_gguf)))
    assert inspected

    again = device_setup.setup(board, house)
    assert again.already and again.sent_bytes == 0 and again.environment == done.environment

    removed = device_setup.remove(board)
    assert removed.home == str(place) and not place.exists()


def test_a_newer_edgekit_takes_the_place_of_an_older_one_only_when_it_is_proven(
    board: Target, wheels: Path, home: Path, tmp_path: Path
) -> None:
    place = home / "board"
    first = device_setup.setup(board, wheelhouse.read(wheels))
    in_use = os.readlink(place / "venv")

    broken = _changed(wheels, tmp_path / "broken", "llama_cpp_python", _without_libraries)
    with pytest.raises(DeviceError, match="does not load"):
        device_setup.setup(board, broken)
    assert os.readlink(place / "venv") == in_use
    assert _edgekit(first, "--version")

    newer = _changed(wheels, tmp_path / "newer", "edgekit_deploy", _with_a_note)
    second = device_setup.setup(board, newer)
    own = next(wheel for wheel in newer.wheels if wheel.name == "edgekit-deploy")
    assert second.sent_bytes == own.size_bytes, "the others were there"
    assert os.readlink(place / "venv") != in_use
    assert len(_below(place, "venvs")) == len(_below(place, "wheels")) == 1
    # Neither the old nor the broken wheel takes room.
    assert len(_below(place, "blobs")) == len(second.wheels)


def test_a_board_without_room_is_told_before_anything_is_sent(
    board: Target, home: Path, tmp_path: Path
) -> None:
    house = wheelhouse.read(_huge(tmp_path / "house"))
    with pytest.raises(DeviceError, match="MB free, the setup needs"):
        device_setup.setup(board, house)
    assert board.sent_bytes == 0 and not (home / "board").exists()


def test_the_command_says_what_it_would_do_over_ssh(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., object]
) -> None:
    (tmp_path / "there").mkdir()
    with sshd.board(tmp_path / "there", monkeypatch) as there:
        before = sorted(there.home.iterdir())
        ran = cli("devices", "setup", "board", "--wheelhouse", wheels, "--dry-run", "--json")
        assert ran.code == 0, ran.stderr  # type: ignore[attr-defined]
        planned = json.loads(ran.stdout)  # type: ignore[attr-defined]
        assert planned["dry_run"] and planned["upload_bytes"] > 0
        assert sorted(there.home.iterdir()) == before


def _facts(board: Target) -> tuple[str, str, str | None]:
    facts = board.identify()
    return facts.architecture, facts.python, facts.glibc


def _interrupt_at(step: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "set up" and done == step:
            raise KeyboardInterrupt

    return progress


def _changed(
    wheels: Path, folder: Path, name: str, change: Callable[[zipfile.ZipFile, Path], None]
) -> Wheelhouse:
    """The same wheelhouse with one wheel made anew."""
    shutil.copytree(wheels, folder)
    path = next(folder.glob(f"{name}-*.whl"))
    old = path.rename(folder / "old")
    with zipfile.ZipFile(old) as archive:
        change(archive, path)
    old.unlink()
    board_wheels.index(folder)
    return wheelhouse.read(folder)


def _without_libraries(old: zipfile.ZipFile, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in old.namelist():
            if not name.endswith(".so"):
                archive.writestr(name, old.read(name))


def _with_a_note(old: zipfile.ZipFile, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in old.namelist():
            archive.writestr(name, old.read(name))
        archive.comment = b"newer"


def _huge(folder: Path) -> Path:
    """A wheelhouse that says of itself that it unpacks to a petabyte."""
    names = ("pip-1-py3-none-any.whl",)
    facts = Local()
    architecture = facts.identify().architecture
    facts.close()
    board_wheels.tiny(folder, *names, architecture=architecture, glibc="2.5")
    path = folder / wheelhouse.INDEX
    index = json.loads(path.read_text())
    index["wheels"][0]["unpacked_bytes"] = 10**15
    path.write_text(json.dumps(index))
    return folder
