"""`edgekit train`, from a folder of pictures to an exported network; and what bad data end in."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran
from PIL import Image
from training_data import picture_folder

import edgekit
from edgekit import network_folder
from edgekit.errors import (
    CorruptArtifactError,
    DataError,
    EdgekitError,
    ExportError,
    RecipeError,
    SourceError,
    UnknownNameError,
    UsageError,
    VersionError,
)
from edgekit.registry import RECIPES
from edgekit.training import finetune, images
from edgekit.training.catalogue import CATALOGUE
from edgekit.training.recipe import train

TOY = ("side=8", "channels=1", "widths=10,20", "blocks=1,1", "flip=no", "shift=1", "latency=no")
MORE = ("steps=120", "batch=16", "eval_every=40", "lr=1e-2", "threads=1", "log_every=20")


def trained(folder: Path, data: Path, *pairs: str, resume: bool = False) -> dict[str, Any]:
    return train(
        *("minimal", [f"data={data}", *TOY, *MORE, *pairs], folder),
        resume=resume,
        say=lambda status: None,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "bars"
    trained(out, pictures)
    return out


def test_a_run_ends_in_a_folder_with_the_model_the_report_and_the_curves(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        *("classes.csv", "confusion.csv", "confusion.png"),
        *("curve-conv.csv", "curve-shift.csv", "curves.png", "mistakes.csv", "model.safetensors"),
        *("network.json", "training.json", "training.md"),
    ]
    body = json.loads((run / "training.json").read_text())
    assert [row["name"] for row in body["results"]] == ["shift", "conv"]
    shift, conv = (row["figures"] for row in body["results"])
    assert shift["accuracy"] > 0.9 and 0.5 * shift["parameters"] < conv["parameters"]
    assert conv["parameters"] <= shift["parameters"]
    assert [phase["steps"] for phase in body["phases"]] == [120, 120]
    page = (run / "training.md").read_text()
    assert "| shift |" in page and "image by image" in page and "steps=120" in page
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not run.with_name("bars.training").exists()


def test_the_folder_is_a_source_and_the_artifact_classifies(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    found = edgekit.source(run)
    assert (found.kind, found.family) == ("run", "minimal")
    artifact = edgekit.export(run, "onnx", type="F32", out=tmp_path / "onnx")
    assert artifact.manifest.source["kind"] == "run"
    with edgekit.load(artifact) as model:
        answers = [
            model.classify(path)[0][0] == path.parent.name
            for path in sorted(pictures.rglob("*.png"))
        ]
    assert sum(answers) / len(answers) > 0.9


@pytest.mark.slow
def test_the_front_of_sizes_is_a_table_and_a_picture(pictures: Path, tmp_path: Path) -> None:
    program = Path(__file__).resolve().parents[2] / "benchmarks" / "train" / "front.py"
    toy = (f"data={pictures}", "side=8", "channels=1", "flip=no", "steps=3", "batch=16")
    command = [sys.executable, "-B", program, "--out", tmp_path / "front"]
    command += [word for pair in toy for word in ("--set", pair)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    counts = [int(row[1].replace(",", "")) for row in rows[2:]]
    shift, conv = counts[::2], counts[1::2]
    assert len(shift) == len(conv) == 5 and shift == sorted(shift, reverse=True)
    # No baseline is larger, and none much smaller.
    assert all(0.75 * one <= other <= one for one, other in zip(shift, conv, strict=True))
    assert all("[" in row[3] for row in rows[2::2])
    assert (tmp_path / "front" / "front.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout


def test_a_run_that_ends_early_says_so(pictures: Path, tmp_path: Path) -> None:
    pairs = [f"data={pictures}", *TOY, "steps=400", "eval_every=5", "patience=1", "baseline=no"]
    body = train("minimal", [*pairs, "lr=0.1", "threads=1"], tmp_path / "out", resume=False,
                 say=lambda status: None)  # fmt: skip
    steps = body["phases"][0]["steps"]
    assert steps < 400 and f"shift ended after {steps} of 400 steps" in body["remarks"][-1]


def test_runs_of_several_seeds_become_a_table_of_means_and_ranges(
    pictures: Path, tmp_path: Path
) -> None:
    def run_of(seed: int, steps: int) -> float:
        pairs = [f"data={pictures}", *TOY, f"seed={seed}", f"steps={steps}", "baseline=no"]
        out = tmp_path / f"seed-{seed}" / "bars"
        body = train("minimal", pairs, out, resume=False, say=lambda status: None)
        return float(body["results"][0]["figures"]["loss"])

    losses = [run_of(seed, 20) for seed in range(3)]
    assert len(set(losses)) == 3
    done = seeds_of(*tmp_path.glob("seed-*"))
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| shift |")]
    spread = f"{sum(losses) / 3:.4g} [{min(losses):.4g}, {max(losses):.4g}]"
    assert spread in row
    run_of(3, 10)
    done = seeds_of(tmp_path / "seed-0", tmp_path / "seed-3")
    assert done.returncode == 2 and "steps 20 -> 10" in done.stderr


def seeds_of(*folders: Path) -> subprocess.CompletedProcess[str]:
    return script("seeds.py", *folders)


@pytest.mark.slow
def test_the_front_is_trained_with_several_seeds_too(pictures: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    toy = (f"data={pictures}", "side=8", "channels=1", "flip=no", "steps=3", "batch=16")
    done = subprocess.run(
        [root / "benchmarks" / "train" / "run", "minimal-front", *toy],
        env=os.environ | {"SEEDS": "2", "OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tables = [line for line in done.stdout.splitlines() if "of seeds 0, 1;" in line]
    sizes = ("18k", "45k", "5k", "96k", "9k")
    assert [line.partition(":")[0] for line in tables] == [f"minimal-front/{s}" for s in sizes]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| shift |")]
    assert len(rows) == 5 and all("[" in row for row in rows)
    losses = {name: [] for name in ("shift", "conv")}
    for seed in range(2):
        path = tmp_path / f"seed-{seed}" / "minimal-front" / "5k" / "training.json"
        for row in json.loads(path.read_text())["results"]:
            losses[row["name"]].append(row["figures"]["loss"])
    apart = [one - other for one, other in zip(losses["shift"], losses["conv"], strict=True)]
    told = f"{sum(apart) / 2:+.4f} ({apart[0]:+.4f}, {apart[1]:+.4f})"
    assert f"loss of shift less that of conv: {told}" in done.stdout


def script(name: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """A program of benchmarks/train."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "train" / name
    return subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True)


def test_runs_side_by_side_are_compared_line_by_line(run: Path, tmp_path: Path) -> None:
    lines = {"a": (2.0, [1.0, 1.2, 1.4]), "b": (2.0, [1.1, 1.3, 1.5]), "c": (3.0, [1.1, 1.3, 1.5])}
    for name, (before, after) in lines.items():
        shutil.copytree(run, tmp_path / name)
        rows = "".join(f"{before},{nats}\n" for nats in after)
        (tmp_path / name / finetune.HELD).write_text(f"before,after\n{rows}")
    done = script("table.py", *(tmp_path / name for name in lines))
    assert done.returncode == 0, done.stderr
    # All lines of b cost a tenth more; those of c are others, which cannot be compared.
    assert "b less a: +0.100 [+0.100, +0.100] (95%, paired bootstrap over 3 lines)" in done.stdout
    assert "c less" not in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == len(set(table)) and "seconds" in table[0]


def test_a_gguf_of_such_a_folder_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgekitError) as caught:
        edgekit.export(run, "gguf", out=tmp_path / "gguf")
    assert caught.value.hint


def _changed(run: Path, out: Path, **changed: Any) -> Path:
    shutil.copytree(run, out)
    body = json.loads((out / "network.json").read_text())
    (out / "network.json").write_text(json.dumps(body | changed))
    return out


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"schema": 99}, VersionError),
        ({"extra": 1}, SourceError),
        ({"input_shape": [1, 10**9, 1, 1]}, SourceError),
        ({"network": "os:system"}, UnknownNameError),
        ({"config": {"widths": [10**9], "blocks": [1]}}, ExportError),
        (
            {
                "config": {
                    "channels": 1,
                    "classes": 2,
                    "kernel": 1,
                    "widths": [10**5],
                    "blocks": [1],
                }
            },
            CorruptArtifactError,
        ),
    ],
)
def test_a_folder_that_was_tampered_with_is_refused(
    run: Path, tmp_path: Path, changed: dict[str, Any], kind: type[EdgekitError]
) -> None:
    folder = _changed(run, tmp_path / "bad", **changed)
    with pytest.raises(kind):
        edgekit.export(folder, "onnx", type="F32", out=tmp_path / "onnx", receipt=False)
    assert not (tmp_path / "onnx").exists()


def test_damaged_weights_are_refused(run: Path, tmp_path: Path) -> None:
    folder = _changed(run, tmp_path / "bad")
    data = (folder / network_folder.WEIGHTS).read_bytes()
    (folder / network_folder.WEIGHTS).write_bytes(data[:-10])
    with pytest.raises(CorruptArtifactError):
        edgekit.export(folder, "onnx", type="F32", out=tmp_path / "onnx", receipt=False)


# Runs that go on, and runs that may not start


def test_a_finished_run_is_shown_when_it_is_asked_for_again(run: Path, pictures: Path) -> None:
    before = (run / "training.json").read_bytes()
    body = trained(run, pictures, resume=True)
    assert body == json.loads(before) and (run / "training.json").read_bytes() == before


def test_an_unfinished_run_is_in_the_way_until_it_is_resumed_with_its_own_settings(
    tmp_path: Path, pictures: Path
) -> None:
    out = tmp_path / "out"

    def stop(status: Any) -> None:
        if status.step > 1:
            raise KeyboardInterrupt

    short = [f"data={pictures}", *TOY, "steps=8", "batch=8", "threads=1"]
    short += ["log_every=1", "checkpoint_every=1"]
    with pytest.raises(KeyboardInterrupt):
        train("minimal", short, out, resume=False, say=stop)
    assert not out.exists() and (tmp_path / "out.training").is_dir()
    with pytest.raises(UsageError, match="unfinished run"):
        train("minimal", short, out, resume=False, say=stop)
    with pytest.raises(RecipeError, match="lr "):
        train("minimal", ["lr=0.5"], out, resume=True, say=stop)
    body = train("minimal", [], out, resume=True, say=lambda status: None)
    assert body["settings"]["steps"] == 8 and not (tmp_path / "out.training").exists()


def test_a_run_that_is_refused_before_its_first_step_is_in_nobodys_way(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError):
        train("minimal", ["data=nowhere/"], tmp_path / "out", resume=False, say=lambda status: None)
    assert not list(tmp_path.glob("out*"))


def test_a_folder_of_somebody_elses_is_never_replaced(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="no training run"):
        trained(tmp_path / "out", pictures)


# Data


def test_data_that_are_missing_are_told_with_a_near_name() -> None:
    with pytest.raises(DataError) as caught:
        images.load("fashion-mnsit")
    assert "fashion-mnist" in str(caught.value.hint)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures")
    (folder / "lying" / "003.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(DataError, match=r"003\.png"):
        images.load(str(folder), side=8, channels=1)


def test_a_class_without_pictures_is_named(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures")
    (folder / "slanted").mkdir()
    with pytest.raises(DataError, match="'slanted' has 0 images"):
        images.load(str(folder), side=8, channels=1)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 folders"):
        images.load(str(tmp_path))


def test_test_pictures_of_an_unknown_class_are_refused(tmp_path: Path) -> None:
    picture_folder(tmp_path / "train")
    picture_folder(tmp_path / "test")
    (tmp_path / "test" / "lying").rename(tmp_path / "test" / "sitting")
    with pytest.raises(DataError, match="'sitting'"):
        images.load(str(tmp_path), side=8, channels=1)


def _idx(path: Path, values: np.ndarray) -> None:
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))


def test_fashion_mnist_in_the_cache_is_read_and_its_labels_are_checked(home: Path) -> None:
    folder = home / "cache/data/fashion-mnist/usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (("train", 40), ("t10k", 20)):
        _idx(folder / f"{name}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28)))
        _idx(folder / f"{name}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    found = images.load("fashion-mnist")
    assert (len(found.train), len(found.test), found.shape) == (40, 20, (1, 28, 28))
    assert found.test.share(4).names == ("t10k 0", "t10k 5", "t10k 12", "t10k 17")
    assert found.labels[9] == "ankle boot" and 0.4 < found.mean[0] < 0.6
    _idx(folder / "train-labels-idx1-ubyte.gz", np.arange(40) % 11)
    with pytest.raises(DataError, match="label 10"):
        images.load("fashion-mnist")
    _idx(folder / "train-labels-idx1-ubyte.gz", np.arange(39) % 10)
    with pytest.raises(DataError, match="40 images and 39 labels"):
        images.load("fashion-mnist")
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8bno")
    with pytest.raises(DataError, match="no gzip"):
        images.load("fashion-mnist")


def test_a_part_of_a_folder_has_of_every_class_its_share(tmp_path: Path) -> None:
    """Files lie class by class: the first ones would be of one class alone."""
    folder = picture_folder(tmp_path / "pictures", each=60)
    for path in sorted((folder / "lying").iterdir())[20:]:  # of one class a third of the other
        path.unlink()
    whole = images.load(str(folder), side=8, channels=1).train
    assert whole.classes.bincount().tolist() == [16, 48]
    part = whole.share(16)
    assert part.classes.bincount().tolist() == [4, 12]
    # They are spread over each class, in the files' order, and the same each time.
    rows = {each.numpy().tobytes(): number for number, each in enumerate(whole.pixels)}
    numbers = [rows[each.numpy().tobytes()] for each in part.pixels]
    assert numbers == sorted(set(numbers)) and min(numbers) == 0 and max(numbers) >= 60
    assert torch.equal(part.pixels, whole.share(16).pixels)
    assert len(whole.share(0)) == len(whole.share(64)) == len(whole.share(1000)) == 64


def test_pictures_of_any_size_become_square(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures")
    Image.new("RGBA", (40, 12), (255, 0, 0, 255)).save(folder / "lying" / "red.png")
    assert images.load(str(folder), side=16, channels=3).shape == (3, 16, 16)


# The command


def test_the_list_needs_no_torch_and_knows_every_recipe(cli: Callable[..., Ran]) -> None:
    assert set(CATALOGUE) == set(RECIPES._rows)
    ran = cli("train", "--list")
    assert ran.code == 0
    assert max(map(len, ran.stdout.splitlines())) <= 110
    names = [line.partition(" ")[0] for line in ran.stdout.splitlines() if line[0] != " "]
    assert names == list(RECIPES)
    words = " ".join(ran.stdout.split())
    for entry in CATALOGUE.values():
        for cell in (entry.about, entry.measured, entry.command):
            assert " ".join(cell.split()) in words
    body = json.loads(cli("train", "--list", "--json").stdout)
    assert {name: entry["command"] for name, entry in body.items()} == {
        name: entry.command for name, entry in CATALOGUE.items()
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("minimum",), "did you mean 'minimal'"),
        ((), "edgekit train --list"),
        (("minimal", "--list", "--resume"), "--list trains nothing"),
    ],
)
def test_a_wrong_call_ends_with_a_hint(
    cli: Callable[..., Ran], arguments: tuple[str, ...], words: str
) -> None:
    ran = cli("train", *arguments)
    assert ran.code == 2 and words in ran.stderr
