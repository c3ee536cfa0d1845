"""A model of two encoders becomes one artifact that puts images and texts where the model did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_torch
import torch
from PIL import Image

import edgekit
from edgekit.artifact import Artifact
from edgekit.errors import UnsupportedModelError, UsageError
from edgekit.export_again import reprove
from edgekit.exporter import export

TEXTS = ["a cat sits on the mat", "a dog", "many words of a longer text"]


@pytest.fixture(scope="module", params=["CLIP", "Siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tiny_torch.clip_folder(tmp_path_factory.mktemp("two") / "model", request.param)
    return made


@pytest.fixture(scope="module")
def in_float(folder: Path) -> Artifact:
    return export(folder, "onnx", bits=32, out=folder.parent / "float", receipt=False)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("clip")
    return export(
        tiny_torch.clip_folder(folder / "model"), "onnx", bits=8, chunks=8, out=folder / "out"
    )


def _picture(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_both_encoders_and_the_likeness_are_those_of_transformers(
    folder: Path, in_float: Artifact
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # As in training: every text of the full length. Of CLIP it changes nothing, and is left out.
    tokenizer.enable_padding(length=32)
    ids = torch.tensor([row.ids for row in tokenizer.encode_batch(TEXTS)])
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=torch.from_numpy(pixels))
    with edgekit.load(in_float, n_threads=1) as session:
        images = session.run({"pixel_values": pixels})["image_embeds"]
        texts = np.array([session.embed(text) for text in TEXTS])
        picture = _picture(0)
        shares = dict(session.classify(picture, labels=TEXTS))
        seen = np.array(session.embed_image(picture))
        matching = session._matching
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    assert images == pytest.approx(expected.image_embeds.numpy(), abs=1e-4)
    assert texts == pytest.approx(expected.text_embeds.numpy(), abs=1e-4)
    logits = matching.scale * images @ texts.T + matching.bias
    assert logits == pytest.approx(expected.logits_per_image.numpy(), abs=2e-3)
    logits = torch.from_numpy(matching.scale * texts @ seen + matching.bias)
    wanted = logits.sigmoid() if matching.alone else logits.softmax(0)
    assert [shares[text] for text in TEXTS] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_text_a_path_and_an_image_are_told_apart(in_float: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "a cat.png"
    Image.fromarray(_picture(1)).save(path)
    with edgekit.load(in_float, n_threads=1) as session:
        image = session.embed_image(str(path))
        assert session.embed(path) == image == session.embed(path.read_bytes())
        assert session.embed([_picture(1), path])[1] == pytest.approx(image, abs=1e-4)
        assert session.embed(str(path)) != pytest.approx(image, abs=1e-2)  # a text of these words
        for wrong in (["a cat", path], []):
            with pytest.raises(UsageError):
                session.embed(wrong)


def test_what_cannot_be_asked_is_one_clear_error(in_float: Artifact) -> None:
    with edgekit.load(in_float, n_threads=1) as session:
        for labels in (None, [], "a cat", ["a cat", 7]):
            with pytest.raises(UsageError):
                session.classify(_picture(0), labels=labels)
        with pytest.raises(UsageError, match="pixel_values"):
            session.run({})
        with pytest.raises(UsageError, match="input_ids"):
            session.run({"wrong": np.zeros(1)})


def test_the_receipt_speaks_of_both_encoders_and_of_their_ranking(clip: Artifact) -> None:
    receipt = clip.receipt
    assert receipt["status"] == "proven"
    assert receipt["agreement"]["cosine"]["value"] > 0.99
    assert receipt["text_agreement"]["cosine"]["value"] > 0.99
    assert receipt["text_latency"]["ms"] > 0
    assert receipt["ranking"]["order"]["value"] > 0.95
    parts = [clip.path / name for name in ("model.onnx", "text.onnx")]
    assert receipt["size"]["size_bytes"] == sum(path.stat().st_size for path in parts)
    clip.verify()
    now, differing = reprove(clip)
    assert differing == [] and now.ranking is not None


def test_the_command_line_ranks_labels_for_a_picture(clip: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(_picture(2)).save(path)
    words = [sys.executable, "-m", "edgekit", "run", str(clip.path), str(path), "--json"]
    labels = [word for text in TEXTS for word in ("--label", text)]
    classes = json.loads(subprocess.check_output([*words, *labels]))["classes"]
    assert {each["label"] for each in classes} == set(TEXTS)
    assert sum(each["probability"] for each in classes) == pytest.approx(1)
    with edgekit.load(clip, n_threads=1) as session:
        vector = session.embed(path)
    assert json.loads(subprocess.check_output(words))["embedding"] == pytest.approx(
        vector, abs=1e-3
    )


def test_a_folder_without_a_tokenizer_file_says_how_to_make_one(tmp_path: Path) -> None:
    folder = tiny_torch.clip_folder(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        export(folder, "onnx", bits=32, out=tmp_path / "out", receipt=False)
