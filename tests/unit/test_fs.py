"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit import _fs
from edgekit.errors import OutOfSpaceError, UnsafePathError, UsageError


def ours(_path: Path) -> bool:
    return True


def not_ours(_path: Path) -> bool:
    return False


def test_a_staged_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with _fs.staged(out, owns=ours) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_keeps_the_old_folder_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    with pytest.raises(RuntimeError), _fs.staged(out, owns=ours) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (out / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scratch_goes_in_the_end_and_so_does_what_a_killed_run_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "work"
    left = path.with_name("work.partial")
    left.mkdir(parents=True)
    (left / "old").write_text("of a killed run")
    with pytest.raises(RuntimeError), _fs.scratch(path) as folder:
        assert list(folder.iterdir()) == []
        (folder / "a").write_text("1")
        with pytest.raises(UsageError, match="another edgekit"), _fs.scratch(path):
            pass
        raise RuntimeError
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two renames"])
def test_a_commit_replaces_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(_fs, "_exchange", lambda left, right: False)
    out = tmp_path / "out"
    for text in ("old", "new"):
        with _fs.staged(out, owns=ours) as folder:
            (folder / text).write_text(text)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_commit_killed_between_two_renames_is_mended(tmp_path: Path) -> None:
    moved_away = tmp_path / "out.replaced"
    moved_away.mkdir()
    (moved_away / "a").write_text("old")
    with pytest.raises(RuntimeError), _fs.staged(tmp_path / "out", owns=ours):
        raise RuntimeError
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert not moved_away.exists()


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_text("x")
    with _fs.staged(tmp_path / "out", owns=ours) as folder:
        assert list(folder.iterdir()) == []


def test_a_strangers_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refusal = pytest.raises(UsageError, match="not made by edgekit")
    with refusal, _fs.staged(tmp_path / "out", owns=not_ours):
        pass
    assert (tmp_path / "out").is_dir()


def test_a_link_in_the_place_of_the_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(UsageError), _fs.staged(tmp_path / "out", owns=ours):
        pass


def test_two_writers_of_one_output_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _fs.staged(out, owns=ours) as folder:
        (folder / "a").write_text("1")
        with pytest.raises(UsageError, match="another edgekit"), _fs.staged(out, owns=ours):
            pass
    assert (out / "a").exists()


def test_the_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from edgekit import _fs\n"
        "with _fs.staged(Path(sys.argv[1]), owns=lambda p: True):\n"
        "    print('in', flush=True); time.sleep(60)"
    )
    out = tmp_path / "out"
    writer = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert not out.exists()
    with _fs.staged(out, owns=ours):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


UNSAFE = ["", "/etc/passwd", "..", "a/../b", "a/./b", "a//b", "a\\b", "a\0b", "C:evil", "a/"]


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_leave_their_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafePathError):
        _fs.contained(tmp_path, name)


def test_links_inside_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(UnsafePathError):
        _fs.contained(tmp_path, "link/passwd")
    assert _fs.contained(tmp_path, "a/b.txt") == tmp_path / "a" / "b.txt"


def test_an_atomic_write_leaves_only_the_file(tmp_path: Path) -> None:
    _fs.write_atomic(tmp_path / "x" / "f", b"1")
    _fs.write_atomic(tmp_path / "x" / "f", b"2")
    assert (tmp_path / "x" / "f").read_bytes() == b"2"
    assert len(list((tmp_path / "x").iterdir())) == 1


def test_too_little_room_is_found_before_the_work(tmp_path: Path) -> None:
    _fs.require_space(tmp_path / "out", 1)
    with pytest.raises(OutOfSpaceError, match="MB free"):
        _fs.require_space(tmp_path / "out", 1 << 60)


def test_home_follows_edgekit_home_and_then_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fs.home("cache") == Path(os.environ["EDGEKIT_HOME"]) / "cache"
    monkeypatch.delenv("EDGEKIT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert _fs.home("cache") == Path("/x/edgekit")
