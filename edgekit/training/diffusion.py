"""Recipe: a generator of digits that takes noise away step by step; DDPM's training, DDIM's steps.

An image is mixed with noise, ``alpha image + sigma noise``, and a network learns to tell the two
apart at every share of noise (Ho, Jain and Abbeel 2020, "Denoising Diffusion Probabilistic Models",
https://arxiv.org/abs/2006.11239, section 3, equation 14). Shares follow a cosine (Nichol and
Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models",
https://arxiv.org/abs/2102.09672, section 3.2), and the network gives ``v = alpha noise - sigma
image``, which is well scaled at both ends (Salimans and Ho 2022, "Progressive Distillation for Fast
Sampling of Diffusion Models", https://arxiv.org/abs/2202.00512, section 4). Images come out of
noise by DDIM (Song, Meng and Ermon 2021, "Denoising Diffusion Implicit Models",
https://arxiv.org/abs/2010.02502, equation 12 with eta = 0).

The folder's network holds all of these steps: noise in, images out, and so does its export.
What comes out is held against real digits by the features of a judge, a small classifier.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgekit import _fs, network_folder
from edgekit.errors import DataError, RecipeError
from edgekit.network_folder import Network
from edgekit.training import checkpoint, deploy, image_judge, images
from edgekit.training.images import Images
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run
from edgekit.training.settings import Settings, setting
from edgekit.training.trainer import Batch, Task

_FREQUENCIES = 16
_LAST = 0.999  # share of a whole turn of noise that generating starts from: at 1 nothing is left
_EVAL_BATCH = 250
_EVAL_SEED = 1 << 20


@dataclass(frozen=True)
class DiffusionSettings(Settings):
    """The digits, the network's size, and how images are made."""

    data: str = setting("mnist", "digits to learn: mnist, fashion-mnist, or a folder of images")
    widths: tuple[int, ...] = setting((32, 64), "channels at a half, and at a quarter of the sides")
    blocks: int = setting(2, "residual blocks of each width, on the way down and on the way up")
    generate: int = setting(20, "steps from noise to an image")
    judged: int = setting(1000, "generated images that the judge sees")
    judge_steps: int = setting(600, "steps of the judge's training")
    side: int = setting(28, "a folder's images become side x side")
    channels: int = setting(1, "a folder's images: 3 colours, or 1 for grey")
    train_images: int = setting(0, "images to train on, of every class its share; 0: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.widths) != 2 or min(self.widths) < 8 or any(w % 8 for w in self.widths):
            raise RecipeError("widths are two multiples of 8")
        if min(self.blocks, self.generate, self.judge_steps) < 1 or self.judged < 100:
            raise RecipeError(
                "blocks, generate and judge_steps are at least 1, judged at least 100"
            )


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))) (Ho et al. 2020, appendix B)."""

    def __init__(self, width: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(time, width)
        nn.init.zeros_(self.conv2.weight)  # a block begins as nothing

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        found: torch.Tensor = x + self.conv2(F.silu(self.norm2(inner)))
        return found


class Denoiser(nn.Module):
    """(float32 [batch, channels, height, width], time [batch] from 0 to 1) -> v, of the same shape.

    A U-Net of two sizes (Ronneberger et al. 2015, figure 1): the way down keeps its outputs for the
    way up.
    """

    def __init__(self, channels: int, widths: list[int], blocks: int) -> None:
        super().__init__()
        large, small = widths
        time = 4 * _FREQUENCIES
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, time), nn.SiLU())
        self.enter = nn.Conv2d(4 * channels, large, 3, padding=1)
        self.down = nn.ModuleList([Residual(large, time) for _ in range(blocks)])
        self.halve = nn.Conv2d(large, small, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Residual(small, time) for _ in range(2 * blocks)])
        self.enlarge = nn.Conv2d(small, 4 * large, 1)
        self.join = nn.Conv2d(2 * large, large, 1)
        self.up = nn.ModuleList([Residual(large, time) for _ in range(blocks)])
        self.norm = nn.GroupNorm(8, large)
        self.leave = nn.Conv2d(large, 4 * channels, 3, padding=1)

    def forward(self, image: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        told = self.time(_waves(time))
        x = self.enter(F.pixel_unshuffle(image, 2))
        for block in self.down:
            x = block(x, told)
        kept, x = x, self.halve(x)
        for block in self.middle:
            x = block(x, told)
        # The way down rounds an odd side up.
        x = F.pixel_shuffle(self.enlarge(x), 2)[:, :, : kept.shape[2], : kept.shape[3]]
        x = self.join(torch.cat([kept, x], dim=1))
        for block in self.up:
            x = block(x, told)
        v: torch.Tensor = F.pixel_shuffle(self.leave(F.silu(self.norm(x))), 2)
        return v


def _waves(time: torch.Tensor) -> torch.Tensor:
    """[batch, 2 * _FREQUENCIES]: sines and cosines (Vaswani et al. 2017, section 3.5)."""
    octaves = torch.arange(_FREQUENCIES, dtype=torch.float32, device=time.device)
    angles = time.unsqueeze(1) * torch.pi * 1.5**octaves
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def shares(time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma at ``time`` from 0 to 1, with alpha^2 + sigma^2 = 1: the cosine of Nichol and
    Dhariwal (equation 17; their share of the image is alpha^2) without its offset, which keeps
    discrete steps near 0 from being too small.
    """
    angle = time * _LAST * torch.pi / 2
    return torch.cos(angle), torch.sin(angle)


class Generator(nn.Module):
    """noise, float32 [batch, channels, height, width] -> images from 0 to 1, of the same shape.

    DDIM, equation 12: from the share t to the next smaller one s, what the network takes for the
    image and what it takes for the noise are mixed anew: alpha_s image + sigma_s noise.
    """

    def __init__(self, channels: int, widths: list[int], blocks: int, generate: int) -> None:
        super().__init__()
        self.denoiser = Denoiser(channels, widths, blocks)
        self.generate = generate

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        x = noise
        for step in range(self.generate, 0, -1):
            time, after = step / self.generate, (step - 1) / self.generate
            x = self.step(x, time, after)
        return (x.clamp(-1, 1) + 1) / 2

    def step(self, x: torch.Tensor, time: float, after: float) -> torch.Tensor:
        alpha, sigma = _numbers(time)
        v = self.denoiser(x, torch.full((1,), time, device=x.device))
        image = (alpha * x - sigma * v).clamp(-1, 1)
        noise = (x - alpha * image) / sigma
        next_alpha, next_sigma = _numbers(after)
        return next_alpha * image + next_sigma * noise


def _numbers(time: float) -> tuple[float, float]:
    angle = time * _LAST * math.pi / 2
    return math.cos(angle), math.sin(angle)


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of a folder's config (registry.NETWORKS)."""
    return Generator(**config)


def run(run: Run, settings: DiffusionSettings) -> TrainingReport:
    """Train the denoiser and the judge; write the generator with the report."""
    data = images.load(settings.data, side=settings.side, channels=settings.channels, say=run.say)
    if any(side % 2 for side in data.shape[1:]):
        raise RecipeError(f"{data.shape[1:]} pixels cannot be halved")
    if len(data.test) < 2:  # features of one have no covariance
        raise DataError(f"{settings.data} has one image to judge by", hint="more images")
    train = data.train.share(settings.train_images)
    config: dict[str, Any] = {
        "channels": data.shape[0],
        "widths": list(settings.widths),
        "blocks": settings.blocks,
        "generate": settings.generate,
    }
    torch.manual_seed(settings.seed)
    denoiser = Denoiser(config["channels"], config["widths"], config["blocks"])
    fitted = run.fit(Task("denoiser", denoiser, train, denoising, _evaluation(data.test)), settings)
    judge = image_judge.trained(run, data, settings, steps=settings.judge_steps)
    state = {f"denoiser.{name}": each for name, each in fitted.state.items()}

    def fill(folder: Path) -> None:
        network = Network("diffusion", config, (1, *data.shape))
        _fs.write_atomic(folder / network_folder.FILE, network.to_bytes())
        checkpoint.write(folder / network_folder.WEIGHTS, state)

    if not run.main:
        return run.finish(fill, [])
    generator = build(config)
    generator.load_state_dict(state)
    count = settings.judged
    noise = torch.randn(count, *data.shape, generator=torch.Generator().manual_seed(_EVAL_SEED))
    made = generated(generator.eval(), noise)
    real = judge.sees(spread(data.test, count).float() / 255)
    figures = {"parameters": float(sum(each.numel() for each in denoiser.parameters()))}
    figures |= fitted.figures | judge.figures(made, real)
    if settings.latency:
        figures |= deploy.figures(run, {"diffusion": fill})["diffusion"]
    gauss = gaussian(train, noise)
    floor = train.pixels[torch.randperm(len(train), generator=torch.Generator().manual_seed(1))]
    results = [
        Result("diffusion", figures),
        Result("gaussian", judge.figures(gauss, real)),
        Result("training images", judge.figures(floor[:count].float() / 255, real)),
    ]
    remarks = [
        f"{count:,} images of each row beside as many test images, by the features of a classifier"
        " of our own: comparable within this table alone",
        "gaussian: drawn with the mean and the covariance of all pixels, which needs no training;"
        " training images: the least distance that can be expected",
    ]

    def filled(folder: Path) -> None:
        fill(folder)
        _fs.write_atomic(folder / "samples.png", sheet(made[:64]))

    return run.finish(filled, results, remarks)


def denoising(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean squared error of v, summed over the images; times and noise by torch's generator."""
    pixels = batch[0].float() / 127.5 - 1
    time = torch.rand(len(pixels), device=pixels.device)
    return _errors(model, pixels, time, torch.randn_like(pixels)).sum()


def _errors(
    model: nn.Module, image: torch.Tensor, time: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    alpha, sigma = (each.view(-1, 1, 1, 1) for each in shares(time))
    found = model(alpha * image + sigma * noise, time).float()
    return (found - (alpha * noise - sigma * image)).square().mean(dim=(1, 2, 3))


def _evaluation(test: Images) -> Callable[[nn.Module], dict[str, float]]:
    """The same error on held-out images, with the same times and noise whenever it is asked."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        random = torch.Generator().manual_seed(_EVAL_SEED)
        device = next(model.parameters()).device
        total = 0.0
        for pixels in test.pixels.split(_EVAL_BATCH):
            image = (pixels.float() / 127.5 - 1).to(device)
            time = torch.rand(len(image), generator=random).to(device)
            noise = torch.randn(image.shape, generator=random).to(device)
            total += float(_errors(model, image, time, noise).sum())
        return {"loss": total / len(test)}

    return evaluate


@torch.no_grad()
def generated(generator: nn.Module, noise: torch.Tensor) -> torch.Tensor:
    """Images of all of ``noise``, on the CPU."""
    device = next(generator.parameters()).device
    return torch.cat([generator(each.to(device)).cpu() for each in noise.split(_EVAL_BATCH)])


def spread(images: Images, count: int) -> torch.Tensor:
    """Pixels of at most ``count`` images from all over: those of a folder lie class by class."""
    count = min(count, len(images))
    return images.pixels[torch.arange(count) * len(images) // count]


def gaussian(train: Images, noise: torch.Tensor) -> torch.Tensor:
    """Images with the mean and the covariance of the training pixels, made of ``noise``."""
    flat = train.pixels.flatten(1).double() / 255
    values, vectors = torch.linalg.eigh(flat.T.cov())
    drawn = noise.flatten(1).double() * values.clamp(min=0).sqrt() @ vectors.T + flat.mean(0)
    return drawn.clamp(0, 1).float().view_as(noise)


def sheet(made: torch.Tensor) -> bytes:
    """A PNG with the images [count, channels, height, width], from 0 to 1, in rows of eight."""
    from PIL import Image

    rows = [torch.cat(list(row), dim=2) for row in made.split(8)]
    rows = [F.pad(row, (0, rows[0].shape[2] - row.shape[2])) for row in rows]
    pixels = (torch.cat(rows, dim=1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    picture = Image.fromarray(pixels.numpy().squeeze())
    picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


RECIPE = Recipe(
    "diffusion",
    DiffusionSettings(
        steps=1200,
        batch=64,
        lr=2e-3,
        ema=0.995,
        eval_every=400,
        checkpoint_every=100,
        weight_decay=0.0,
        precision="bf16",
    ),
    run,
)
