"""Small data to train on: pictures of two kinds as a folder, and points that a net can learn."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from edgekit.training.recipe import train
from edgekit.training.trainer import Batch


def prose() -> str:
    """Some 150,000 characters of English that stay as they are, unlike edgekit's own pages."""
    return resources.files("edgekit.exporters").joinpath("calibration.txt").read_text("utf-8")


def toy_llama(out: Path, text: Path) -> Path:
    """The folder of a Llama of two layers or so that has learned a little of ``text``."""
    pairs = [f"text={text}", "pairs=", "size=toy", "length=64", "steps=120", "batch=16", "lr=1e-2"]
    pairs += ["held_tokens=1000", "n_ctx=128", "latency=no", "threads=1", "ngram=no"]
    train("tinyllama", pairs, out, resume=False, say=lambda status: None)
    return out


def picture_folder(folder: Path, each: int = 30, side: int = 8) -> Path:
    """Grey pictures of bars, upright and lying, with noise: one folder a kind."""
    random = np.random.default_rng(0)
    for kind in ("lying", "upright"):
        (folder / kind).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 80, (side, side), dtype=np.uint8)
            at = int(random.integers(1, side - 1))
            if kind == "lying":
                pixels[at] = 255
            else:
                pixels[:, at] = 255
            Image.fromarray(pixels).save(folder / kind / f"{number:03}.png")
    return folder


def digit_folder(folder: Path, each: int = 12, side: int = 28) -> Path:
    """The ten digits in white on black, each a little elsewhere: one folder a digit."""
    random = np.random.default_rng(0)
    font = ImageFont.load_default(size=round(0.7 * side))
    for digit in map(str, range(10)):
        (folder / digit).mkdir(parents=True)
        for number in range(each):
            picture = Image.new("L", (side, side))
            at = side / 2 + random.integers(-2, 3, 2)
            ImageDraw.Draw(picture).text(tuple(at), digit, fill=255, font=font, anchor="mm")
            picture.save(folder / digit / f"{number:03}.png")
    return folder


class Points:
    """``count`` points of 6 numbers, and a wavy function of them to learn."""

    def __init__(self, count: int = 96) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = torch.sin(self.x.sum(1, keepdim=True))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, numbers: torch.Tensor) -> Batch:
        return self.x[numbers], self.y[numbers]


def network() -> torch.nn.Module:
    """Two layers of a list (what is sharded), with dropout: its randomness must resume too."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 32)]
    return Layers(layers, torch.nn.Linear(32, 1))


class Layers(torch.nn.Module):
    def __init__(self, layers: list[torch.nn.Module], last: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        found: torch.Tensor = self.last(x)
        return found


def square(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().sum()
