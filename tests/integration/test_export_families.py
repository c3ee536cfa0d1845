"""DeiT, MobileNet and EfficientNet of transformers answer to an image alike as ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_torch
import torch
from PIL import Image

import edgekit
from edgekit.exporter import export

FOLDERS = {
    "deit": tiny_torch.deit_folder,
    "mobilenet": tiny_torch.mobilenet_folder,
    "efficientnet": tiny_torch.efficientnet_folder,
}
# The least cosine with the float model that 8 bits keep of such random weights.
LEAST = {"deit": 0.99, "mobilenet": 0.9, "efficientnet": 0.97}


@pytest.fixture(scope="module", params=FOLDERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(FOLDERS[request.param](tmp_path_factory.mktemp("family") / request.param))


def test_a_float_export_answers_to_an_image_as_transformers_does(
    family: Path, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    artifact = export(family, "onnx", bits=32, out=tmp_path / "out", receipt=False)
    model = AutoModelForImageClassification.from_pretrained(family).eval()
    picture = _picture()
    pixels = AutoImageProcessor.from_pretrained(family)(picture, return_tensors="pt")
    noise = torch.randn(2, 3, tiny_torch.SIDE, tiny_torch.SIDE)
    with torch.no_grad():
        shares = model(**pixels).logits.softmax(-1)[0]
        wanted = model(noise).logits.numpy()
    with edgekit.load(artifact) as session:
        classes = dict(session.classify(picture, top=len(tiny_torch.LABELS)))
        found = session.run({"pixel_values": noise.numpy()})["logits"]
    assert _cosine(found, wanted) == pytest.approx(1, abs=1e-6)
    assert [classes[label] for label in tiny_torch.LABELS] == pytest.approx(
        shares.tolist(), abs=0.01
    )


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("deit", "mobilenet")),
        "efficientnet",
    ],
)
def test_static_int8_keeps_the_answers(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path / "model")
    artifact = export(folder, "onnx", type="static_wi8_ai8", chunks=8, out=tmp_path / "out")
    assert artifact.receipt["status"] == "proven"
    assert artifact.receipt["agreement"]["cosine"]["value"] > LEAST[name]
    with edgekit.load(artifact) as session:
        (label, share), *_ = session.classify(_picture())
    assert label in tiny_torch.LABELS and 0 < share < 1


def _picture() -> Image.Image:
    """Wider than high, and smooth enough that no filter of a resize stands out."""
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((60, 44), Image.Resampling.BICUBIC)


def _cosine(one: np.ndarray, two: np.ndarray) -> float:
    return float((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two))
