"""Recipe: the smallest image classifier by constraint: shifts and 1x1 convolutions, nothing else.

A 1x1 convolution sees one place of the image. What its neighbours hold comes to it without a
parameter: by space-to-depth, which turns each 2 x 2 places into channels of one, and by shifts,
which move groups of channels by a pixel (Wu et al. 2018, "Shift: A Zero FLOP, Zero Parameter
Alternative to Spatial Convolutions", section 3). There is no dense layer: the last 1x1 convolution
gives a vote for each class at each place, and their mean decides (Lin et al. 2014, "Network In
Network", section 3.2).

The baseline has 3x3 convolutions instead of shifts, as many parameters, and the same training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgekit import _fs, intervals, network_folder
from edgekit.errors import RecipeError
from edgekit.network_folder import Network
from edgekit.training import checkpoint, classify, confusion, deploy
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run
from edgekit.training.settings import setting
from edgekit.training.trainer import Fitted, Task


@dataclass(frozen=True)
class MinimalSettings(classify.ClassifierSettings):
    """The network's size and the data; the defaults are for Fashion-MNIST."""

    widths: tuple[int, ...] = setting((48, 112), "channels at a half, a quarter ... of the sides")
    blocks: tuple[int, ...] = setting((4, 5), "blocks of each width")
    turn: float = setting(0.0, "augmentation: turned by up to so many degrees, scaled by a tenth")
    baseline: bool = setting(True, "train the network of 3x3 convolutions too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or len(self.widths) != len(self.blocks):
            raise RecipeError("widths and blocks must be as many: one of each for every size")
        if min(self.widths) < 1 or min(self.blocks) < 0:
            raise RecipeError("a width is at least 1, a number of blocks at least 0")


class Shift(nn.Module):
    """Moves groups of channels by a pixel, each its own way; zeros come in at the edges."""

    def __init__(self, width: int) -> None:
        super().__init__()
        ways = len(_WAYS)
        self.sizes = [width * (n + 1) // ways - width * n // ways for n in range(ways)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = torch.split(x, self.sizes, dim=1)
        # Padding by -1 cuts off what leaves the image.
        moved = [F.pad(group, way) for group, way in zip(groups, _WAYS, strict=True)]
        return torch.cat(moved, dim=1)


# Left, right, up and down: of two shifts one after the other come the diagonals.
_WAYS = [(0, 0, 0, 0), (1, -1, 0, 0), (-1, 1, 0, 0), (0, 0, 1, -1), (0, 0, -1, 1)]


class Block(nn.Module):
    """x + mix(relu(norm(x))): a pre-activation residual (He et al. 2016, "Identity Mappings in Deep
    Residual Networks", figure 4e), whose mixing is a shift and a 1x1 convolution, or a 3x3 one.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.shift = Shift(width) if kernel == 1 else nn.Identity()
        self.mix = nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.mix(self.shift(F.relu(self.norm(x))))
        return x + mixed


class Minimal(nn.Module):
    """float32 [batch, channels, height, width] -> logits [batch, classes].

    For each width: space-to-depth, a 1x1 convolution to that width, and its blocks.
    """

    def __init__(
        self, channels: int, classes: int, widths: list[int], blocks: list[int], kernel: int
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for width, count in zip(widths, blocks, strict=True):
            stages += [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, width, 1, bias=False)]
            stages += [Block(width, kernel) for _ in range(count)]
            channels = width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.votes = nn.Conv2d(channels, classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        votes: torch.Tensor = self.votes(F.relu(self.norm(self.stages(image))))
        return votes.mean(dim=(2, 3))


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of a folder's config (registry.NETWORKS)."""
    return Minimal(**config)


def run(run: Run, settings: MinimalSettings) -> TrainingReport:
    """Train the network, and its baseline; write the first with the report of both."""
    data = classify.load(settings, run.say)
    train = data.train.share(settings.train_images)
    test = data.test.share(settings.test_images)
    sizes = 2 ** len(settings.widths)
    if any(side % sizes for side in data.shape[1:]):
        raise RecipeError(f"{data.shape[1:]} pixels cannot be halved {len(settings.widths)} times")
    loss = classify.loss_of(
        data,
        smoothing=settings.smoothing,
        shift=settings.shift,
        flip=settings.flip,
        turn=settings.turn,
    )
    evaluate = classify.evaluation(data, test)

    def trained(name: str, config: dict[str, Any]) -> Fitted:
        torch.manual_seed(settings.seed)
        # Channels last: a 1x1 convolution is then a matrix product, a quarter faster on CPUs.
        network = build(config).to(memory_format=torch.channels_last)
        return run.fit(Task(name, network, train, loss, evaluate), settings)

    configs = {
        "shift": {
            "channels": data.shape[0],
            "classes": len(data.labels),
            "widths": list(settings.widths),
            "blocks": list(settings.blocks),
            "kernel": 1,
        }
    }
    if settings.baseline:
        configs["conv"] = _as_large(configs["shift"])
    fitted = {name: trained(name, config) for name, config in configs.items()}

    def fill(name: str, folder: Path) -> None:
        network = Network("minimal", configs[name], (1, *data.shape), data.preprocess())
        _fs.write_atomic(folder / network_folder.FILE, network.to_bytes())
        checkpoint.write(folder / network_folder.WEIGHTS, fitted[name].state)

    timed = {}
    if settings.latency:
        timed = deploy.figures(run, {name: partial(fill, name) for name in configs})
    results = [
        Result(
            name,
            {"parameters": float(parameters(build(configs[name])))}
            | each.figures
            | timed.get(name, {}),
        )
        for name, each in fitted.items()
    ]
    remarks = [f"tested on {len(test):,} images of {settings.data} that no training saw"]
    if not run.main:
        return run.finish(partial(fill, "shift"), results, remarks)
    networks = {name: build(config) for name, config in configs.items()}
    for name, network in networks.items():
        network.load_state_dict(fitted[name].state)
    if settings.baseline:
        hits = [
            [float(hit) for hit in classify.right(network, data, test)]
            for network in networks.values()
        ]
        gain = intervals.paired(hits[0], hits[1])
        remarks.append(
            "accuracy of shift less that of conv (3x3 convolutions, as many parameters and steps),"
            f" image by image: {100 * gain.value:+.2f} [{100 * gain.low:+.2f},"
            f" {100 * gain.high:+.2f}] points, one seed"
        )
    taken = confusion.of(networks["shift"], data, train, test)
    return run.finish(partial(fill, "shift"), results, remarks, taken)


def parameters(network: nn.Module) -> int:
    """Values that training sets."""
    return sum(each.numel() for each in network.parameters())


def _as_large(config: dict[str, Any]) -> dict[str, Any]:
    """The config with 3x3 convolutions and at most as many parameters: widths shrunk alike."""
    limit = parameters(build(config))
    for percent in range(100, 0, -1):
        widths = [max(1, width * percent // 100) for width in config["widths"]]
        smaller = config | {"kernel": 3, "widths": widths}
        if parameters(build(smaller)) <= limit:
            return smaller
    raise RecipeError("no network of 3x3 convolutions is as small", hint="--set baseline=false")


RECIPE = Recipe(
    "minimal",
    MinimalSettings(
        steps=4700,
        batch=128,
        lr=6e-3,
        ema=0.998,
        eval_every=470,
        checkpoint_every=200,
        weight_decay=0.05,
    ),
    run,
)
