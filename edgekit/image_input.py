"""Images to tensors: opens, turns upright, resizes, crops and normalizes as Preprocessing says.

Must never let a file take more memory than an image of the allowed size; knows no model.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from edgekit.errors import MissingExtraError, UsageError
from edgekit.preprocess import ImageSteps

MAX_PIXELS = 100_000_000  # a camera's; more is a decompression bomb
_MAX_FILE_BYTES = 256 << 20
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def tensor(image: Any, steps: ImageSteps) -> Any:
    """A path, bytes, a PIL image, or an array [height, width(, channels)] of 0 to 255 (uint8) or 0
    to 1 (float) -> float32 [1, channels, height, width].

    Of an animation the first frame counts; the orientation in EXIF is applied; transparency lies on
    white. Raises UsageError for what is no image, MissingExtraError without pillow.
    """
    import numpy as np

    picture = _fitted(_opened(image, len(steps.mean)), steps)
    values = np.asarray(picture, dtype=np.float32)
    if values.ndim == 2:
        values = values[:, :, None]
    mean, std = (np.array(each, dtype=np.float32) for each in (steps.mean, steps.std))
    values = (values * np.float32(steps.scale) - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def _pil() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("ort", missing="pillow") from None
    return Image


def _opened(image: Any, channels: int) -> Any:
    """A PIL image in RGB, or in grey for a model of one channel."""
    library = _pil()
    from PIL import ImageOps

    name = "the image"
    if isinstance(image, str | Path):
        name, image = str(image), _bytes(Path(image))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bomb is refused below, whatever PIL thinks of it
            if isinstance(image, bytes | bytearray):
                picture = library.open(io.BytesIO(image), formats=_FORMATS)
            elif isinstance(image, library.Image):
                picture = image
            else:
                picture = library.fromarray(_pixels(image))
            if picture.width * picture.height > MAX_PIXELS:
                raise UsageError(
                    f"{name} has {picture.width} x {picture.height} pixels, more than {MAX_PIXELS}"
                )
            picture.seek(0) if getattr(picture, "is_animated", False) else picture.load()
            return _in_colour(library, ImageOps.exif_transpose(picture), channels)
    except UsageError:
        raise
    except library.UnidentifiedImageError:
        raise UsageError(
            f"{name} is no image that can be read (none of {', '.join(_FORMATS)})"
        ) from None
    except Exception as error:  # PIL's plugins raise what they like over broken files
        raise UsageError(f"{name} is no image that can be read ({error})"[:300]) from None


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    if len(raw) > _MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB")
    return raw


def _pixels(array: Any) -> Any:
    """uint8 [height, width] or [height, width, 3 or 4]."""
    import numpy as np

    values = np.asarray(array)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if not values.size or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] > 4):
        raise UsageError(
            f"an image is an array [height, width, channels], not of the shape {values.shape}"
        )
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise UsageError("an image of floats has values from 0 to 1")
        values = np.rint(values * 255)
    elif values.dtype.kind not in "ub" and (values.min() < 0 or values.max() > 255):
        raise UsageError("an image of whole numbers has values from 0 to 255")
    return values.astype(np.uint8)


def _in_colour(library: Any, picture: Any, channels: int) -> Any:
    import numpy as np

    if picture.mode.startswith(("I", "F")):  # 16 bits and more: PIL would cut them off at 255
        values = np.asarray(picture, dtype=np.float64)
        most = 65535 if picture.mode.startswith("I") else max(1.0, float(values.max()))
        picture = library.fromarray(np.uint8(np.clip(values / most * 255, 0, 255)))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = library.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = library.alpha_composite(white, picture)
    return picture.convert("L" if channels == 1 else "RGB")


def _fitted(picture: Any, steps: ImageSteps) -> Any:
    """Resized, and cut to the model's size."""
    resample = _pil().Resampling[steps.resample.upper()]
    if steps.shortest_edge is not None:
        short = min(picture.size)
        size = tuple(max(1, int(steps.shortest_edge * side / short)) for side in picture.size)
        picture = picture.resize(size, resample)
    elif steps.resize_height is not None and steps.resize_width is not None:
        picture = picture.resize((steps.resize_width, steps.resize_height), resample)
    if picture.size == (steps.width, steps.height):
        return picture
    if not steps.crop:
        return picture.resize((steps.width, steps.height), resample)
    left, top = (picture.width - steps.width) // 2, (picture.height - steps.height) // 2
    # Beyond the edge of a smaller image lies black.
    return picture.crop((left, top, left + steps.width, top + steps.height))
