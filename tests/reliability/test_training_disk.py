"""Trainings on a real disk that fills up: typed errors, and the run goes on when there is room."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from full_disk import disks, hog
from training_data import prose

from edgekit import _fs
from edgekit.errors import CorruptArtifactError, ExportError, OutOfSpaceError
from edgekit.training import checkpoint, texts
from edgekit.training.search import Search

SMALL = 1 << 20
LLAMA = ("size=toy", "length=64", "n_ctx=64", "ngram=no", "held_tokens=1000", "pairs=")
LLAMA += ("optimizer=adamw", "steps=12", "batch=8", "checkpoint_every=2", "threads=1", "latency=no")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    with disks(tmp_path) as mount:
        yield mount


def fill(disk: Path, less_bytes: int = 0) -> None:
    """Leave ``less_bytes`` of the disk."""
    (disk / "hog").unlink(missing_ok=True)
    hog(disk, _fs.free_bytes(disk) - less_bytes)


def trained(out: Path, text: Path) -> subprocess.CompletedProcess[str]:
    sets = [word for pair in (f"text={text}", *LLAMA) for word in ("--set", pair)]
    command = [sys.executable, "-m", "edgekit", "train", "tinyllama", *sets, "--resume"]
    return subprocess.run(
        [*command, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=280,
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Its one line of an error, with exit code 6 and a hint."""
    assert done.returncode == 6, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr and "hint: free some space" in done.stderr
    return error


@pytest.mark.slow
def test_a_training_on_a_disk_that_fills_up_goes_on_when_there_is_room(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    text = tmp_path / "prose.txt"
    text.write_text(prose())
    whole = tmp_path / "whole"
    assert trained(whole, text).returncode == 0
    weights = json.loads((whole / "training.json").read_text())["results"][0]["figures"]
    checkpoint_bytes = int(4 * 3 * weights["parameters"])  # AdamW keeps two numbers for each

    disk = small_disk(40 << 20)
    out, work = disk / "run", disk / "run.training"
    fill(disk, 48 << 10)  # room for the settings and the tokenizer, and for no more
    assert "train.tokens" in said(trained(out, text))
    assert {path.name for path in work.iterdir()} == {"settings.json", "tokenizer.json"}

    # Room for the tokens and one checkpoint, which stays until the next one is whole.
    fill(disk, (3 << 19) + checkpoint_bytes)
    assert "pretrain has" in said(trained(out, text))
    (path,) = work.rglob("checkpoint.safetensors")
    assert checkpoint.read(path)[1]["step"] == 2
    assert path.stat().st_size == pytest.approx(checkpoint_bytes, rel=0.1)

    (disk / "hog").unlink()
    done = trained(out, text)
    assert done.returncode == 0, done.stderr
    assert not work.exists()
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (out, whole))
    assert one == other


# Tokens


def test_tokens_that_find_no_room_are_an_error_and_no_crash(
    small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = list(texts._cut(prose())) * 12
    tokenizer = texts.byte_pairs(blocks[:80], 500)
    disk = small_disk(SMALL)
    fill(disk, 128 << 10)
    with pytest.raises(OutOfSpaceError, match="needs"):  # told by the first blocks
        texts.pack(tokenizer, blocks, disk / "tokens")
    # The room is there when it is asked for, and then another writer has it.
    monkeypatch.setattr(_fs, "require_space", lambda path, needed_bytes: None)
    with pytest.raises(OutOfSpaceError, match="filled up"):
        texts.pack(tokenizer, blocks, disk / "tokens")
    monkeypatch.undo()
    assert [path.name for path in disk.iterdir()] == ["hog"]
    (disk / "hog").unlink()
    texts.pack(tokenizer, blocks[:80], disk / "tokens")
    found = texts.tokens_of(tokenizer, disk / "tokens")
    assert tokenizer.decode(found, skip_special_tokens=True) == "".join(blocks[:80])
    assert (found == tokenizer.token_to_id(texts.END)).sum() == 80


# The study of a search


def opened(folder: Path) -> Search:
    return Search(folder / "study.db", seed=0, describe=lambda made: (made / 10, 4.0 * made))


def suggest(trial: Any) -> int:
    return int(trial.suggest_int("width", 1, 50))


def searched(found: Search, trials: int) -> None:
    for _ in range(trials):
        number, *_ = found.ask(suggest)
        found.tell(number, [0.5], "complete")


def test_a_study_on_a_full_disk_keeps_its_trials_and_goes_on(
    small_disk: Callable[[int], Path],
) -> None:
    disk = small_disk(SMALL)
    fill(disk)
    with pytest.raises(OutOfSpaceError, match=r"study\.db") as caught:
        opened(disk)
    assert "--resume" in str(caught.value.hint)
    (disk / "hog").unlink()
    (disk / "study.db").unlink(missing_ok=True)
    found = opened(disk)
    searched(found, 3)
    fill(disk, 8 << 10)
    with pytest.raises(OutOfSpaceError):
        searched(found, 60)
    kept = found.trials()
    assert len(kept) >= 3 and {each.end for each in kept} == {"complete"}
    (disk / "hog").unlink()
    again = opened(disk)
    ended = [each for each in again.trials() if each.end == "complete"]
    assert ended == kept
    searched(again, 2)
    assert len([each for each in again.trials() if each.end == "complete"]) == len(kept) + 2


def test_a_study_where_nothing_may_be_written_is_refused(
    small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    searched(opened(tmp_path), 2)
    disk = small_disk(SMALL)
    shutil.copy(tmp_path / "study.db", disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ExportError, match=r"study\.db: .*readonly") as caught:
        searched(opened(disk), 1)
    assert not isinstance(caught.value, OutOfSpaceError) and "writable" in str(caught.value.hint)


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(os.urandom(8192))
    with pytest.raises(CorruptArtifactError, match="no study"):
        opened(tmp_path)
