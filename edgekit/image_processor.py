"""What a ``preprocessor_config.json`` means: the fields that the class named in it leaves unsaid.

Knows image processors of transformers by the names of their classes; opens no file and no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HALF: dict[str, Any] = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
_OPENAI: dict[str, Any] = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_CROP = {"do_center_crop": True, "crop_size": 224}
# By the class without its ending: what transformers takes where the file has no such field. The
# numbers of filters are PIL's: 2 bilinear, 3 bicubic.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": _HALF | {"resample": 2, "size": 224},
    "DeiT": _HALF | _CROP | {"resample": 3, "size": 256},
    "Beit": _HALF | {"resample": 3, "size": 224},
    "Siglip": _HALF | {"resample": 3, "size": {"height": 224, "width": 224}},
    "CLIP": _OPENAI | _CROP | {"resample": 3, "size": 224},
    "Bit": _OPENAI | _CROP | {"resample": 3, "size": 224},
    "ConvNext": _HALF | {"resample": 3, "size": 384, "crop_pct": 224 / 256},
    "EfficientNet": _HALF
    | {"resample": 3, "size": {"height": 346, "width": 346}}
    | {"include_top": True},
    "MobileNetV1": _HALF | _CROP | {"resample": 2, "size": 256},
    "MobileNetV2": _HALF | _CROP | {"resample": 2, "size": 256},
    "MobileViT": _HALF
    | {"resample": 3, "size": 224, "do_center_crop": True, "crop_size": 256}
    | {"do_normalize": False, "do_flip_channel_order": True},
}
# Of these a size of one number is that of the shorter edge, of all others that of both.
_BY_EDGE = ("CLIP", "Bit", "Siglip", "ConvNext", "MobileNetV1", "MobileNetV2", "MobileViT")
_WHOLE_FROM = 384  # ConvNext's class cuts the middle out of smaller images alone


def spelled_out(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every class has, with the values that do what the class of ``given`` does:
    ``size`` is a dict, and the steps of single classes are folded into ``size``, ``crop_size``,
    ``image_mean`` and ``image_std``. A file that names no class is taken as it is.
    """
    kind = _kind(given)
    found = {**_DEFAULTS.get(kind, {}), **given}
    if kind in _BY_EDGE and isinstance(found.get("size"), int):
        found["size"] = {"shortest_edge": found["size"]}
    if kind == "ConvNext":
        _cut_by_share(found)
    _fold_second_steps(found)
    return found


def flips_channels(given: Mapping[str, Any]) -> bool:
    """Whether the model wants blue, green, red."""
    return bool(spelled_out(given).get("do_flip_channel_order", False))


def _kind(given: Mapping[str, Any]) -> str:
    name = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(ending)
    return name


def _cut_by_share(found: dict[str, Any]) -> None:
    """The middle of an image, ``crop_pct`` of the shorter edge; or all of it, squeezed."""
    size = found["size"]
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if not isinstance(edge, int) or not found.get("do_resize", True):
        return
    if edge >= _WHOLE_FROM:
        found["size"] = {"height": edge, "width": edge}
        return
    found["size"] = {"shortest_edge": int(edge / float(found["crop_pct"]))}
    if not found.get("do_center_crop", False):
        found |= {"do_center_crop": True, "crop_size": {"height": edge, "width": edge}}


def _fold_second_steps(found: dict[str, Any]) -> None:
    """EfficientNet's class may take 1 off the rescaled pixels, and divides twice by ``image_std``:
    ((x - 1 - mean) / std) / std = (x - (mean + 1)) / (std * std).
    """
    offset = bool(found.get("rescale_offset", False)) and found.get("do_rescale", True)
    again = bool(found.get("include_top", False))
    if not (offset or again) or "image_std" not in found or "image_mean" not in found:
        return
    once = bool(found.get("do_normalize", True))
    powers = once + again
    found["image_mean"] = [
        (float(mean) if once else 0.0) + (1.0 if offset else 0.0) for mean in found["image_mean"]
    ]
    found["image_std"] = [float(std) ** powers for std in found["image_std"]]
    found["do_normalize"] = True
