"""bench and run of models without tokens on a device: bring the files over, take the answer back.

Knows which files such a model consists of; never how a device is reached, nor what an engine does.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit import graph_file, latency_report, preprocess, remote
from edgekit.artifact import Artifact, is_artifact
from edgekit.errors import UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.latency_report import LatencyReport
from edgekit.target import Target

_MAX_IMAGE_BYTES = 64 << 20


@dataclass(frozen=True)
class Answer:
    """What a model made of its input: classes with their probabilities, best first, or a vector."""

    classes: tuple[tuple[str, float], ...] | None
    vector: tuple[float, ...] | None


def latency_on(
    target: Target,
    *models: str | Path,
    probe_limits: bool = True,
    profile: bool = False,
    progress: Progress = no_progress,
    **sweep: Any,
) -> LatencyReport:
    """The same as ``latency.latency``, on a device; the report says which, and if emulated.

    Raises what that raises, and DeviceError.
    """
    if not models:
        raise UsageError("which model?", hint="edgekit bench ARTIFACT")
    paths = [Path(model) for model in models]
    for path in paths:
        graph_file.read(_file(path))  # a bad one is not worth the way
    facts = target.identify()
    arguments = {
        "models": [_bring(target, path, progress) for path in paths],
        "names": [path.resolve().name for path in paths],
        "judge": probe_limits,
        "sweep": sweep | {"profile": profile},
    }
    body = remote.call(target, facts, "latency", arguments, progress=progress)
    raw = json.dumps(body).encode("utf-8", "replace")
    found = latency_report.parse(raw, origin=f"what {target.name} sent")
    remarks = (remote.EMULATED, *found.remarks) if facts.emulated else found.remarks
    machine = replace(found.machine, emulated=facts.emulated)
    return replace(found, device=remote.called(target, facts), machine=machine, remarks=remarks)


def answer_on(
    target: Target,
    model: str | Path,
    what: str,
    *,
    top: int,
    n_threads: int | None = None,
    progress: Progress = no_progress,
) -> Answer:
    """What the model makes of a text, or of the image whose path ``what`` is, on the device.

    The image travels with the question, and is not kept there. Raises what a session raises, and
    DeviceError.
    """
    path = Path(model)
    steps = preprocess.beside(_file(path))
    if steps.task == "tensors":
        raise UsageError("this model takes bare tensors", hint="such a model only runs from Python")
    image = None if steps.image is None else base64.b64encode(_image(what)).decode()
    arguments = {
        "model": _bring(target, path, progress),
        "text": what if image is None else None,
        "image": image,
        "top": top,
        "threads": n_threads,
    }
    return _answer(target, remote.call(target, target.identify(), "tensors", arguments))


def _image(name: str) -> bytes:
    try:
        with open(name, "rb") as file:
            found = file.read(_MAX_IMAGE_BYTES + 1)
    except (OSError, ValueError):
        raise UsageError(f"{name[:200]} cannot be read", hint="name an image") from None
    if len(found) > _MAX_IMAGE_BYTES:
        raise UsageError(f"{name[:200]} is larger than {_MAX_IMAGE_BYTES >> 20} MiB")
    return found


def _file(path: Path) -> Path:
    """The graph's file. Raises ArtifactError."""
    if not is_artifact(path):
        return path
    artifact = Artifact.open(path)
    artifact.verify_sizes()
    return artifact.model_path


def _bring(target: Target, path: Path, progress: Progress) -> str:
    """The model's path there. A bare file comes with the files that it and its inputs need."""
    also = () if is_artifact(path) else _beside(path)
    return remote.bring(target, path, progress, also=also)


def _beside(path: Path) -> Sequence[str]:
    """Files in the folder of ``path`` that belong to it: weights, steps, a tokenizer."""
    found = set(graph_file.read(path).beside)
    if (path.parent / preprocess.FILE).is_file():
        steps = preprocess.beside(path)
        found |= {preprocess.FILE, *((steps.text.tokenizer,) if steps.text else ())}
    return sorted(found)


def _answer(target: Target, body: Any) -> Answer:
    """A stranger's words, checked."""
    try:
        if set(body) == {"classes"}:
            rows = tuple((str(label), float(share)) for label, share in body["classes"])
            good = all(label.isprintable() and 0 <= share <= 1 for label, share in rows)
            found = Answer(rows, None)
        else:
            vector = tuple(float(value) for value in body["vector"])
            good = set(body) == {"vector"} and all(map(math.isfinite, vector))
            found = Answer(None, vector)
    except (TypeError, ValueError, KeyError):
        good = False
    if not good:
        raise remote.nonsense(target)
    return found
