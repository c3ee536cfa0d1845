"""What a classifier takes for what: a row for each class, the whole matrix, and the images it got
wrong, as tables and as pictures.

Knows answers, labels and test images; never how the network came about, or what else is reported.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from edgekit import _fs, intervals, plot
from edgekit.errors import MissingExtraError
from edgekit.training import classify
from edgekit.training.images import Images, Labelled
from edgekit.training.report import ClassFigures

CLASSES, MATRIX, MISTAKES = "classes.csv", "confusion.csv", "mistakes.csv"
MATRIX_PICTURE, MISTAKES_PICTURE = "confusion.png", "mistakes.png"
_MOST_DRAWN = 40  # classes: beyond, no cell can be read
_MOST_WRITTEN = 15  # classes whose cells have their numbers in them
_ACROSS, _DOWN = 6, 4  # mistakes in the picture
_LABEL = 14  # letters of a name in a picture


@dataclass(frozen=True)
class Mistake:
    """``image`` is the name of a file, or the number of a test image; ``probability`` that which
    the network gives to the class it takes the image for.
    """

    image: str
    number: int
    is_one: int
    taken_for: int
    probability: float


@dataclass(frozen=True)
class Confusion:
    """``matrix`` is int64 [classes, classes]: a row for what images are, a column for what they
    are taken for. ``trained`` are images of each class that were learned from. ``mistakes`` are all
    there are, the surest first.
    """

    data: Labelled
    trained: tuple[int, ...]
    matrix: torch.Tensor
    mistakes: tuple[Mistake, ...]
    test: Images

    @property
    def labels(self) -> tuple[str, ...]:
        return self.data.labels

    def remarks(self) -> tuple[str, ...]:
        """Sentences: how sure the accuracy is, what is mistaken most often, what the data lack."""
        total, right = int(self.matrix.sum()), int(self.matrix.diagonal().sum())
        share = intervals.proportion(right, total)
        found = [
            f"{right:,} of {total:,} test images right: {100 * share.value:.2f}%"
            f" [{100 * share.low:.2f}, {100 * share.high:.2f}] (95%, Wilson's interval)"
        ]
        most = max(self.classes(), key=lambda each: each.times)
        if most.times:
            found.append(
                f"most often mistaken: {most.times:,} of {most.tested:,} images of '{most.name}'"
                f" are taken for '{most.taken_for}'; {CLASSES}, {MATRIX} and {MISTAKES} have all"
            )
        return (*found, *self.data.remarks)

    def classes(self) -> tuple[ClassFigures, ...]:
        """Of each class: recall (how many of its images are found) and precision (how many of what
        is taken for it are), None for 0 of 0.
        """
        tested, taken = self.matrix.sum(1).tolist(), self.matrix.sum(0).tolist()
        found = []
        for number, label in enumerate(self.labels):
            right = int(self.matrix[number, number])
            others = self.matrix[number].clone()
            others[number] = 0
            most = int(others.argmax())
            found.append(
                ClassFigures(
                    label,
                    self.trained[number],
                    tested[number],
                    right / tested[number] if tested[number] else None,
                    right / taken[number] if taken[number] else None,
                    self.labels[most] if int(others[most]) else "",
                    int(others[most]),
                )
            )
        return tuple(found)

    def write(self, folder: Path) -> None:
        """The tables, and where matplotlib is there the pictures, into ``folder``."""
        rows = [tuple(vars(each).values()) for each in self.classes()]
        _write(folder / CLASSES, ClassFigures.__dataclass_fields__, rows)
        matrix = zip(self.labels, self.matrix.tolist(), strict=True)
        _write(folder / MATRIX, ["is", *self.labels], [(label, *row) for label, row in matrix])
        _write(
            folder / MISTAKES,
            ("image", "is", "taken_for", "probability"),
            [
                (m.image, self.labels[m.is_one], self.labels[m.taken_for], f"{m.probability:.4f}")
                for m in self.mistakes
            ],
        )
        with suppress(MissingExtraError):  # the tables hold the same
            if len(self.labels) <= _MOST_DRAWN:
                _draw_matrix(folder / MATRIX_PICTURE, self)
            if self.mistakes:
                _draw_mistakes(folder / MISTAKES_PICTURE, self)


@torch.no_grad()
def of(network: torch.nn.Module, data: Labelled, train: Images, test: Images) -> Confusion:
    """What ``network`` takes each image of ``test`` for; ``train`` is what it learned from."""
    network.eval()
    count = len(data.labels)
    matrix = torch.zeros(count * count, dtype=torch.int64)
    mistakes = []
    at = 0
    for logits, classes in classify.answers(network, data, test):
        sure, taken = logits.softmax(1).cpu().max(1)
        classes = classes.cpu()
        matrix += torch.bincount(classes * count + taken, minlength=count * count)
        for row in (taken != classes).nonzero()[:, 0].tolist():
            number = at + row
            image = test.names[number] if test.names else str(number)
            pair = int(classes[row]), int(taken[row])
            mistakes.append(Mistake(image, number, *pair, float(sure[row])))
        at += len(classes)
    trained = torch.bincount(train.classes, minlength=count)
    return Confusion(
        data,
        tuple(trained.tolist()),
        matrix.view(count, count),
        tuple(sorted(mistakes, key=lambda each: (-each.probability, each.number))),
        test,
    )


def _write(path: Path, head: Iterable[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(head)
    lines.writerows(rows)
    # Names of files may be no UTF-8: they stay as the system gives them.
    _fs.write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _draw_matrix(path: Path, found: Confusion) -> None:
    """Shares of each row; a cell's number is how many images."""
    count = len(found.labels)
    shares = found.matrix / found.matrix.sum(1, keepdim=True).clamp(min=1)
    side = 2.5 + 0.35 * max(6, count)
    with plot.figure(path, width_in=side + 0.8, height_in=side) as figure:
        axes = figure.add_subplot()
        shown = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        names = [_short(label) for label in found.labels]
        axes.set_xticks(range(count), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), names)
        axes.grid(False)
        axes.set_xlabel("taken for")
        axes.set_ylabel("is")
        figure.colorbar(shown, ax=axes, shrink=0.7, label="share of the row")
        for row, column in found.matrix.nonzero().tolist() if count <= _MOST_WRITTEN else []:
            colour = "white" if shares[row, column] > 0.5 else "black"
            value = int(found.matrix[row, column])
            axes.text(column, row, value, ha="center", va="center", color=colour, fontsize=7)


def _draw_mistakes(path: Path, found: Confusion) -> None:
    """The surest ones: the image as the network saw it, what it took it for, and what it is."""
    shown = found.mistakes[: _ACROSS * _DOWN]
    down = -(-len(shown) // _ACROSS)
    with plot.figure(path, width_in=1.4 * _ACROSS, height_in=1.75 * down) as figure:
        for place, mistake in enumerate(shown):
            axes = figure.add_subplot(down, _ACROSS, place + 1)
            pixels = found.test.pixels[mistake.number].permute(1, 2, 0).numpy()
            axes.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
            taken, real = (_short(found.labels[n]) for n in (mistake.taken_for, mistake.is_one))
            sure = f"{100 * mistake.probability:.0f}%"
            axes.set_title(f"{taken} {sure}\nis {real}", fontsize=7, loc="left")


def _short(label: str) -> str:
    """Fit for a picture; a dollar would begin a formula there."""
    cut = label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"
    return cut.replace("$", r"\$")
