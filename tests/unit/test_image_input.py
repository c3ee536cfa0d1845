"""Every kind of image becomes the right tensor, or one clear error."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgekit.errors import SourceError, UsageError
from edgekit.image_input import tensor
from edgekit.image_processor import flips_channels
from edgekit.preprocess import ImageSteps, of_folder

SIDE = 8
# Pixels of 0 to 255 as they are, resized to 8 x 8.
PLAIN = ImageSteps(
    *("pixel_values", SIDE, SIDE, None, SIDE, SIDE, False, "bilinear", 1.0),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
RED = np.full((SIDE, SIDE, 3), (200, 30, 10), np.uint8)


def _colour(found: Any) -> tuple[int, ...]:
    """Of an image of one colour."""
    assert found.shape == (1, 3, SIDE, SIDE) and found.dtype == np.float32
    assert np.ptp(found, axis=(2, 3)).max() <= 2
    return tuple(int(x) for x in np.rint(found.mean(axis=(0, 2, 3))))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _bomb() -> bytes:
    """A PNG of a few bytes that says it has 900 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


IMAGE = Image.fromarray(RED)
WAYS: dict[str, Callable[[], Any]] = {
    "array": lambda: RED,
    "floats": lambda: RED.astype(np.float32) / 255,
    "PIL": lambda: IMAGE,
    "png": lambda: _encoded(IMAGE, "PNG"),
    "jpeg": lambda: _encoded(IMAGE, "JPEG", quality=100, subsampling=0),
    "webp": lambda: _encoded(IMAGE, "WEBP", lossless=True),
    "palette": lambda: _encoded(IMAGE.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "opaque": lambda: _encoded(IMAGE.convert("RGBA"), "PNG"),
    "animated": lambda: _encoded(
        IMAGE, "GIF", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_picture_gives_one_tensor_whatever_holds_it(way: str) -> None:
    assert _colour(tensor(WAYS[way](), PLAIN)) == pytest.approx((200, 30, 10), abs=3)


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    IMAGE.save(path)
    assert _colour(tensor(path, PLAIN)) == _colour(tensor(str(path), PLAIN)) == (200, 30, 10)


def test_print_colours_16_bits_and_grey_keep_their_light() -> None:
    grey = np.full((SIDE, SIDE), 128, np.uint8)
    assert _colour(tensor(grey, PLAIN)) == (128, 128, 128)
    deep = Image.fromarray(np.full((SIDE, SIDE), 128 * 257, np.uint16))
    assert _colour(tensor(_encoded(deep, "PNG"), PLAIN)) == pytest.approx((128,) * 3, abs=1)
    cmyk = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))
    assert _colour(tensor(_encoded(cmyk, "JPEG", quality=100), PLAIN))[0] > 200


def test_what_is_transparent_shows_white() -> None:
    clear = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    assert _colour(tensor(_encoded(clear, "PNG"), PLAIN)) == (255, 255, 255)


def test_a_turned_photograph_stands_upright() -> None:
    wide = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    wide[:, SIDE:] = 255  # white on the right, which the camera says is the bottom
    exif = Image.Exif()
    exif[0x0112] = 6
    found = tensor(_encoded(Image.fromarray(wide), "PNG", exif=exif), PLAIN)
    assert found[0, 0, 0].mean() < 60 < 200 < found[0, 0, -1].mean()


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"no image at all",
        _encoded(IMAGE, "JPEG")[:200],
        _encoded(IMAGE, "PNG")[:-40],
        _bomb(),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 7), np.uint8),
        np.full((4, 4, 3), np.nan, np.float32),
        np.full((4, 4, 3), 300, np.int32),
        "no/such/file.png",
        "a\0b",
        None,
        7,
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, np.ndarray) else str(value.shape),
)
def test_what_is_no_image_is_one_clear_error(broken: Any) -> None:
    with pytest.raises(UsageError) as error:
        tensor(broken, PLAIN)
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "folder",
    [
        {"size": {"height": 24, "width": 24}, "resample": 3},
        {"size": {"shortest_edge": 28}, "do_center_crop": True, "crop_size": 24, "resample": 2},
    ],
    ids=["exact", "edge and crop"],
)
def test_pixels_are_those_of_transformers(folder: dict[str, Any]) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    body = folder | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    steps = of_folder({"image_size": 24}, preprocessor=body).image
    assert steps is not None
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    theirs = ViTImageProcessorPil(**body)(Image.fromarray(picture), return_tensors="np")
    assert tensor(picture, steps) == pytest.approx(theirs["pixel_values"], abs=0.03)


EDGE = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
OWN_STEPS = {
    "efficientnet": ("EfficientNet", EDGE | {"size": {"height": 24, "width": 24}, "resample": 2}),
    "offset": (
        "EfficientNet",
        {"size": {"height": 24, "width": 24}, "resample": 3, "rescale_offset": True},
    ),
    "only divided": (
        "EfficientNet",
        EDGE | {"size": {"height": 24, "width": 24}, "do_normalize": False},
    ),
    "cut by share": ("ConvNext", EDGE | {"size": {"shortest_edge": 24}, "resample": 2}),
    "squeezed": ("ConvNext", EDGE | {"size": {"shortest_edge": 384}, "resample": 2}),
    "square": ("DeiT", {"size": 28, "crop_size": 24}),
    "edge": ("MobileNetV2", {"size": 28, "crop_size": 24}),
    "contrast": ("CLIP", {"size": 28, "crop_size": 24}),
    "blue first": ("MobileViT", {"size": 28, "crop_size": 24}),
}


@pytest.mark.parametrize("name", OWN_STEPS)
def test_steps_of_single_classes_are_theirs(name: str) -> None:
    import transformers

    kind, body = OWN_STEPS[name]
    given = body | {"image_processor_type": f"{kind}ImageProcessor"}
    steps = of_folder({"image_size": 24}, preprocessor=given).image
    assert steps is not None
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**body)
    theirs = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"]
    if flips_channels(given):  # the weights are turned instead (exporters/torch_model.py)
        theirs = theirs[:, ::-1]
    assert tensor(picture, steps) == pytest.approx(theirs, abs=0.08)


@pytest.mark.parametrize("absurd", [{"crop_pct": 0}, {"crop_pct": "x"}, {"image_std": 3}])
def test_absurd_steps_of_a_class_are_one_clear_error(absurd: dict[str, Any]) -> None:
    body = {"image_processor_type": "ConvNextImageProcessor", "size": 24, "include_top": True}
    with pytest.raises(SourceError):
        of_folder({"image_size": 24}, preprocessor=body | absurd)
