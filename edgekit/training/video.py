"""Recipe: a video classifier whose frames meet by shifts of channels, which cost no arithmetic.

A network for images looks at each frame; in each of its blocks a part of the channels comes from
the frame before, and a part from the one after (Lin, Gan and Han 2019, "TSM: Temporal Shift Module
for Efficient Video Understanding", https://arxiv.org/abs/1811.08383, section 3). The mean of the
frames' votes decides (section 4.1).
The baseline is the same network without the shifts, trained alike: it sees all frames, and not
their order. What it is to tell apart needs the order (``moving_digits``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgekit import _fs, network_folder
from edgekit.errors import RecipeError
from edgekit.network_folder import Network
from edgekit.training import checkpoint, classify, deploy, images
from edgekit.training.moving_digits import MOTIONS, WITHOUT_ORDER, Clips
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run
from edgekit.training.settings import Settings, setting
from edgekit.training.trainer import Batch, Fitted, Task

_EVAL_BATCH = 100
_TEST_SEED = 1 << 20  # no run's own seed


@dataclass(frozen=True)
class VideoSettings(Settings):
    """The clips and the network's size."""

    data: str = setting("mnist", "digits to move: mnist, fashion-mnist, or a folder of grey images")
    clips: int = setting(20000, "different clips to train on")
    test_clips: int = setting(2000, "clips to test on, of digits that no training saw")
    frames: int = setting(8, "of a clip")
    side: int = setting(32, "of a frame, in pixels")
    widths: tuple[int, ...] = setting((16, 32, 64), "channels; each halves the sides")
    part: int = setting(8, "one channel in so many comes from each neighbour")
    baseline: bool = setting(True, "train the network without shifts too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or min(self.widths) < 2 * self.part or self.part < 2:
            raise RecipeError("part is at least 2, and each of widths at least twice that")
        if min(self.clips, self.test_clips, self.side) < 1 or self.frames < 2:
            raise RecipeError("a clip has at least 2 frames, and there is at least one of each")


class TemporalShift(nn.Module):
    """float32 [batch * frames, channels, height, width], the frames of a clip one after the other:
    the first ``channels // part`` come from the frame after, as many from the one before; beyond
    the ends are zeros (section 3.3: a quarter moves in all, inside of the residual branch).
    """

    def __init__(self, frames: int, part: int) -> None:
        super().__init__()
        self.frames, self.part = frames, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[1] // self.part
        clip = x.view(-1, self.frames, *x.shape[1:])
        after = F.pad(clip[:, 1:, :size], (0, 0, 0, 0, 0, 0, 0, 1))
        before = F.pad(clip[:, :-1, size : 2 * size], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat([after, before, clip[:, :, 2 * size :]], dim=2).view(-1, *x.shape[1:])


class Block(nn.Module):
    """skip(x) + conv(relu(norm(conv(relu(norm(shift(x))))))), at half the sides."""

    def __init__(self, before: int, after: int, shift: nn.Module) -> None:
        super().__init__()
        self.shift = shift
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(before, after, 1, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved = self.conv1(F.relu(self.norm1(self.shift(x))))
        found: torch.Tensor = self.skip(x) + self.conv2(F.relu(self.norm2(moved)))
        return found


class Tsm(nn.Module):
    """float32 [batch, frames, height, width] -> logits [batch, classes]; ``part`` 0: no shifts."""

    def __init__(self, frames: int, classes: int, widths: list[int], part: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        shifts = [TemporalShift(frames, part) if part else nn.Identity() for _ in widths]
        befores = [widths[0], *widths[:-1]]
        self.blocks = nn.ModuleList(map(Block, befores, widths, shifts))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        x = self.first(clip.flatten(0, 1).unsqueeze(1))
        for block in self.blocks:
            x = block(x)
        votes: torch.Tensor = self.head(F.relu(self.norm(x)).mean(dim=(2, 3)))
        return votes.view(clip.shape[0], clip.shape[1], -1).mean(dim=1)


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of a folder's config (registry.NETWORKS)."""
    return Tsm(**config)


def run(run: Run, settings: VideoSettings) -> TrainingReport:
    """Train the network, and the one without shifts; write the first with the report of both."""
    data = images.load(settings.data, side=28, channels=1, say=run.say)
    shape = {"frames": settings.frames, "side": settings.side}
    train = Clips(data.train, settings.clips, seed=settings.seed, **shape)
    test = Clips(data.test, settings.test_clips, seed=_TEST_SEED, **shape)
    body: dict[str, Any] = {
        "frames": settings.frames,
        "classes": len(MOTIONS),
        "widths": list(settings.widths),
        "part": settings.part,
    }
    configs = {"shift": body}
    if settings.baseline:
        configs["no shift"] = body | {"part": 0}

    def trained(name: str, config: dict[str, Any]) -> Fitted:
        torch.manual_seed(settings.seed)
        task = Task(name, build(config), train, loss, evaluation(test), unit="clips")
        return run.fit(task, settings)

    fitted = {name: trained(name, config) for name, config in configs.items()}

    def fill(name: str, folder: Path) -> None:
        network = Network(
            "video", configs[name], (1, settings.frames, settings.side, settings.side)
        )
        _fs.write_atomic(folder / network_folder.FILE, network.to_bytes())
        checkpoint.write(folder / network_folder.WEIGHTS, fitted[name].state)

    timed = {}
    if settings.latency:
        timed = deploy.figures(run, {name: partial(fill, name) for name in configs})
    results = [
        Result(
            name,
            {"parameters": float(sum(p.numel() for p in build(configs[name]).parameters()))}
            | each.figures
            | timed.get(name, {}),
        )
        for name, each in fitted.items()
    ]
    remarks = [
        f"tested on {len(test):,} clips of digits that no training saw; without their order"
        f" {100 * WITHOUT_ORDER:.0f}% is the most that can be reached"
    ]
    if settings.baseline and run.main:
        hits = {name: _right(_network(configs[name], each), test) for name, each in fitted.items()}
        lead = classify.bootstrap(hits["shift"], hits["no shift"])
        remarks.append(f"accuracy of shift less that of no shift: {classify.points(lead)}")
    return run.finish(partial(fill, "shift"), results, remarks)


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy, summed over the clips."""
    clips, classes = batch
    return F.cross_entropy(model(clips).float(), classes, reduction="sum")


def evaluation(test: Clips) -> Callable[[nn.Module], dict[str, float]]:
    """A function that gives "loss" (cross-entropy in nats) and "accuracy" on ``test``."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        total, right = 0.0, 0
        for logits, classes in _answers(model, test):
            total += float(F.cross_entropy(logits, classes, reduction="sum"))
            right += int((logits.argmax(1) == classes).sum())
        return {"loss": total / len(test), "accuracy": right / len(test)}

    return evaluate


def _answers(model: nn.Module, test: Clips) -> Any:
    device = next(model.parameters()).device
    for numbers in torch.arange(len(test)).split(_EVAL_BATCH):
        clips, classes = test.batch(numbers)
        yield model(clips.to(device)).float(), classes.to(device)


def _network(config: Mapping[str, Any], fitted: Fitted) -> nn.Module:
    network = build(config)
    network.load_state_dict(fitted.state)
    return network.eval()


@torch.no_grad()
def _right(network: nn.Module, test: Clips) -> list[bool]:
    hits = [logits.argmax(1) == classes for logits, classes in _answers(network, test)]
    found: list[bool] = torch.cat(hits).tolist()
    return found


RECIPE = Recipe(
    "video",
    VideoSettings(
        steps=450,
        batch=32,
        lr=3e-3,
        eval_every=150,
        checkpoint_every=100,
        weight_decay=0.05,
        precision="bf16",
    ),
    run,
)
