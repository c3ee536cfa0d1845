"""What the recipes for image classifiers share: settings, loss, augmentation, figures on a test.

Knows logits and labels; never a network's inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from edgekit.errors import RecipeError
from edgekit.intervals import Interval
from edgekit.training.images import Images, Labelled
from edgekit.training.images import load as load_images
from edgekit.training.settings import Settings, setting
from edgekit.training.trainer import Batch, Loss, Say

_EVAL_BATCH = 500
_RESAMPLES = 10_000


@dataclass(frozen=True)
class ClassifierSettings(Settings):
    """Where the images come from, and how they are varied; the defaults are for Fashion-MNIST."""

    data: str = setting(
        "fashion-mnist", "fashion-mnist, mnist, or a folder with one folder a class"
    )
    side: int = setting(32, "a folder's images become side x side")
    channels: int = setting(3, "a folder's images: 3 colours, or 1 for grey")
    train_images: int = setting(0, "images to train on, of every class its share; 0: all")
    test_images: int = setting(0, "images to test on, of every class its share; 0: all")
    shift: int = setting(2, "augmentation: moved by up to so many pixels")
    flip: bool = setting(True, "augmentation: mirrored")
    smoothing: float = setting(0.1, "label smoothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_images(self.side, self.channels)
        if self.smoothing > 1:
            raise RecipeError("smoothing is a share from 0 to 1")


def check_images(side: int, channels: int) -> None:
    """Raises RecipeError where no image can be made so."""
    if side < 1 or channels not in (1, 3):
        raise RecipeError("side is at least 1, channels are 1 or 3")


def load(settings: ClassifierSettings, say: Say) -> Labelled:
    """All images of ``settings``. Raises DataError."""
    return load_images(settings.data, side=settings.side, channels=settings.channels, say=say)


def loss_of(data: Labelled, *, smoothing: float, shift: int, flip: bool, turn: float = 0.0) -> Loss:
    """Cross-entropy with label smoothing (Szegedy et al. 2016, section 7), summed over the images
    of a batch, which are augmented first.
    """

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        pixels, classes = batch
        inputs = augmented(data.normalized(pixels), shift=shift, flip=flip, turn=turn)
        logits = model(inputs).float()
        return F.cross_entropy(logits, classes, reduction="sum", label_smoothing=smoothing)

    return loss


def augmented(images: torch.Tensor, *, shift: int, flip: bool, turn: float) -> torch.Tensor:
    """Each image moved by up to ``shift`` pixels, mirrored in half of the cases if ``flip``, turned
    by up to ``turn`` degrees and scaled by up to a tenth if ``turn``; edges are repeated.

    Float [batch, channels, height, width]; random by torch's generator.
    """
    count, _, height, width = images.shape
    options = {"device": images.device}
    if turn:
        angle = (torch.rand(count, **options) * 2 - 1) * turn * torch.pi / 180
        scale = 1 + (torch.rand(count, 2, **options) * 2 - 1) * 0.1
        moved = (torch.rand(count, 2, **options) * 2 - 1) * 2 * shift / width
        cos, sin = torch.cos(angle), torch.sin(angle)
        rows = [
            torch.stack([cos * scale[:, 0], -sin * scale[:, 1], moved[:, 0]], 1),
            torch.stack([sin * scale[:, 0], cos * scale[:, 1], moved[:, 1]], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    elif shift:
        wide = F.pad(images, (shift,) * 4, mode="replicate")
        y = torch.randint(0, 2 * shift + 1, (count, 1, 1, 1), **options)
        x = torch.randint(0, 2 * shift + 1, (count, 1, 1, 1), **options)
        rows_at = y + torch.arange(height, **options).view(1, 1, -1, 1)
        columns_at = x + torch.arange(width, **options).view(1, 1, 1, -1)
        number = torch.arange(count, **options).view(-1, 1, 1, 1)
        channel = torch.arange(images.shape[1], **options).view(1, -1, 1, 1)
        images = wide[number, channel, rows_at, columns_at]
    if flip:
        mirrored = torch.rand(count, 1, 1, 1, **options) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    return images


def evaluation(data: Labelled, images: Images) -> Callable[[torch.nn.Module], dict[str, float]]:
    """A function that gives "loss" (cross-entropy in nats) and "accuracy" on ``images``."""

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        total, right = 0.0, 0
        for logits, classes in answers(model, data, images):
            total += float(F.cross_entropy(logits, classes, reduction="sum"))
            right += int((logits.argmax(1) == classes).sum())
        return {"loss": total / len(images), "accuracy": right / len(images)}

    return evaluate


@torch.no_grad()
def right(model: torch.nn.Module, data: Labelled, images: Images) -> list[bool]:
    """Whether the model is right on each image: what a paired comparison of two models needs."""
    model.eval()
    hits = [logits.argmax(1) == classes for logits, classes in answers(model, data, images)]
    found: list[bool] = torch.cat(hits).tolist()
    return found


@torch.no_grad()
def losses(model: torch.nn.Module, data: Labelled, images: Images) -> list[float]:
    """The cross-entropy of each image, in nats."""
    model.eval()
    each = [
        F.cross_entropy(logits, classes, reduction="none")
        for logits, classes in answers(model, data, images)
    ]
    found: list[float] = torch.cat(each).tolist()
    return found


def bootstrap(one: Sequence[bool], other: Sequence[bool]) -> Interval:
    """The accuracy of ``one`` less that of ``other`` on the same images, and the middle 95% of it
    over resamples of the images (Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
    chapter 13: percentiles).

    A resample is told by how often it holds an image that only one side gets right, so those two
    counts are drawn, and no images.
    """
    count = len(one)
    gains = sum(a and not b for a, b in zip(one, other, strict=True))
    losses = sum(b and not a for a, b in zip(one, other, strict=True))
    random = torch.Generator().manual_seed(0)
    total = torch.full((_RESAMPLES,), float(count))
    up = torch.binomial(total, torch.full_like(total, gains / count), generator=random)
    share = torch.full_like(total, losses / max(1, count - gains)).clamp(max=1.0)
    leads = (up - torch.binomial(total - up, share, generator=random)) / count
    low, high = leads.quantile(torch.tensor([0.025, 0.975])).tolist()
    return Interval((gains - losses) / count, low, high)


def points(lead: Interval) -> str:
    """A ``bootstrap`` in words."""
    return (
        f"{100 * lead.value:+.2f} [{100 * lead.low:+.2f}, {100 * lead.high:+.2f}] points"
        " (95%, paired bootstrap, one seed)"
    )


def answers(
    model: torch.nn.Module, data: Labelled, images: Images
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits (float32) and classes of one batch after the other, as the model's mode has it."""
    device = next(model.parameters()).device
    for start in range(0, len(images), _EVAL_BATCH):
        pixels = images.pixels[start : start + _EVAL_BATCH].to(device)
        classes = images.classes[start : start + _EVAL_BATCH].to(device)
        yield model(data.normalized(pixels)).float(), classes
