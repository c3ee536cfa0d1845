"""Data sets of Hugging Face on disk: images, texts and pairs that recipes learn from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from training_data import picture_folder, prose

from edgekit.errors import DataError, MissingExtraError
from edgekit.training import arrow_folder, images, texts
from edgekit.training.recipe import train

TOY = ("side=8", "channels=1", "widths=10,20", "blocks=1,1", "flip=no", "shift=1", "latency=no")
CLASSES = {"names": ["lying", "upright"], "_type": "ClassLabel"}
KINDS = {"image": {"_type": "Image"}, "label": CLASSES}
PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def saved(
    folder: Path, columns: Mapping[str, Sequence[Any]], features: Mapping[str, Any], files: int = 1
) -> Path:
    """As ``datasets.Dataset.save_to_disk`` writes it (its version 5.2.0), in so many files."""
    folder.mkdir(parents=True)
    types = {"image": PICTURE, "label": pyarrow.int64()}
    about = json.dumps({"info": {"features": features}})
    schema = pyarrow.schema(
        [(name, types.get(name, pyarrow.string())) for name in columns], {"huggingface": about}
    )
    count = len(next(iter(columns.values())))
    names = []
    for number in range(files):
        part = slice(number * count // files, (number + 1) * count // files)
        names.append(f"data-{number:05}-of-{files:05}.arrow")
        table = pyarrow.table({name: each[part] for name, each in columns.items()}, schema)
        with pyarrow.ipc.new_stream(str(folder / names[-1]), schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def pictures(folder: Path, each: int = 30) -> dict[str, list[Any]]:
    found = picture_folder(folder, each=each)
    files = sorted(found.glob("*/*.png"))
    return {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in files],
        "label": [CLASSES["names"].index(path.parent.name) for path in files],
    }


@pytest.fixture
def bars(tmp_path: Path) -> Path:
    """Two parts, the first in three files."""
    folder = tmp_path / "bars"
    saved(folder / "train", pictures(tmp_path / "one"), KINDS, files=3)
    saved(folder / "test", pictures(tmp_path / "two", each=8), KINDS)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return folder


def test_images_are_those_of_a_folder(bars: Path, tmp_path: Path) -> None:
    found = images.load(str(bars), side=8, channels=1)
    (tmp_path / "same").mkdir()
    for part, name in (("one", "train"), ("two", "test")):
        (tmp_path / part).rename(tmp_path / "same" / name)
    same = images.load(str(tmp_path / "same"), side=8, channels=1)
    assert found.labels == same.labels == ("lying", "upright")
    assert (found.mean, found.std) == (same.mean, same.std)
    for one, other in ((found.train, same.train), (found.test, same.test)):
        assert one.pixels.equal(other.pixels) and one.classes.equal(other.classes)


def test_a_recipe_learns_from_one(bars: Path, tmp_path: Path) -> None:
    pairs = [f"data={bars}", *TOY, "steps=120", "batch=16", "lr=1e-2", "threads=1", "baseline=no"]
    body = train("minimal", [*pairs, "eval_every=40"], tmp_path / "out", resume=False,
                 say=lambda status: None)  # fmt: skip
    assert body["results"][0]["figures"]["accuracy"] > 0.9


def test_one_part_alone_is_split(tmp_path: Path) -> None:
    found = images.load(str(saved(tmp_path / "a", pictures(tmp_path / "b"), KINDS)), side=8)
    assert (len(found.train), len(found.test)) == (48, 12)


def test_texts_and_pairs(tmp_path: Path) -> None:
    lines = prose().splitlines()
    (tmp_path / "same.txt").write_text("\n".join(lines))
    folder = saved(tmp_path / "prose", {"text": lines}, {"text": {"_type": "Value"}}, files=2)
    assert texts.read(str(folder)) == texts.read(str(tmp_path / "same.txt"))
    asked = {"prompt": [f"{n}?" for n in range(80)], "answer": [f"{n}." for n in range(80)]}
    train_on, held = texts.json_lines(saved(tmp_path / "pairs", asked, {}), ("prompt", "answer"))
    assert len(train_on) == 78 and held == [("39?", "39."), ("79?", "79.")]


def damaged(bars: Path, name: str) -> None:
    part = bars / "train"
    data = part / "data-00001-of-00003.arrow"
    state = json.loads((part / "state.json").read_text())
    if name == "cut":
        data.write_bytes(data.read_bytes()[:700])
    elif name == "gone":
        data.unlink()
    elif name == "elsewhere":
        state["_data_files"][0]["filename"] = "../../secret.arrow"
        (part / "state.json").write_text(json.dumps(state))
    elif name == "parts":
        (bars / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    else:
        (part / "state.json").write_text("{")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut", "data-00001-of-00003.arrow is no Arrow file"),
        ("gone", "data-00001-of-00003.arrow is no Arrow file"),
        ("elsewhere", "which is no file in it"),
        ("parts", "has no part 'train'"),
        ("state", "state.json"),
    ],
)
def test_what_is_damaged_is_told(bars: Path, name: str, words: str) -> None:
    damaged(bars, name)
    with pytest.raises(DataError, match=words) as caught:
        images.load(str(bars), side=8, channels=1)
    assert caught.value.hint or name == "elsewhere"


def test_rows_that_are_wrong_are_told(tmp_path: Path) -> None:
    rows = pictures(tmp_path / "pictures")
    wrong = {
        "label": (rows | {"label": [*rows["label"][:-1], -1]}, "row 59 has the label -1"),
        "path": (
            rows | {"image": [*rows["image"][:-1], {"bytes": None, "path": "/etc/passwd"}]},
            "row 59 has no image in it",
        ),
        "broken": (
            rows | {"image": [*rows["image"][:-1], {"bytes": b"no", "path": "x.png"}]},
            "row 59: the image is no image",
        ),
    }
    for name, (columns, words) in wrong.items():
        with pytest.raises(DataError, match=words):
            images.load(str(saved(tmp_path / name, columns, KINDS)), side=8, channels=1)
    folder = saved(tmp_path / "plain", rows, {})
    with pytest.raises(DataError, match="no column of the kind ClassLabel"):
        images.load(str(folder), side=8, channels=1)
    with pytest.raises(DataError, match="no column 'text'"):
        texts.read(str(folder))


def test_without_pyarrow_the_extra_is_named(bars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError) as caught:
        arrow_folder.halves(bars)
    assert "[datasets]" in str(caught.value.hint)
