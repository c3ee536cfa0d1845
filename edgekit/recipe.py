"""The recipe: every decision that the output bytes depend on, and nothing else.

Knows names and values; never a path that must exist at run time, a device or a library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from edgekit import quant
from edgekit.errors import RecipeError
from edgekit.registry import did_you_mean

VIAS = ("optimum",)
_ADAPTER_MODES = ("merge", "keep")
_FUSIONS = re.compile(r"[a-z_]{1,40}(,[a-z_]{1,40}){0,40}", re.ASCII)
_MAX_PATTERN = 256
_GRAPH_TYPES = {"onnx": quant.onnx_type, "tflite": quant.tflite_type}  # format -> canonical name


@dataclass(frozen=True)
class Calibration:
    """What a model is run on while it is quantized: its name, its hash and how much of it.

    ``text`` is "builtin", or the name of the text file or folder of images (for people; ``sha256``
    is what decides). ``chunks`` counts pieces of ``chunk_tokens`` tokens, or, where that is 0,
    whole inputs.
    """

    text: str
    sha256: str
    chunks: int
    chunk_tokens: int = 512


@dataclass(frozen=True)
class Recipe:
    """How to turn a source into an artifact.

    ``type`` is the precision in the format's own words (GGUF: ``Q4_K_M``). ``overrides`` are pairs
    of a regular expression on tensor names and a tensor type; the first match wins. ``calibration``
    is None when nothing is run while quantizing. ``adapter`` is the SHA-256 of a LoRA to merge in
    (``adapter_mode`` "merge") or to ship beside the model ("keep"). ``fusion`` "none" leaves the
    operators of a graph as they were exported, "auto" lets passes stay that are not slower on the
    machine of the export, and names with commas between are those passes: a manifest says which.
    ``via`` names the tool that wrote the float graph, where that is not edgekit's own tracer.
    Raises RecipeError for unknown names and impossible combinations.
    """

    format: str
    type: str
    calibration: Calibration | None = None
    overrides: tuple[tuple[str, str], ...] = field(default=())
    adapter: str | None = None
    adapter_mode: str = "merge"
    fusion: str = "auto"
    via: str = ""

    def __post_init__(self) -> None:
        if self.format == "gguf":
            object.__setattr__(self, "type", quant.gguf_type(self.type))
            if self.type in quant.FLOAT_TYPES and self.overrides:
                raise RecipeError(f"tensor overrides need a quantized type, not {self.type}")
            if self.type in quant.NEEDS_IMATRIX and self.calibration is None:
                raise RecipeError(
                    f"{self.type} needs an importance matrix", hint="drop --calibration none"
                )
        if self.format in _GRAPH_TYPES:
            object.__setattr__(self, "type", _GRAPH_TYPES[self.format](self.type))
            if self.type in quant.NEEDS_SAMPLES and self.calibration is None:
                raise RecipeError(
                    f"{self.type} needs inputs to calibrate on", hint="drop --calibration none"
                )
        if not _FUSIONS.fullmatch(self.fusion):
            raise RecipeError("fusion must be auto, none, or names of passes with commas between")
        if self.via not in ("", *VIAS):
            raise RecipeError(f"via must be one of {', '.join(VIAS)}")
        if self.via and self.format != "onnx":
            raise RecipeError("only ONNX graphs are made via another tool", hint="--format onnx")
        if self.adapter_mode not in _ADAPTER_MODES:
            raise RecipeError(f"adapter_mode must be one of {', '.join(_ADAPTER_MODES)}")
        for pattern, _ in self.overrides:
            _check_pattern(pattern)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` gives an equal recipe back."""
        body = dataclasses.asdict(self)
        body["overrides"] = [list(pair) for pair in self.overrides]
        return body

    @classmethod
    def from_dict(cls, body: Any) -> Recipe:
        """Raises RecipeError for anything but the exact fields with the right types."""
        fields = _checked(cls, body, "recipe")
        if fields.get("calibration") is not None:
            fields["calibration"] = Calibration(
                **_checked(Calibration, fields["calibration"], "calibration")
            )
        overrides = fields.get("overrides", [])
        if not isinstance(overrides, list) or any(
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(x, str) for x in pair)
            for pair in overrides
        ):
            raise RecipeError("recipe: overrides must be a list of [pattern, type] pairs")
        fields["overrides"] = tuple((pattern, kind) for pattern, kind in overrides)
        return cls(**fields)

    @property
    def sha256(self) -> str:
        """Hash of the canonical form: equal recipes have equal hashes."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


_PLAIN_TYPES = {"str": (str,), "int": (int,), "str | None": (str, type(None))}


def _checked(kind: type, body: Any, what: str) -> dict[str, Any]:
    """The fields of a dataclass from JSON data, each known, typed, and none missing."""
    if not isinstance(body, dict):
        raise RecipeError(f"{what} must be a mapping, not {type(body).__name__}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in body.items():
        if name not in known:
            raise RecipeError(f"{what}: unknown key '{name}'", hint=did_you_mean(name, list(known)))
        allowed = _PLAIN_TYPES.get(str(known[name].type))
        if allowed and (not isinstance(value, allowed) or isinstance(value, bool)):
            raise RecipeError(f"{what}: {name} must be {known[name].type}, not {value!r}")
    for name, f in known.items():
        if name not in body and f.default is f.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{what}: key '{name}' is missing")
    return dict(body)


def _check_pattern(pattern: str) -> None:
    if len(pattern) > _MAX_PATTERN:
        raise RecipeError(f"tensor pattern longer than {_MAX_PATTERN} characters")
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"tensor pattern {pattern!r}: {error}") from None
