"""Short clips of a digit that moves, made as they are asked for: the motion is the class.

Knows digits and geometry; never a network. Motions come in pairs that are each other backwards, so
that no single frame, and no set of frames without their order, tells the two of a pair apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgekit.training.images import Images
from edgekit.training.trainer import Batch

MOTIONS = (
    *("left", "right", "up", "down"),
    *("turning left", "turning right", "growing", "shrinking"),
)
# The accuracy that no model without a sense of order exceeds: of each pair it can only guess one.
WITHOUT_ORDER = 0.5
_SIZE = 0.75  # of the digit's picture beside the frame, on average


class Clips:
    """``count`` clips of ``frames`` frames of ``side`` x ``side`` pixels: data for the trainer.

    A sample is float32 [frames, side, side] from 0 to 1, and the number of its motion. Sample n is
    always the same: digit, motion, place, size, turn and speed are drawn once, from ``seed``.
    """

    def __init__(self, digits: Images, count: int, *, frames: int, side: int, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)

        def between(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(count, generator=random)

        self._digits, self.side = digits, side
        self._which = torch.randint(0, len(digits), (count,), generator=random)
        self.classes = torch.randint(0, len(MOTIONS), (count,), generator=random)
        self._x, self._y = between(-0.3, 0.3), between(-0.3, 0.3)
        self._size, self._turn = between(0.85, 1.15) * _SIZE, between(-0.4, 0.4)
        self._speed = between(0.5, 1.0)
        self._times = torch.linspace(-1, 1, frames)

    def __len__(self) -> int:
        return len(self.classes)

    def batch(self, numbers: torch.Tensor) -> Batch:
        classes = self.classes[numbers]
        # From -1 to 1 over the clip, times the speed; each motion takes one of these.
        along = self._speed[numbers].unsqueeze(1) * self._times

        def course(up: str, down: str, most: float) -> torch.Tensor:
            sign = (classes == MOTIONS.index(up)).float() - (classes == MOTIONS.index(down)).float()
            return most * sign.unsqueeze(1) * along

        x = self._x[numbers].unsqueeze(1) + course("right", "left", 0.35)
        y = self._y[numbers].unsqueeze(1) + course("down", "up", 0.35)
        turn = self._turn[numbers].unsqueeze(1) + course("turning right", "turning left", 0.9)
        size = self._size[numbers].unsqueeze(1) * course("growing", "shrinking", 0.4).exp()
        pixels = self._digits.pixels[self._which[numbers]].float() / 255
        frames = len(self._times)
        still = pixels[:, :1].repeat_interleave(frames, dim=0)
        grid = F.affine_grid(
            _seen_from(x, y, turn, size).flatten(0, 1),
            [len(still), 1, self.side, self.side],
            align_corners=False,
        )
        moved = F.grid_sample(still, grid, align_corners=False)
        return moved.view(len(numbers), frames, self.side, self.side), classes


def _seen_from(
    x: torch.Tensor, y: torch.Tensor, turn: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    """[..., 2, 3]: where in the digit's picture each place of the frame lies, places from -1 to 1:
    moved back by (x, y), turned back, and shrunk by ``size``.
    """
    cos, sin = torch.cos(turn) / size, torch.sin(turn) / size
    rows = [
        torch.stack([cos, sin, -cos * x - sin * y], -1),
        torch.stack([-sin, cos, sin * x - cos * y], -1),
    ]
    return torch.stack(rows, -2)
