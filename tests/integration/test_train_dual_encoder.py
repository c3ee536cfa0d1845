"""dual-encoder: pictures with captions, two encoders that learn to match them, and their export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from training_data import digit_folder

import edgekit
from edgekit.errors import DataError, RecipeError
from edgekit.exporter import export
from edgekit.training import captioned_digits, dual_encoder, images
from edgekit.training.captioned_digits import CAPTIONS, Scenes
from edgekit.training.recipe import train

TOY = (
    *("side=16", "patch=4", "width=32", "depth=1", "text_depth=1", "heads=2", "space=16"),
    *("scenes=2000", "test_scenes=200", "threads=1", "steps=120", "batch=32", "lr=3e-3"),
    *("log_every=40", "eval_every=60", "latency=no"),
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digit_folder(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pairs"
    pairs = [f"data={digits}", *TOY]
    train("dual-encoder", pairs, out, resume=False, say=lambda status: None)
    return out


def scenes(digits: Path, allowed: torch.Tensor, count: int = 60) -> Scenes:
    found = images.load(str(digits), side=28, channels=1)
    return Scenes(found.train, count, side=32, seed=0, allowed=allowed)


def test_one_in_ten_captions_is_kept_from_training(digits: Path) -> None:
    unseen = captioned_digits.unseen()
    assert len(CAPTIONS) == 600 and int(unseen.sum()) == 60
    captions = scenes(digits, ~unseen, 5000).captions
    assert not unseen[captions].any() and len(captions.unique()) > 500


def test_a_picture_shows_what_its_caption_says(digits: Path) -> None:
    data = scenes(digits, torch.ones(len(CAPTIONS), dtype=torch.bool), 200)
    pixels, captions = data.batch(torch.arange(200))
    torch.testing.assert_close(pixels, data.batch(torch.arange(200))[0])
    for picture, number in zip(pixels, captions, strict=True):
        words = CAPTIONS[number]
        ink = (picture.amax(0) > 0.6).float()
        rows, columns = ink.sum(1), ink.sum(0)
        y = float((rows * torch.arange(32)).sum() / rows.sum())
        x = float((columns * torch.arange(32)).sum() / columns.sum())
        if "small" in words:
            assert ("top" in words) == (y < 13) and ("left" in words) == (x < 13), words
        mean = (picture * ink).sum((1, 2))
        if " red " in words:
            assert mean[0] > 1.5 * mean[1]
        if " white " in words:
            assert mean.min() > 0.8 * mean.max()


def test_tokens_are_words_between_marks() -> None:
    words = captioned_digits.tokenizer()
    ids = captioned_digits.tokens(words, ["A large red seven", "a small banana in the centre"])
    assert ids.shape == (2, 8)
    assert words.decode(ids[0].tolist(), skip_special_tokens=False) == (
        "<start> a large red seven <end> <pad> <pad>"
    )
    assert words.id_to_token(int(ids[1][3])) == "<unk>"


def test_pictures_that_share_a_caption_are_each_others() -> None:
    likeness = torch.tensor([[5.0, 5.0, -9.0], [5.0, 5.0, -9.0], [-9.0, -9.0, 5.0]])

    class Fixed(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> object:
            return type("Found", (), {"logits_per_image": likeness})

    loss = dual_encoder.contrastive(torch.zeros(600, 4, dtype=torch.int64))
    shared = loss(Fixed(), (torch.zeros(3, 1), torch.tensor([7, 7, 9])))
    alone = loss(Fixed(), (torch.zeros(3, 1), torch.tensor([7, 8, 9])))
    # log 2 for each of the four that have two right answers, halved.
    assert float(shared) == pytest.approx(2 * np.log(2), abs=1e-4)
    assert float(alone) == pytest.approx(2 * np.log(2), abs=1e-4)


def test_the_loss_is_the_mean_of_both_ways_to_look() -> None:
    """Of a batch whose captions all differ: section 2.3's pseudocode."""
    torch.manual_seed(0)
    likeness = torch.randn(5, 5) * 3  # of no symmetry

    class Fixed(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> object:
            return type("Found", (), {"logits_per_image": likeness})

    loss = dual_encoder.contrastive(torch.zeros(600, 4, dtype=torch.int64))
    own = torch.arange(5)
    expected = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
    found = loss(Fixed(), (torch.zeros(5, 1), own * 7))
    torch.testing.assert_close(found / 5, expected)


def test_the_scale_of_likenesses_is_100_at_most(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dual_encoder._config

    def begun_far_above(settings: dual_encoder.DualEncoderSettings, n_vocab: int) -> object:
        config = made(settings, n_vocab)
        assert config.logit_scale_init_value == pytest.approx(np.log(1 / 0.07), abs=1e-3)
        config.logit_scale_init_value = 6.0
        return config

    monkeypatch.setattr(dual_encoder, "_config", begun_far_above)
    more = ("scenes=40", "test_scenes=20", "steps=1", "eval_every=0", "baseline=no")
    given = {pair.partition("=")[0]: pair for pair in (*TOY, *more)}
    out = tmp_path / "out"
    pairs = [f"data={digits}", *given.values()]
    train("dual-encoder", pairs, out, resume=False, say=lambda status: None)
    scale = load_file(out / "model.safetensors")["logit_scale"].exp()
    assert float(scale) == pytest.approx(100, rel=1e-5)


def test_what_is_found_among_the_first_is_counted_both_ways() -> None:
    captions = torch.tensor([4, 4, 1, 0])  # of 8, five of which no picture shows
    logits = torch.zeros(4, 8)
    logits[0, 4], logits[2, 1] = 9.0, 9.0
    logits[1] = torch.tensor([5.0, 6.0, 3.0, 4.0, 0.0, 1.0, 2.0, 7.0])  # its own comes last
    logits[3] = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5, 0.0, -1.0, -2.0])  # its own is the fourth
    found = dual_encoder.retrieval(logits, captions)
    assert found["caption_recall_5"] == pytest.approx(3 / 4)
    # Caption 0 finds picture 1 first, captions 1 and 4 their own; of four pictures all are near.
    assert found["picture_recall_1"] == pytest.approx(2 / 3)
    assert found["picture_recall_5"] == 1.0
    best = dual_encoder.retrieval(F.one_hot(captions, 8).float(), captions)
    assert set(best.values()) == {1.0}


@pytest.mark.slow
def test_the_pair_learns_and_the_baseline_is_beside_it(run: Path) -> None:
    body = json.loads((run / "training.json").read_text())
    clip, heads = (row["figures"] for row in body["results"])
    for side in (clip, heads):  # toy steps: a part of the attributes, no whole captions
        assert side["loss"] < np.log(len(CAPTIONS)) - 0.2
    assert set(heads) >= {"accuracy", "accuracy_unseen", "parameters"}
    assert body["phases"][0]["steps"] == body["phases"][1]["steps"] == 120


@pytest.mark.slow
def test_both_encoders_are_timed_after_export(digits: Path, tmp_path: Path) -> None:
    more = ("scenes=200", "steps=2", "eval_every=0", "baseline=no", "latency=yes")
    given = {pair.partition("=")[0]: pair for pair in (*TOY, *more)}
    pairs = [f"data={digits}", *given.values()]
    body = train("dual-encoder", pairs, tmp_path / "out", resume=False, say=lambda status: None)
    (clip,) = (row["figures"] for row in body["results"])
    assert clip["image_ms"] > 0 and clip["text_ms"] > 0
    # Both graphs: the file of the images alone has less than half of the weights.
    weights = 4 * clip["parameters"]
    assert weights < clip["onnx_bytes"] < 2 * weights + 200_000


@pytest.mark.slow
def test_the_export_matches_pictures_and_words_as_torch_does(
    run: Path, digits: Path, tmp_path: Path
) -> None:
    from transformers import CLIPModel

    found = export(run, "onnx", bits=32, out=tmp_path / "onnx")
    assert found.receipt["status"] == "proven"
    plain = CLIPModel.from_pretrained(run).eval()
    texts = ["a large red seven at the top left", "a small blue one in the centre"]
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels = torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0).float() / 255
    ids = captioned_digits.tokens(captioned_digits.tokenizer(), texts)
    with torch.no_grad():
        wanted = plain(input_ids=ids, pixel_values=pixels).logits_per_image.softmax(1)[0]
    with edgekit.load(found) as model:
        answers = dict(model.classify(picture, labels=texts))
    assert [answers[text] for text in texts] == pytest.approx(wanted.tolist(), abs=1e-3)


def test_what_does_not_go_together_is_refused(digits: Path, tmp_path: Path) -> None:
    def tried(*pairs: str) -> None:
        train("dual-encoder", pairs, tmp_path / "out", resume=False, say=lambda status: None)

    with pytest.raises(RecipeError):
        tried(f"data={digits}", "side=30", "patch=4")
    with pytest.raises(RecipeError, match="shards"):
        tried(f"data={digits}", "parallel=fsdp")
    for digit in range(3):
        for path in sorted((digits / str(digit)).glob("*")):
            target = tmp_path / "three" / str(digit) / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="3 classes"):
        tried(f"data={tmp_path / 'three'}")
