"""What `edgekit run` prints for a model that is no language model: classes, or a vector.

Knows how to ask and to render; never what an image or a text becomes on its way in.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgekit.cli import show
from edgekit.errors import UsageError

_NOTHING, _NAME_ONE = "what shall it look at?", "name an image, or give a text"


def show_answer(
    session: Any, prompt: str | None, labels: tuple[str, ...], top: int, as_json: bool
) -> None:
    """The likeliest ``top`` classes that a TensorSession finds for ``prompt`` (a text, or the path
    of an image), or its vector.

    ``labels`` are texts to choose from, for a model of images and texts; without them a prompt that
    is a file is an image. Raises UsageError for a model of bare tensors, and for no prompt.
    """
    if not prompt:
        raise UsageError(_NOTHING, hint=_NAME_ONE)
    two = session.task == "image-text"
    if labels and not two:
        raise UsageError(f"this model is for {session.task}: it takes no --label")
    if labels or session.task.endswith("classification"):
        more = {"labels": labels} if labels else {}
        return _classes(session.classify(prompt, top=top, **more), as_json)
    if session.task == "tensors":
        raise UsageError(
            "this model takes bare tensors", hint="edgekit.load(ARTIFACT).run({name: array})"
        )
    _vector(session.embed(Path(prompt) if two and os.path.isfile(prompt) else prompt), as_json)


def show_answer_there(
    device: str, model: str, prompt: str | None, top: int, n_threads: int | None, as_json: bool
) -> None:
    """The same from a device."""
    from edgekit.remote_tensors import answer_on
    from edgekit.target import open_target

    if not prompt:
        raise UsageError(_NOTHING, hint=_NAME_ONE)
    with show.progress(quiet=as_json) as progress, open_target(device) as target:
        found = answer_on(target, model, prompt, top=top, n_threads=n_threads, progress=progress)
    if found.classes is not None:
        return _classes(found.classes, as_json)
    _vector(found.vector or (), as_json)


def _classes(found: Sequence[tuple[str, float]], as_json: bool) -> None:
    if as_json:
        classes = [{"label": label, "probability": share} for label, share in found]
        return show.as_json({"classes": classes})
    show.table([(label, f"{share:.2%}") for label, share in found])


def _vector(vector: Sequence[Any], as_json: bool) -> None:
    if as_json:
        show.as_json({"embedding": list(vector)})
    else:
        click.echo(" ".join(map(str, vector)))
