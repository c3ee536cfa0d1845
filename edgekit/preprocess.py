"""How an image or a text becomes a model's input tensors, and what its output is called.

Knows the fields of ``preprocess.json`` and where Hugging Face folders keep them; computes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgekit import image_processor, typed_json
from edgekit.errors import CorruptArtifactError, SourceError
from edgekit.formats import json_file

FILE = "preprocess.json"
_MAX_BYTES = 4 << 20
_MAX_SIDE = 8192

Task = Literal[
    "image-classification",
    "image-features",
    "text-embedding",
    "text-classification",
    "image-text",
    "tensors",
]
# The numbers of PIL.Image.Resampling, as folders write them.
_RESAMPLES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class ImageSteps:
    """RGB pixels of 0 to 255 -> resize -> crop the middle -> times ``scale`` -> less ``mean``,
    divided by ``std`` -> float32 [batch, channels, height, width], the input called ``input``.

    ``shortest_edge`` resizes that edge and keeps the proportions; None resizes to ``resize_height``
    x ``resize_width``, or not at all where these are None too.
    """

    input: str
    height: int
    width: int
    shortest_edge: int | None
    resize_height: int | None
    resize_width: int | None
    crop: bool
    resample: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class TextSteps:
    """Text -> the ids of ``tokenizer`` (a file beside this one), at most ``max_length`` -> one
    vector: of the output's tokens the "mean", or the first one ("cls"); of length 1 if
    ``normalize``. ``padded``: every text is filled up to ``max_length``, as the model saw them all
    in training, and padding counts.
    """

    tokenizer: str
    max_length: int
    pooling: str
    normalize: bool
    pad_id: int
    padded: bool


@dataclass(frozen=True)
class Matching:
    """How well an image and a text of an "image-text" model match: ``scale`` times the cosine of
    their vectors, plus ``bias``; over all texts these become shares of 1 by softmax, or, with
    ``alone``, a probability for each by the logistic function. ``text_model`` is the file of the
    texts' encoder, beside that of the images'.
    """

    text_model: str
    scale: float
    bias: float
    alone: bool


@dataclass(frozen=True)
class Preprocessing:
    """What a model is for, and its steps. ``labels`` name the classes, in the output's order."""

    task: Task
    image: ImageSteps | None = None
    text: TextSteps | None = None
    labels: tuple[str, ...] = ()
    matching: Matching | None = None

    def to_bytes(self) -> bytes:
        """The JSON of ``preprocess.json``; ``read`` gives an equal object back."""
        return (json.dumps(typed_json.write(self), indent=1, ensure_ascii=False) + "\n").encode()


def read(path: Path) -> Preprocessing:
    """Raises CorruptArtifactError for anything but such a file with sane numbers."""
    try:
        found = typed_json.read(Preprocessing, json_file.read(path, _MAX_BYTES), path.name)
        _check(found)
    except (typed_json.Mismatch, SourceError) as error:
        raise CorruptArtifactError(str(error), hint="export the model again") from None
    return found


def beside(model: Path) -> Preprocessing:
    """That of the model file's folder; bare tensors where there is none. Of a model of two encoders
    the file of the texts' has its own.
    """
    path = model.parent / FILE
    found = read(path) if path.is_file() else Preprocessing("tensors")
    if found.matching and model.name == found.matching.text_model:
        return encoders(found)[1]
    return found


def encoders(found: Preprocessing) -> tuple[Preprocessing, Preprocessing]:
    """That of the images' encoder and that of the texts', each by itself, of "image-text"."""
    return (
        Preprocessing("image-features", image=found.image),
        Preprocessing("text-embedding", text=found.text),
    )


def _check(found: Preprocessing) -> None:
    def expect(good: bool, what: str) -> None:
        if not good:
            raise typed_json.Mismatch(FILE, f": {what}")

    image, text, matching = found.image, found.text, found.matching
    both = found.task == "image-text"
    expect((image is not None) == found.task.startswith("image"), "images are another task's")
    expect((text is not None) == (found.task.startswith("text") or both), "texts are another's")
    expect((matching is not None) == both, "matching is another task's")
    if image:
        sides = (image.height, image.width, image.shortest_edge, image.resize_height)
        for side in (*sides, image.resize_width):
            expect(side is None or 0 < side <= _MAX_SIDE, f"a side of {side} pixels")
        expect(image.resample in _RESAMPLES.values(), f"the filter {image.resample!r:.40}")
        expect(len(image.mean) == len(image.std) in (1, 3), "an image has 1 or 3 channels")
        expect(all(image.std), "a standard deviation of 0")
    if text:
        expect(0 < text.max_length <= 1 << 20, f"a length of {text.max_length}")
        expect(text.pooling in ("mean", "cls"), f"the pooling {text.pooling!r:.40}")
        expect(text.tokenizer == Path(text.tokenizer).name, "the tokenizer lies elsewhere")
    if matching:
        name = matching.text_model
        expect(
            name == Path(name).name and name.endswith(".onnx"), "the texts' model lies elsewhere"
        )


# From a Hugging Face folder

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def of_folder(
    config: Mapping[str, Any],
    *,
    preprocessor: Mapping[str, Any] | None = None,
    pooling: Mapping[str, Any] | None = None,
    modules: Any = None,
    tokenizer: Mapping[str, Any] | None = None,
    matching: Matching | None = None,
) -> Preprocessing:
    """What config.json, preprocessor_config.json, 1_Pooling/config.json, modules.json and
    tokenizer_config.json of a folder say together; ``matching`` is for a model of two encoders.
    Raises SourceError for absurd values.
    """
    kind = str((config.get("architectures") or [""])[0])
    labels = _labels(config)
    if matching:
        vision, words = (_part(config, name) for name in ("vision_config", "text_config"))
        found = Preprocessing(
            "image-text",
            image=_image(vision, preprocessor or {}),
            text=replace(_text(words, {}, None, tokenizer or {}), padded=matching.alone),
            matching=matching,
        )
    elif "image_size" in config or "num_channels" in config or preprocessor:
        classifies = "ForImageClassification" in kind  # DeiT's ends in ...WithTeacher
        task: Task = "image-classification" if classifies else "image-features"
        found = Preprocessing(
            task, image=_image(config, preprocessor or {}), labels=labels if classifies else ()
        )
    else:
        classifies = kind.endswith("ForSequenceClassification")
        found = Preprocessing(
            "text-classification" if classifies else "text-embedding",
            text=_text(config, pooling or {}, modules, tokenizer or {}),
            labels=labels if classifies else (),
        )
    try:
        _check(found)
    except (typed_json.Mismatch, TypeError) as error:
        raise SourceError(f"the folder's preprocessing is absurd: {error}") from None
    return found


def of_image(given: Mapping[str, Any], name: str, shape: Sequence[int]) -> Preprocessing:
    """For a model of one's own with the input ``name`` of ``shape`` [batch, channels, height,
    width]: ``given`` has the fields of a ``preprocessor_config.json``, "labels" (a list of classes,
    in the output's order), and "task", by default "image-classification".

    Raises SourceError for absurd values.
    """
    if not isinstance(given, Mapping) or len(shape) != 4 or shape[1] not in (1, 3):
        raise SourceError("preprocess is for one image of 1 or 3 channels: a dict, and 4 axes")
    labels = given.get("labels", ())
    if not isinstance(labels, list | tuple) or not all(isinstance(each, str) for each in labels):
        raise SourceError("preprocess: 'labels' must be a list of names")
    classifies = given.get("task", "image-classification") == "image-classification"
    config = {
        "architectures": ["OwnForImageClassification" if classifies else "Own"],
        "image_size": list(shape[2:]),
        "num_channels": shape[1],
        "id2label": {str(number): label for number, label in enumerate(labels)},
    }
    try:
        found = of_folder(config, preprocessor={"do_resize": True, **given})
    except (TypeError, ValueError) as error:
        raise SourceError(f"preprocess is absurd: {error}"[:300]) from None
    assert found.image is not None
    made = (found.image.height, found.image.width)
    if made != tuple(shape[2:]):
        raise SourceError(f"preprocess makes images of {made}, the model takes {tuple(shape[2:])}")
    return replace(found, image=replace(found.image, input=name))


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise SourceError(f"config.json has no {name}")
    return found


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label")
    if not isinstance(names, Mapping) or not names:
        return ()
    return tuple(str(names.get(str(i), i)) for i in range(len(names)))


def _image(config: Mapping[str, Any], given: Mapping[str, Any]) -> ImageSteps:
    try:
        given = image_processor.spelled_out(given)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise SourceError(f"the folder's preprocessing is absurd: {error}"[:300]) from None
    size, crop = given.get("size"), given.get("crop_size")
    crops = bool(given.get("do_center_crop", False))
    side = config.get("image_size", 224)
    default = tuple(side) if isinstance(side, list) else (side, side)
    resized = _sides(size) if given.get("do_resize", True) else (None, None, None)
    shortest, height, width = resized
    if given.get("do_resize", True) and resized == (None, None, None):
        height, width = default
    out = _sides(crop)[1:] if crops else (height, width)
    if crops and _sides(crop)[0]:
        out = (_sides(crop)[0],) * 2
    if None in out:
        out = default
    rescales = given.get("do_rescale", True)
    normalizes = given.get("do_normalize", True)
    channels = int(config.get("num_channels", 3))
    mean, std = given.get("image_mean", _MEAN), given.get("image_std", _STD)
    if not normalizes:
        mean, std = (0.0,) * channels, (1.0,) * channels
    return ImageSteps(
        input="pixel_values",
        height=int(out[0] or 0),
        width=int(out[1] or 0),
        shortest_edge=shortest,
        resize_height=height,
        resize_width=width,
        # Whatever does not come out in the model's size is cut to it.
        crop=crops or shortest is not None,
        resample=_RESAMPLES.get(given.get("resample", 2), "bilinear"),
        scale=float(given.get("rescale_factor", 1 / 255)) if rescales else 1.0,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
    )


def _sides(size: Any) -> tuple[int | None, int | None, int | None]:
    """(shortest edge, height, width) as the folders of the years spell them."""
    if isinstance(size, Mapping):
        return size.get("shortest_edge"), size.get("height"), size.get("width")
    if isinstance(size, int):
        return None, size, size
    return None, None, None


def _text(
    config: Mapping[str, Any],
    pooling: Mapping[str, Any],
    modules: Any,
    tokenizer: Mapping[str, Any],
) -> TextSteps:
    longest = int(config.get("max_position_embeddings", 512))
    # RoBERTa's kin keep the first positions for padding.
    if config.get("model_type") in ("roberta", "xlm-roberta"):
        longest -= 2
    asked = tokenizer.get("model_max_length", longest)
    kinds = [str(each.get("type", "")) for each in modules or () if isinstance(each, Mapping)]
    return TextSteps(
        tokenizer="tokenizer.json",
        max_length=min(longest, int(asked)) if isinstance(asked, int) else longest,
        pooling="cls" if pooling.get("pooling_mode_cls_token") else "mean",
        # Without a list of modules the folder is a bare encoder, whose vectors are compared by
        # their angles.
        normalize=not kinds or any(kind.endswith("Normalize") for kind in kinds),
        pad_id=int(config.get("pad_token_id") or 0),
        padded=False,
    )
