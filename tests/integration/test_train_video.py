"""video: clips whose motion is the class, a network that needs their order, and its export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_data import digit_folder

import edgekit
from edgekit.errors import RecipeError
from edgekit.exporter import export
from edgekit.training import images, video
from edgekit.training.moving_digits import MOTIONS, Clips
from edgekit.training.recipe import train

TOY = ("frames=4", "side=16", "widths=8,16", "part=4", "clips=400", "test_clips=200", "threads=1")
MORE = ("steps=90", "batch=32", "lr=1e-2", "log_every=30", "eval_every=45", "latency=no")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_folder(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "video"
    train("video", [f"data={digits}", *TOY, *MORE], out, resume=False, say=lambda status: None)
    return out


def clips(digits: Path, count: int = 80, seed: int = 0) -> Clips:
    found = images.load(str(digits), side=28, channels=1)
    return Clips(found.train, count, frames=5, side=32, seed=seed)


def test_a_sample_is_always_the_same_and_seeds_differ(digits: Path) -> None:
    numbers = torch.tensor([3, 17, 3])
    one, again, other = (clips(digits, seed=s).batch(numbers) for s in (0, 0, 1))
    assert one[0].shape == (3, 5, 32, 32)
    torch.testing.assert_close(one[0], again[0])
    torch.testing.assert_close(one[0][0], one[0][2])
    assert not torch.equal(one[0], other[0])


def test_digits_go_where_their_class_says(digits: Path) -> None:
    frames, classes = clips(digits).batch(torch.arange(80))
    weights = frames / frames.sum(dim=(2, 3), keepdim=True)
    x = (weights.sum(2) * torch.arange(32)).sum(2)
    y = (weights.sum(3) * torch.arange(32)).sum(2)
    ink = frames.sum(dim=(2, 3))
    for name, way in (
        *(("left", -(x[:, -1] - x[:, 0])), ("right", x[:, -1] - x[:, 0])),
        *(("up", -(y[:, -1] - y[:, 0])), ("down", y[:, -1] - y[:, 0])),
        *(("growing", ink[:, -1] - ink[:, 0]), ("shrinking", ink[:, 0] - ink[:, -1])),
    ):
        mine = way[classes == MOTIONS.index(name)]
        assert len(mine) and (mine > 2).all(), name


def test_shifts_bring_neighbours_and_zeros_at_the_ends() -> None:
    clip = torch.arange(2 * 3 * 4.0).view(6, 4, 1, 1) + 1  # two clips of three frames
    found = video.TemporalShift(3, 4)(clip).view(2, 3, 4)
    given = clip.view(2, 3, 4)
    torch.testing.assert_close(found[:, :2, 0], given[:, 1:, 0])  # from the frame after
    torch.testing.assert_close(found[:, 1:, 1], given[:, :2, 1])  # from the frame before
    assert (found[:, 2, 0] == 0).all() and (found[:, 0, 1] == 0).all()
    torch.testing.assert_close(found[:, :, 2:], given[:, :, 2:])


def test_without_shifts_the_order_of_frames_means_nothing() -> None:
    torch.manual_seed(0)
    clip = torch.rand(2, 4, 16, 16)
    for part, same in ((0, True), (4, False)):
        network = video.Tsm(4, len(MOTIONS), [8, 16], part).eval()
        with torch.no_grad():
            assert torch.allclose(network(clip), network(clip.flip(1)), atol=1e-5) == same


def test_the_report_shows_what_the_order_is_worth(run: Path) -> None:
    body = json.loads((run / "training.json").read_text())
    shift, none = (row["figures"] for row in body["results"])
    assert shift["parameters"] == none["parameters"]
    assert none["accuracy"] < 0.58  # a half, and chance
    assert shift["accuracy"] > none["accuracy"] + 0.05


@pytest.mark.slow
def test_the_export_is_proven_and_answers_as_torch(run: Path, tmp_path: Path) -> None:
    found = export(run, "onnx", type="F32", out=tmp_path / "onnx")
    assert found.receipt["status"] == "proven"
    network = video.build(json.loads((run / "network.json").read_text())["config"])
    from safetensors.torch import load_file

    network.load_state_dict(load_file(run / "model.safetensors"))
    clip = torch.rand(3, 4, 16, 16)
    with edgekit.load(found) as model, torch.no_grad():
        (answer,) = model.run({"clip": clip.numpy()}).values()
        torch.testing.assert_close(
            torch.from_numpy(answer), network.eval()(clip), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("pair", ["widths=4,8", "frames=1", "part=1", "clips=0"])
def test_settings_that_do_not_go_together_are_refused(
    digits: Path, tmp_path: Path, pair: str
) -> None:
    pairs = [each for each in TOY if each.partition("=")[0] != pair.partition("=")[0]]
    with pytest.raises(RecipeError):
        train(
            *("video", [f"data={digits}", *pairs, pair], tmp_path / "out"),
            resume=False,
            say=lambda status: None,
        )
