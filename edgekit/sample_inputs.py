"""Inputs to run a model on: the user's own images or texts, or built-in ones.

The part that a model is calibrated on and the part that it is judged by never share an input. Knows
no model and no engine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from edgekit import _fs, image_input, labelled_inputs, preprocess, text_input
from edgekit.errors import UsageError
from edgekit.preprocess import Preprocessing
from edgekit.runtime import TensorSpec

Part = Literal["calibration", "held-out"]
_MAX_TEXT_BYTES = 64 << 20
_TEXTS = {"calibration": "calibration.txt", "held-out": "held_out.txt"}
_BUILTIN = "builtin inputs 2"  # changes whenever the inputs that are made here change
_SIDE = 256
_SIZES = {"batch": 1, "sequence": 16}
_PADDED = 64  # tokens
_FREE = 8  # of an axis with another name
_LABELLED = 1000


@dataclass(frozen=True)
class Samples:
    """Inputs by name for single runs, and what they were made from."""

    feeds: list[dict[str, Any]]
    name: str
    sha256: str


def identity(data: Path | None) -> tuple[str, str]:
    """Name and SHA-256 of a file or of a folder of images; of what is built in for None."""
    if data is None:
        return "builtin", hashlib.sha256(_BUILTIN.encode()).hexdigest()
    if data.is_dir():
        digest = hashlib.sha256()
        for file in _images(data):
            digest.update(f"{file.name} {_fs.sha256_file(file)}\n".encode())
        return data.resolve().name, digest.hexdigest()
    try:
        return data.name, _fs.sha256_file(data)
    except OSError as error:
        raise UsageError(f"cannot read {data}: {error.strerror}") from None


def samples(
    preprocessing: Preprocessing,
    inputs: Sequence[TensorSpec],
    *,
    folder: Path | None,
    data: Path | None,
    count: int,
    part: Part,
) -> Samples:
    """At most ``count`` inputs of one part; ``folder`` holds the tokenizer.

    ``data`` is a folder of images, a UTF-8 text or JSON lines (``labelled_inputs``), of which every
    second image or text belongs to each part. Raises UsageError where it does not suit the model.
    """
    name, digest = identity(data)
    if preprocessing.image is not None:
        images = _own(_given(data, Path), part) if data else _builtin_images(part, count)
        feeds = [
            {preprocessing.image.input: image_input.tensor(each, preprocessing.image)}
            for each in images[:count]
        ]
    elif preprocessing.text is not None:
        assert folder is not None
        tokens = text_input.Tokens(folder, preprocessing.text)
        texts = _own(_given(data, str), part) if data else _builtin_texts(part)
        names = [spec.name for spec in inputs]
        # Every second one as it comes in a batch with a longer one: padding is an input, too.
        fixed = text_input.fixed_length(inputs)
        padded = fixed or min(_PADDED, preprocessing.text.max_length)
        feeds = [
            tokens.tensors([text], names, length=padded if number % 2 or fixed else 1)
            for number, text in enumerate(texts[:count])
        ]
    elif data is not None:
        raise UsageError(
            "this model takes bare tensors: no image and no text can be made into them",
            hint="leave out --eval-data and --calibration",
        )
    else:
        feeds = _random(inputs, part, count)
    if not feeds:
        raise UsageError(f"{data} holds too little to make inputs of")
    return Samples(feeds, name, digest)


def meant_for(steps: Preprocessing, data: Path | None) -> Path | None:
    """``data``, if that encoder of two takes it: a folder holds images, a file is a text."""
    return data if data is not None and data.is_dir() == (steps.image is not None) else None


def batch(model: Path, inputs: Sequence[TensorSpec], size: int) -> dict[str, Any]:
    """One built-in input of the kind that the model in the file ``model`` takes, ``size`` times.

    Raises UsageError where the model takes batches of another size only.
    """
    import numpy as np

    found = samples(
        preprocess.beside(model), inputs, folder=model.parent, data=None, count=1, part="held-out"
    )
    feed: dict[str, Any] = {}
    for spec in inputs:
        value = found.feeds[0][spec.name]
        fixed = spec.shape[0] if spec.shape else None
        if isinstance(fixed, int) and fixed != size:
            raise UsageError(
                f"{spec.name} takes batches of {fixed}, not of {size}", hint=f"--batch {fixed}"
            )
        feed[spec.name] = value if isinstance(fixed, int) else np.concatenate([value[:1]] * size)
    return feed


def _given(data: Path, kind: type) -> list[Any]:
    """Images or texts of the user's own, from a folder, a text, or JSON lines."""
    if data.suffix.lower() != labelled_inputs.LINES:
        return list(_images(data)) if kind is Path else _sentences(_text(data))
    found = labelled_inputs.inputs(data)
    if any(isinstance(each, str) != (kind is str) for each in found):
        raise UsageError(f"{data.name} holds {'images' if kind is str else 'texts'}")
    return sorted(found, key=lambda each: hashlib.sha256(str(each).encode()).digest())


def labelled(
    preprocessing: Preprocessing, inputs: Sequence[TensorSpec], *, folder: Path, data: Path
) -> list[tuple[dict[str, Any], int]]:
    """The held-out part of ``data``'s inputs with their classes, at most 1,000; none where ``data``
    names no classes. ``folder`` holds the tokenizer. Raises UsageError as ``labelled_inputs``.
    """
    found = labelled_inputs.find(data, preprocessing.labels)
    rows: list[tuple[dict[str, Any], int]] = []
    tokens = text_input.Tokens(folder, preprocessing.text) if preprocessing.text else None
    for each in _own(found, "held-out")[:_LABELLED]:
        if preprocessing.image is not None:
            steps = preprocessing.image
            rows.append(({steps.input: image_input.tensor(each.what, steps)}, each.index))
        elif tokens is not None and isinstance(each.what, str):
            rows.append((tokens.tensors([each.what], [spec.name for spec in inputs]), each.index))
    return rows


def _own(found: Sequence[Any], part: Part) -> list[Any]:
    return list(found[0 if part == "calibration" else 1 :: 2])


def _images(folder: Path) -> list[Path]:
    """The images of a folder, those of its subfolders too, by the hash of their names: neighbours
    in a folder are often alike.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder of images")
    files = [path for path in folder.rglob("*") if path.suffix.lower() in image_input.SUFFIXES]
    return sorted(files, key=lambda path: hashlib.sha256(path.name.encode()).digest())


def _text(path: Path | None) -> str:
    assert path is not None
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_TEXT_BYTES + 1)
        if len(raw) > _MAX_TEXT_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_TEXT_BYTES >> 20} MiB")
        return raw.decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the text {path} is not UTF-8") from None


def _sentences(text: str) -> list[str]:
    found = re.split(r"(?<=[.!?])\s+|\n+", text)
    return [sentence.strip() for sentence in found if len(sentence.split()) >= 3]


def _builtin_texts(part: Part) -> list[str]:
    text = resources.files("edgekit.exporters").joinpath(_TEXTS[part]).read_text("utf-8")
    return _sentences(text)


def _generator(part: Part) -> Any:
    import numpy as np

    return np.random.default_rng(0 if part == "calibration" else 1)


def _builtin_images(part: Part, count: int) -> list[Any]:
    """uint8 [256, 256, 3]: noise with the spectrum of photographs, and shapes with edges on it.

    Amplitudes fall as 1/f in natural images (Field 1987, https://doi.org/10.1364/JOSAA.4.002379).
    """
    import numpy as np

    generator = _generator(part)
    rows, columns = np.mgrid[:_SIDE, :_SIDE]
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(_SIDE), np.fft.rfftfreq(_SIDE), indexing="ij"))
    frequency[0, 0] = 1
    images = []
    for _ in range(count):
        noise = generator.standard_normal((3, *frequency.shape, 2)) @ np.array([1, 1j])
        layers = np.fft.irfft2(noise / frequency, s=(_SIDE, _SIDE))
        # The colours of a scene vary less than its light.
        layers = 0.3 * layers + layers.mean(axis=0)
        layers = layers / layers.std() * generator.uniform(0.1, 0.25)
        layers += generator.uniform(0.3, 0.7, (3, 1, 1))
        for _ in range(generator.integers(2, 7)):
            y, x, high, wide = generator.uniform(0, _SIDE, 4)
            far = np.hypot((rows - y) / (high / 2 + 4), (columns - x) / (wide / 2 + 4))
            inside = far < 1 if generator.random() < 0.5 else far % 0.5 < 0.25
            weight = generator.uniform(0.4, 1.0)
            colour = generator.uniform(0, 1, (3, 1, 1))
            layers = np.where(inside, (1 - weight) * layers + weight * colour, layers)
        images.append(np.uint8(np.clip(layers, 0, 1).transpose(1, 2, 0) * 255))
    return images


def _random(inputs: Sequence[TensorSpec], part: Part, count: int) -> list[dict[str, Any]]:
    """Standard normal floats; whole numbers and truth values are 0 or 1."""

    generator = _generator(part)
    feeds = []
    for _ in range(count):
        feed = {}
        for spec in inputs:
            shape = [n if isinstance(n, int) else _SIZES.get(str(n), _FREE) for n in spec.shape]
            if spec.dtype.startswith("float"):
                feed[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
            else:
                feed[spec.name] = generator.integers(0, 2, shape).astype(spec.dtype)
        feeds.append(feed)
    return feeds
