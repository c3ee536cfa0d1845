"""A folder of one's own pictures: what is read of it, what is told, what the network mistakes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from PIL import Image
from training_data import picture_folder

from edgekit.errors import DataError
from edgekit.registry import RECIPES
from edgekit.training import confusion, images, report
from edgekit.training.images import Labelled
from edgekit.training.recipe import train
from edgekit.training.trainer import Status

TOY = ("side=8", "channels=1", "widths=10,20", "blocks=1,1", "flip=no", "shift=1", "latency=no")


def heard(folder: Path) -> tuple[Labelled, list[Status]]:
    said: list[Status] = []
    return images.load(str(folder), side=8, channels=1, say=said.append), said


# What is read


def test_hidden_files_are_no_pictures_and_other_files_are_told(tmp_path: Path) -> None:
    """macOS leaves ._NAME.jpg beside NAME.jpg on every foreign disk; cameras write HEIC."""
    folder = picture_folder(tmp_path / "pictures")
    (folder / "lying" / "._000.png").write_bytes(b"\x00\x05\x16\x07")
    (folder / "lying" / "IMG_1.HEIC").touch()
    (folder / "upright" / "IMG_2.heic").touch()
    found, said = heard(folder)
    assert len(found.train) + len(found.test) == 60
    notes = [status.note for status in said]
    assert "passed over, for they are no images: 2 .heic" in notes
    assert notes[0] == "2 classes, 48 images to train on (24 of each), 12 to test on"


def test_all_broken_pictures_are_told_at_once(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures")
    for name in ("lying/003.png", "upright/004.png", "upright/005.png"):
        (folder / name).write_bytes(b"no")
    with pytest.raises(DataError) as caught:
        heard(folder)
    assert "lying/003.png is no image that can be read (none of BMP" in caught.value.message
    assert "nor 2 others: " in caught.value.message and "005.png" in caught.value.message
    assert "BytesIO" not in caught.value.message


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_a_part_to_test_on_may_have_any_usual_name(tmp_path: Path, name: str) -> None:
    picture_folder(tmp_path / "train", each=9)
    picture_folder(tmp_path / name, each=4)
    found, _ = heard(tmp_path)
    assert (len(found.train), len(found.test)) == (18, 8)
    assert found.labels == ("lying", "upright")
    assert found.test.names[0] == str(tmp_path / name / "lying" / "000.png")


def test_a_folder_of_train_alone_is_parted(tmp_path: Path) -> None:
    picture_folder(tmp_path / "train", each=10)
    found, _ = heard(tmp_path)
    assert (len(found.train), len(found.test)) == (16, 4)


def test_the_mean_of_the_pixels_is_taken_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_CHUNK", 7)
    found, _ = heard(picture_folder(tmp_path / "pictures"))
    every = found.train.pixels.double() / 255
    assert found.mean[0] == pytest.approx(every.mean().item(), abs=1e-6)
    assert found.std[0] == pytest.approx(every.std().item(), abs=1e-6)


def test_a_long_reading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_QUIET_S", -1.0)
    _, said = heard(picture_folder(tmp_path / "pictures"))
    steps = [status.step for status in said if not status.note]
    assert steps == list(range(1, 61)) and said[0].steps == 60 and said[0].unit == "images"


def test_what_makes_figures_worth_less_is_told(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures")
    for path in sorted((folder / "lying").iterdir())[5:]:
        path.unlink()
    last = folder / "lying" / "004.png"  # each fifth is tested on
    last.write_bytes((folder / "lying" / "000.png").read_bytes())
    found, said = heard(folder)
    uneven, twice = found.remarks
    assert "'lying' has 4 images to train on, 'upright' 24" in uneven
    assert twice.startswith("1 of 7 images to test on are also among those to train on")
    assert [status.note for status in said][1:] == [uneven, twice]


def test_names_that_no_report_can_hold_are_refused(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures")
    (folder / "lying").rename(folder / "M\udce4dchen")  # Latin-1, as an old disk has it
    with pytest.raises(DataError, match=r"the class 'M\\udce4dchen' has no printable name"):
        heard(folder)


# What the network mistakes


class Brightness(torch.nn.Module):
    """Calls a bright image the last class, and any other the first one, with 88%."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        bright = image.mean(dim=(1, 2, 3)) > 0
        return self.scale * 2 * torch.stack([~bright, bright], 1).float()


def shades(folder: Path) -> Labelled:
    """Of each 10 files of a kind the fifth and the tenth are tested on: 4 dark and 4 light ones, of
    which one light one is as dark as the others, and one file holds it.
    """
    for kind, value in (("dark", 20), ("light", 220)):
        (folder / kind).mkdir(parents=True)
        for number in range(20):
            shade = 20 if (kind, number) == ("light", 9) else value
            Image.new("L", (8, 8), shade).save(folder / kind / f"{number:02}.png")
    return images.load(str(folder), side=8, channels=1)


def test_the_matrix_and_the_mistakes_are_those_of_the_test_images(tmp_path: Path) -> None:
    data = shades(tmp_path / "shades")
    found = confusion.of(Brightness(), data, data.train, data.test)
    assert found.matrix.tolist() == [[4, 0], [1, 3]]
    dark, light = found.classes()
    assert (dark.recall, dark.precision, light.recall, light.precision) == (1, 0.8, 0.75, 1)
    assert (dark.trained, dark.tested, dark.times) == (16, 4, 0)
    assert (light.taken_for, light.times) == ("dark", 1)
    assert found.remarks()[0].startswith("7 of 8 test images right: 87.50% [52.91, 97.76]")
    assert "1 of 4 images of 'light' are taken for 'dark'" in found.remarks()[1]
    found.write(tmp_path)
    with (tmp_path / confusion.MISTAKES).open() as file:
        (mistake,) = csv.DictReader(file)
    assert mistake == {
        "image": str(tmp_path / "shades" / "light" / "09.png"),
        **{"is": "light", "taken_for": "dark", "probability": "0.8808"},
    }
    for name in (confusion.MATRIX_PICTURE, confusion.MISTAKES_PICTURE):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200


def test_a_class_that_was_not_tested_on_has_no_recall() -> None:
    some = images.Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 0]))
    data = Labelled(some, some, ("a|b", "c$d"), (0.0,), (1.0,))
    found = confusion.of(Brightness(), data, some, some)
    assert [each.recall for each in found.classes()] == [1.0, None]
    assert [each.precision for each in found.classes()] == [1.0, None]
    head, rows = report.class_columns(found.classes())
    assert rows[1] == ["c$d", "0", "0", "-", "-", "-"] and len(head) == 6


def test_the_command_shows_the_classes_and_what_comes_next(
    tmp_path: Path, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture_folder(tmp_path / "meine Bilder")
    pairs = ("data=meine Bilder", *TOY, "steps=30", "batch=16", "baseline=no", "threads=1")
    sets = [word for pair in pairs for word in ("--set", pair)]
    ran = cli("train", "minimal", *sets, "--out", "out a")
    assert ran.code == 0, ran.stderr
    assert "data: 2 classes, 48 images to train on (24 of each), 12 to test on" in ran.stderr
    lines = ran.stdout.splitlines()
    head = next(line for line in lines if line.startswith("class "))
    assert head.split("  ")[1:] and "most taken for" in head
    assert lines[-1] == "the run is in out a; next: edgekit export 'out a' --format onnx"
    body = json.loads((tmp_path / "out a" / report.FILE).read_text())
    assert [each["name"] for each in body["classes"]] == ["lying", "upright"]
    # The settings of the page can be given again as they stand there.
    page = (tmp_path / "out a" / report.PAGE).read_text()
    given = page.partition("## Settings\n\n```\n")[2].partition("\n```")[0].splitlines()
    monkeypatch.chdir(tmp_path)
    again = train("minimal", given, tmp_path / "again", resume=False, say=lambda status: None)
    assert again["results"][0]["figures"]["loss"] == body["results"][0]["figures"]["loss"]


def test_a_small_folder_needs_no_setting_to_be_parted(tmp_path: Path) -> None:
    """By default prune, distill and nas hold back a part of any folder, and patches fit."""
    data = images.load(str(picture_folder(tmp_path / "pictures", each=25)))
    for recipe in ("prune", "distill", "nas"):
        settings: Any = RECIPES.load(recipe).settings
        train, held = data.train.parted(settings.held_images)
        assert len(held) == len(data.train) // 5 and len(train) + len(held) == len(data.train)
    many = images.Images(torch.zeros(20_000, 1, 1, 1, dtype=torch.uint8), torch.zeros(20_000))
    assert len(many.parted(0)[1]) == 2000
    patches: Any = RECIPES.load("vit-qat").settings
    assert patches.side % patches.patch == 0
