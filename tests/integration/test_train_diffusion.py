"""diffusion: shares of noise, steps back from it, the distance that judges, and the export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import digit_folder

import edgekit
from edgekit.errors import RecipeError
from edgekit.exporter import export
from edgekit.training import diffusion, image_judge, images
from edgekit.training.recipe import train

TOY = (
    *("side=12", "widths=16,16", "blocks=1", "generate=4", "judged=100", "judge_steps=40"),
    *("steps=150", "batch=32", "lr=5e-3", "ema=0.9", "threads=1", "log_every=50"),
    *("eval_every=75", "latency=no"),
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_folder(tmp_path_factory.mktemp("data") / "digits", each=15)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    train("diffusion", [f"data={digits}", *TOY], out, resume=False, say=lambda status: None)
    return out


def test_shares_keep_the_variance_and_end_in_noise() -> None:
    alpha, sigma = diffusion.shares(torch.linspace(0, 1, 50))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(50))
    assert alpha[0] == 1 and alpha[-1] < 0.002 and (alpha.diff() < 0).all()


class _Perfect(torch.nn.Module):
    """Knows the one image there is, and so its v."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self.image = image
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (each.view(-1, 1, 1, 1) for each in diffusion.shares(time))
        noise = (x - alpha * self.image) / sigma.clamp(min=1e-6)
        return alpha * noise - sigma * self.image


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_a_perfect_denoiser_leads_any_noise_to_its_image(steps: int) -> None:
    image = torch.rand(1, 1, 8, 8) * 2 - 1
    generator = diffusion.Generator(1, [8, 8], 1, steps)
    generator.denoiser = _Perfect(image)
    with torch.no_grad():
        found = generator(torch.randn(3, 1, 8, 8))
    wanted = ((image + 1) / 2).expand(3, 1, 8, 8)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_perfect_denoiser_has_no_loss_and_a_blind_one_that_of_v() -> None:
    pixels = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
    perfect = _Perfect(pixels.float() / 127.5 - 1)
    torch.manual_seed(0)
    batch = (pixels.expand(64, 1, 8, 8), torch.zeros(64))
    assert float(diffusion.denoising(perfect, batch)) < 1e-6
    torch.manual_seed(0)
    blind = float(diffusion.denoising(lambda x, time: torch.zeros_like(x), batch)) / 64
    assert 0.5 < blind < 1.2  # v has about the variance of images and noise


def test_the_distance_is_that_of_two_gaussians() -> None:
    random = torch.Generator().manual_seed(0)
    one = torch.randn(20000, 3, generator=random, dtype=torch.float64)
    assert image_judge.frechet(one, one) == pytest.approx(0, abs=1e-9)
    moved = one + torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    assert image_judge.frechet(one, moved) == pytest.approx(25, rel=1e-6)
    # Covariances C and 4 C: trace(C + 4 C - 2 * 2 C) = trace(C).
    doubled = (one - one.mean(0)) * 2 + one.mean(0)
    assert image_judge.frechet(one, doubled) == pytest.approx(float(one.T.cov().trace()), rel=1e-6)


def test_the_images_that_judge_are_of_all_classes() -> None:
    classes = torch.arange(10).repeat_interleave(20)  # as in a folder
    pixels = classes.to(torch.uint8).view(-1, 1, 1, 1)
    found = diffusion.spread(images.Images(pixels, classes), 50).flatten()
    assert torch.bincount(found.long()).tolist() == [5] * 10
    assert len(diffusion.spread(images.Images(pixels, classes), 1000)) == 200


@pytest.mark.slow
def test_the_run_beats_noise_with_the_same_covariance(run: Path) -> None:
    body = json.loads((run / "training.json").read_text())
    rows = {row["name"]: row["figures"] for row in body["results"]}
    assert list(rows) == ["diffusion", "gaussian", "training images"]
    assert rows["training images"]["frechet"] < rows["gaussian"]["frechet"]
    evaluations = [phase for phase in body["phases"] if phase["name"] == "denoiser"]
    assert evaluations[0]["figures"]["loss"] < 0.5
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_export_makes_the_same_images_from_the_same_noise(run: Path, tmp_path: Path) -> None:
    found = export(run, "onnx", type="F32", out=tmp_path / "onnx")
    assert found.receipt["status"] == "proven"
    from safetensors.torch import load_file

    network = diffusion.build(json.loads((run / "network.json").read_text())["config"])
    network.load_state_dict(load_file(run / "model.safetensors"))
    noise = np.random.default_rng(0).standard_normal((2, 1, 12, 12)).astype(np.float32)
    with edgekit.load(found) as model, torch.no_grad():
        (answer,) = model.run({"noise": noise}).values()
        wanted = network.eval()(torch.from_numpy(noise))
    torch.testing.assert_close(torch.from_numpy(answer), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("pair", ["widths=16", "widths=12,16", "judged=5", "side=13"])
def test_settings_that_do_not_go_together_are_refused(
    digits: Path, tmp_path: Path, pair: str
) -> None:
    pairs = [each for each in TOY if each.partition("=")[0] != pair.partition("=")[0]]
    with pytest.raises(RecipeError):
        train(
            *("diffusion", [f"data={digits}", *pairs, pair], tmp_path / "out"),
            resume=False,
            say=lambda status: None,
        )
