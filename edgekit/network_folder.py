"""The folder of a training run whose network is none of Hugging Face's: network.json and weights.

Knows its fields and reads them strictly; never builds a network, loads a weight, or runs what a
folder brings: the code is that of edgekit's own rows in ``registry.NETWORKS``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import CorruptArtifactError, SourceError, UnsafePathError, VersionError
from edgekit.formats import json_file, safetensors

FILE = "network.json"
WEIGHTS = "model.safetensors"
_SCHEMA = 1
_MAX_BYTES = 4 << 20
_KEYS = {"schema", "network", "config", "input_shape", "preprocess"}
_MAX_AXES, _MAX_SIDE = 5, 1 << 16


@dataclass(frozen=True)
class Network:
    """``network`` is a row of ``registry.NETWORKS``, ``config`` what its builder takes.
    ``input_shape`` is that of the one float32 input, with a batch of 1. ``preprocess`` says how an
    image becomes it (``preprocess.of_image``), None for bare tensors.
    """

    network: str
    config: Mapping[str, Any]
    input_shape: tuple[int, ...]
    preprocess: Mapping[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """The JSON of ``network.json``; ``read`` gives an equal object back."""
        body = {"schema": _SCHEMA, **vars(self), "input_shape": list(self.input_shape)}
        return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()


def is_one(folder: Path) -> bool:
    """Whether ``folder`` says that it is such a folder."""
    return (folder / FILE).is_file()


def read(folder: Path) -> Network:
    """Raises SourceError for what is missing or malformed, UnsafePathError for links, VersionError
    for a folder of a newer edgekit.
    """
    for name in (FILE, WEIGHTS):
        if (folder / name).is_symlink():
            raise UnsafePathError(f"{folder}: {name} is a symbolic link")
    body = json_file.read(folder / FILE, _MAX_BYTES)
    if not isinstance(body, dict) or set(body) != _KEYS:
        raise SourceError(f"{folder / FILE} must have exactly the keys {', '.join(sorted(_KEYS))}")
    if type(body["schema"]) is not int or body["schema"] > _SCHEMA:
        raise VersionError(
            f"{folder / FILE} was written by a newer edgekit", hint="upgrade edgekit to read it"
        )
    network, config, shape = body["network"], body["config"], body["input_shape"]
    preprocess = body["preprocess"]
    good = (
        isinstance(network, str)
        and isinstance(config, dict)
        and isinstance(shape, list)
        and 0 < len(shape) <= _MAX_AXES
        and all(type(side) is int and 0 < side <= _MAX_SIDE for side in shape)
        and (preprocess is None or isinstance(preprocess, dict))
    )
    if not good:
        raise SourceError(f"{folder / FILE} is malformed")
    if not (folder / WEIGHTS).is_file():
        raise SourceError(f"{folder} has no {WEIGHTS}", hint="train it again")
    return Network(network, config, tuple(shape), preprocess)


def check_weights(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """That the weights are those of a network with the tensors ``expected``: name -> shape.

    Raises CorruptArtifactError.
    """
    found = {name: each.shape for name, each in safetensors.read(folder / WEIGHTS).tensors.items()}
    wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if wrong:
        raise CorruptArtifactError(
            f"{folder / WEIGHTS} does not fit its {FILE}: {sorted(wrong)[0][:80]!a} and"
            f" {len(wrong) - 1} more",
            hint="train it again",
        )
