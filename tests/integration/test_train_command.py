"""`edgekit train` as one types it: completion, settings, resuming, and where it writes."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.shell_completion import ShellComplete
from training_data import picture_folder, prose

from edgekit.cli import cli as command
from edgekit.errors import DataError, ExportError, RecipeError, UsageError
from edgekit.registry import RECIPES
from edgekit.training import recipe, texts
from edgekit.training.recipe import train
from edgekit.training.settings import rows, with_pairs
from edgekit.training.trainer import Status

TOY = ("side=8", "channels=1", "widths=10,20", "blocks=1,1", "flip=no", "shift=1", "latency=no")
SHORT = (*TOY, "steps=6", "batch=8", "baseline=no", "threads=1")


def quiet(status: Status) -> None:
    pass


def completed(*words: str) -> dict[str, str | None]:
    *before, last = words
    shell = ShellComplete(command, {}, "edgekit", "_EDGEKIT_COMPLETE")
    return {item.value: item.help for item in shell.get_completions(before, last)}


# Words


def test_recipes_keys_and_values_are_completed() -> None:
    assert list(completed("train", "")) == list(RECIPES)
    assert "shifts and 1x1" in str(completed("train", "min")["minimal"])
    keys = completed("train", "minimal", "--set", "steps=3", "--set", "s")
    assert {"side=", "shift=", "smoothing=", "seed=", "steps=", "schedule="} == set(keys)
    found = completed("train", "minimal", "--set", "schedule=")
    assert list(found) == ["schedule=cosine", "schedule=wsd", "schedule=constant"]
    assert list(completed("train", "minimal", "--set", "flip=n")) == ["flip=no"]
    assert completed("train", "nosuch", "--set", "s") == completed("train", "--set", "s") == {}


def test_the_settings_are_listed_with_what_they_may_be() -> None:
    abouts = {name: about for name, _, about in rows(RECIPES.load("tinyllama").settings)}
    assert abouts["schedule"] == "course of lr (cosine, wsd or constant)"
    assert abouts["size"].endswith("110m or 1.1b)") and "(" not in abouts["ngram"]


@pytest.mark.parametrize("name_of_recipe", list(RECIPES))
def test_no_setting_of_any_recipe_is_negative_or_endless(name_of_recipe: str) -> None:
    settings = RECIPES.load(name_of_recipe).settings
    for name, value in settings.to_dict().items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int | float) and not isinstance(first, bool):
            wrong = ["-1", "99999999999999999999999"][: 1 + isinstance(first, int)]
            for text in wrong:
                with pytest.raises(RecipeError):
                    with_pairs(settings, [f"{name}={text}"])


@pytest.mark.parametrize("pair", ["side=0", "channels=2", "smoothing=2", "threads=100000"])
def test_settings_that_make_no_image_are_refused_before_the_data(tmp_path: Path, pair: str) -> None:
    with pytest.raises(RecipeError):
        train("minimal", ["data=nowhere", pair], tmp_path / "out", resume=False, say=quiet)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_no_cpu(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="GPU"):
        train("minimal", [*SHORT, "device=gpu"], tmp_path / "out", resume=False, say=quiet)
    assert not list(tmp_path.iterdir())


# Going on


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    data = picture_folder(folder / "pictures")
    body = train("minimal", [f"data={data}", *SHORT], folder / "out", resume=False, say=quiet)
    return folder / "out", body


def test_resume_alone_shows_a_finished_run_and_trains_nothing(
    run: tuple[Path, dict[str, Any]],
) -> None:
    """Without the settings given again it once began the recipe's own, and replaced the run."""
    out, body = run
    said: list[Status] = []
    assert train("minimal", [], out, resume=True, say=said.append) == body and not said
    assert train("minimal", ["steps=6"], out, resume=True, say=said.append) == body and not said


def test_resume_shows_a_run_of_an_edgekit_with_other_settings(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = shutil.copytree(run[0], tmp_path / "out")
    body = json.loads((out / "training.json").read_text())
    del body["settings"]["turn"], body["classes"]
    body["settings"]["gone"] = 3
    (out / "training.json").write_text(json.dumps(body))
    assert train("minimal", [], out, resume=True, say=quiet) == body


def test_a_finished_run_is_not_resumed_with_other_settings_or_another_recipe(
    run: tuple[Path, dict[str, Any]],
) -> None:
    out, _ = run
    with pytest.raises(RecipeError, match="finished, with other settings: steps 6 -> 7"):
        train("minimal", ["steps=7"], out, resume=True, say=quiet)
    with pytest.raises(UsageError, match="a run of the recipe minimal, not of prune"):
        train("prune", [], out, resume=True, say=quiet)
    assert not out.with_name("out.training").exists()


def test_an_unfinished_run_is_not_resumed_as_another_recipe(tmp_path: Path) -> None:
    data = picture_folder(tmp_path / "pictures")

    def stop(status: Status) -> None:
        if not status.note and not status.memory:
            raise KeyboardInterrupt

    out, pairs = tmp_path / "out", [f"data={data}", *SHORT, "log_every=1", "checkpoint_every=1"]
    with pytest.raises(KeyboardInterrupt):
        train("minimal", pairs, out, resume=False, say=stop)
    with pytest.raises(UsageError, match="a run of the recipe minimal, not of vit-qat"):
        train("vit-qat", [], out, resume=True, say=quiet)
    body = train("minimal", [], out, resume=True, say=quiet)
    assert body["settings"]["steps"] == 6


def test_a_start_that_had_done_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    """As after Ctrl-C while the pictures were read."""
    data = picture_folder(tmp_path / "pictures")
    out, pairs = tmp_path / "out", [f"data={data}", *SHORT]

    def stop(status: Status) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("minimal", pairs, out, resume=False, say=stop)
    body = train("minimal", [*pairs[:-1], "threads=2"], out, resume=False, say=quiet)
    assert body["settings"]["threads"] == 2


def test_a_run_that_takes_the_place_of_another_says_so(run: tuple[Path, dict[str, Any]]) -> None:
    out, body = run
    said: list[str] = []
    pairs = [f"data={body['settings']['data']}", *SHORT]
    train("minimal", pairs, out, resume=False, say=lambda status: said.append(status.note))
    assert f"{out} holds a finished run: this one takes its place when it ends" in said
    assert "trains on 1 thread of the CPU" in said


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_arguments: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "train", stopped)
    with pytest.raises(click.Abort):
        command.main(["train", "minimal", "--out", str(tmp_path / "out")], standalone_mode=False)
    assert (
        f"--resume goes on with what is in {tmp_path / 'out'}.training" in capsys.readouterr().err
    )


# Places


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (Path("/proc/out"), tmp_path / "file" / "out"):
        with pytest.raises(ExportError, match="cannot write"):
            train("minimal", SHORT, out, resume=False, say=quiet)


def test_others_may_read_the_weights_as_they_may_the_rest(
    run: tuple[Path, dict[str, Any]],
) -> None:
    """A service that runs the model is another user than the one who trained it."""
    mask = os.umask(0)
    os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in run[0].iterdir()}
    assert modes == {0o666 & ~mask}


# Texts


def test_a_text_of_one_line_is_cut_between_words(tmp_path: Path) -> None:
    line = " ".join(prose().split())
    (tmp_path / "line.txt").write_text(line)
    found = texts.read(str(tmp_path / "line.txt"))
    blocks = [*found.train, *found.held]
    assert len(blocks) >= 40 and sum(map(len, blocks)) == len(line)
    assert all(block in line and len(block) <= 20_000 for block in blocks)
    assert all(block[-1] == " " and len(block) < 2100 for block in found.train[:-1])
    (tmp_path / "line.txt").write_text("x" * 900_000)
    assert {len(block) for block in texts.read(str(tmp_path / "line.txt")).train} == {20_000}


def test_marks_and_empty_lines_of_other_systems_are_read_over(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "What?", "answer": "That."})
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"\r\n{line}\r\n\r\n".encode() * 40)
    train_, held = texts.pairs(path)
    assert (len(train_), len(held)) == (39, 1)
    path.write_bytes(b"\xef\xbb\xbf\n\n" + f"{line}\n{{no\n".encode())
    with pytest.raises(DataError, match="line 4 is not JSON"):
        texts.pairs(path)
    (tmp_path / "prose.txt").write_text("\ufeff" + prose(), "utf-8")
    assert texts.read(str(tmp_path / "prose.txt")).train[0][0] == prose()[0]


def test_pairs_are_read_before_the_pretraining(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text(prose())
    (tmp_path / "pairs.jsonl").write_text("{no\n")
    pairs = [f"text={tmp_path / 'prose.txt'}", f"pairs={tmp_path / 'pairs.jsonl'}", "size=toy"]
    said: list[Status] = []
    with pytest.raises(DataError, match="line 1 is not JSON"):
        train("tinyllama", pairs, tmp_path / "out", resume=False, say=said.append)
    assert all(status.note for status in said) and not (tmp_path / "out.training").exists()
