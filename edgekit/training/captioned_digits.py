"""Small colour pictures of a digit with the sentence that describes each, made as they are asked
for.

Knows digits, colours and words; never a network. One in ten of all sentences is kept from training:
whoever gets them right has learned words, and no list of sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from edgekit.training.images import Images
from edgekit.training.trainer import Batch

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = {"small": 0.42, "large": 0.68}  # of the digit's picture beside the whole
COLOURS = {
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 0.9, 0.3),
    "blue": (0.3, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.2),
    "purple": (0.8, 0.3, 0.9),
    "white": (1.0, 1.0, 1.0),
}
PLACES = {
    "at the top left": (-1.0, -1.0),
    "at the top right": (1.0, -1.0),
    "at the bottom left": (-1.0, 1.0),
    "at the bottom right": (1.0, 1.0),
    "in the centre": (0.0, 0.0),
}
ATTRIBUTES = (tuple(SIZES), tuple(COLOURS), DIGITS, tuple(PLACES))
CAPTIONS = tuple(
    f"a {size} {colour} {digit} {place}" for size, colour, digit, place in product(*ATTRIBUTES)
)
MARKS = ("<pad>", "<unk>", "<start>", "<end>")
_UNSEEN_EVERY = 10
_NOISE = 0.08


def unseen() -> torch.Tensor:
    """bool [captions]: those that training never sees."""
    order = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(0))
    return order % _UNSEEN_EVERY == 0


def tokenizer() -> Tokenizer:
    """Words to numbers, between the marks of a start and an end."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    known = {word: number for number, word in enumerate((*MARKS, *words))}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[(mark, known[mark]) for mark in ("<start>", "<end>")],
    )
    return made


def tokens(made: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """int64 [texts, longest], short ones filled up with <pad>."""
    made.enable_padding(pad_token="<pad>")
    found = torch.tensor([each.ids for each in made.encode_batch(list(texts))])
    made.no_padding()
    return found


def attributes() -> torch.Tensor:
    """int64 [captions, 4]: the numbers of size, colour, digit and place."""
    return torch.tensor(list(product(*(range(len(each)) for each in ATTRIBUTES))))


class Scenes:
    """``count`` pictures and the numbers of their captions: data for the trainer.

    A sample is float32 [3, side, side] from 0 to 1, and a number of CAPTIONS. Sample n is always
    the same, but for the noise of its background, which is its place's alone. ``allowed`` are the
    captions that may come: bool [captions].
    """

    def __init__(
        self, digits: Images, count: int, *, side: int, seed: int, allowed: torch.Tensor
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        self._digits, self.side = digits, side
        numbers = allowed.nonzero().squeeze(1)
        self.captions = numbers[torch.randint(0, len(numbers), (count,), generator=random)]
        kinds = digits.classes.argsort(stable=True)
        counts = torch.bincount(digits.classes, minlength=len(DIGITS))
        firsts = counts.cumsum(0) - counts
        digit = attributes()[self.captions, 2]
        at = (torch.rand(count, generator=random) * counts[digit]).long()
        self._which = kinds[firsts[digit] + at]
        self._jitter = torch.rand(count, 4, generator=random) * 2 - 1
        self._noise = _NOISE * torch.randn(64, 3, side, side, generator=random)
        self._sizes = torch.tensor(list(SIZES.values()))
        self._colours = torch.tensor(list(COLOURS.values()))
        self._places = torch.tensor(list(PLACES.values()))

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, numbers: torch.Tensor) -> Batch:
        captions = self.captions[numbers]
        size, colour, _, place = attributes()[captions].unbind(1)
        jitter = self._jitter[numbers]
        scale = self._sizes[size] * (1 + 0.12 * jitter[:, 0])
        # As far out as the digit's picture stays inside.
        centre = self._places[place] * (1 - scale).unsqueeze(1) * 0.85 + 0.06 * jitter[:, 1:3]
        turn = 0.2 * jitter[:, 3]
        cos, sin = torch.cos(turn) / scale, torch.sin(turn) / scale
        rows = [
            torch.stack([cos, sin, -cos * centre[:, 0] - sin * centre[:, 1]], 1),
            torch.stack([-sin, cos, sin * centre[:, 0] - cos * centre[:, 1]], 1),
        ]
        ink = self._digits.pixels[self._which[numbers]].float() / 255
        shape = [len(numbers), 1, self.side, self.side]
        grid = F.affine_grid(torch.stack(rows, 1), shape, align_corners=False)
        placed = F.grid_sample(ink, grid, align_corners=False)
        coloured = placed * self._colours[colour].view(-1, 3, 1, 1)
        noise = self._noise[numbers % len(self._noise)]
        return (0.15 + noise * (1 - placed) + 0.85 * coloured).clamp(0, 1), captions


def preprocessor(side: int) -> dict[str, Any]:
    """The fields of a ``preprocessor_config.json``: pixels from 0 to 1 as they are."""
    return {
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }
