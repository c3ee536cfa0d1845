"""Two models of tensors side by side: whether they answer alike, and where they part.

Works on sessions of any runtime, and looks inside ONNX files and TFLite files beside one; never
knows how a model was made.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import export_again, language_model, preprocess, sample_inputs
from edgekit.artifact import Artifact, is_artifact
from edgekit.errors import UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.preprocess import Preprocessing
from edgekit.receipt import Agreement
from edgekit.runtime import load
from edgekit.tensor_figures import LayerLosses

_SAMPLES = {"image": 64, "text": 128, "tensors": 32}
_LAYER_SAMPLES = 8
_SUFFIXES = (".onnx", ".tflite")


@dataclass(frozen=True)
class Comparison:
    """``part`` is "" or, of a model of two encoders, "images" or "texts". ``layers`` is None where
    nobody asked, and where one side cannot be looked into (``blind`` says which).
    """

    part: str
    agreement: Agreement
    layers: LayerLosses | None
    blind: str | None


def is_of_tensors(model: Path) -> bool:
    """Whether a path is no language model's: an artifact or a bare file of tensors."""
    file = _file(model)
    return file.suffix.lower() in _SUFFIXES and not language_model.is_one(file)


def compare(
    model: Path,
    against: Path | None = None,
    *,
    data: Path | None = None,
    layers: bool = False,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> list[Comparison]:
    """How far ``model`` answers as ``against`` does, on held-out inputs or ``data`` of the user's.

    Both are artifacts or model files, of whatever format there is a runtime for; ``against`` None
    is the float model, made again of the artifact's source. With ``layers`` the values inside.
    Raises UsageError where the two are not of one form, and what loading raises.
    """
    with ExitStack() as opened:
        if against is None:
            if not is_artifact(model):
                raise UsageError(f"{model} does not say what it was made of", hint="add --against")
            against = opened.enter_context(export_again.float_model(model, progress))
        mine = opened.enter_context(load(model, n_threads=threads))
        theirs = opened.enter_context(load(against, n_threads=threads))
        files = [_file(path) for path in (model, against)]
        steps = preprocess.beside(files[0])
        if not steps.matching:
            return [_compare("", steps, (mine, theirs), files, data, layers, progress)]
        if not hasattr(theirs, "text"):
            raise UsageError(f"{against} has no encoder of texts", hint="give its artifact")
        names = [files[0].parent / steps.matching.text_model]
        names.append(files[1].parent / steps.matching.text_model)
        image, text = preprocess.encoders(steps)
        return [
            _compare("images", image, (mine.image, theirs.image), files, data, layers, progress),
            _compare("texts", text, (mine.text, theirs.text), names, data, layers, progress),
        ]


def _file(model: Path) -> Path:
    return Artifact.open(model).model_path if is_artifact(model) else model


def _compare(
    part: str,
    steps: Preprocessing,
    sessions: tuple[Any, Any],
    files: list[Path],
    data: Path | None,
    layers: bool,
    progress: Progress,
) -> Comparison:
    # Not before they are needed: language models are evaluated without these engines.
    from edgekit.runtimes import aligned, tensor_agreement

    mine: Any = sessions[0]
    theirs: Any = aligned.Aligned(sessions[1], sessions[0])
    found = sample_inputs.samples(
        steps,
        mine.inputs,
        folder=files[0].parent,
        data=sample_inputs.meant_for(steps, data) if part else data,
        count=_SAMPLES[steps.task.partition("-")[0]],
        part="held-out",
    )
    agreement = tensor_agreement.measure(mine, theirs, found, steps, progress)
    inside, blind = None, None
    if layers:
        inside = _inside(files, found.feeds[:_LAYER_SAMPLES], theirs, progress)
        blind = None if inside else next(f.name for f in files if f.suffix.lower() != ".onnx")
    return Comparison(part, agreement, inside, blind)


def _inside(
    files: list[Path], feeds: list[dict[str, Any]], theirs: Any, progress: Progress
) -> LayerLosses | None:
    """``feeds`` are those of the first file; ``theirs`` knows how the second one takes them. None
    where neither is an ONNX file.
    """
    from edgekit.runtimes import onnx_layers

    suffixes = [path.suffix.lower() for path in files]
    if suffixes == [".onnx", ".onnx"]:
        return onnx_layers.losses(files[0], files[1], feeds, progress)
    if ".onnx" not in suffixes:
        return None
    from edgekit.runtimes import tflite_layers

    pairs = [(feed, theirs.feeds(feed)) for feed in feeds]
    if suffixes[0] == ".onnx":
        return tflite_layers.losses(files[0], files[1], pairs, progress)
    return tflite_layers.losses(files[1], files[0], [(b, a) for a, b in pairs], progress)
