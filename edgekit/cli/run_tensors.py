"""What `edgekit run` prints for a model that is no language model: classes, or a vector.

Knows how to ask and to render; never what an image or a text becomes on its way in.
"""

from __future__ import annotations

import click

from edgekit.cli import show
from edgekit.errors import UsageError
from edgekit.runtime import TensorSession


def show_answer(session: TensorSession, prompt: str | None, top: int, as_json: bool) -> None:
    """The likeliest ``top`` classes of ``prompt`` (a text, or the path of an image), or its vector.

    Raises UsageError for a model of bare tensors, and for no prompt.
    """
    if not prompt:
        raise UsageError("what shall it look at?", hint="name an image, or give a text")
    if session.task.endswith("classification"):
        found = session.classify(prompt, top=top)
        if as_json:
            classes = [{"label": label, "probability": share} for label, share in found]
            return show.as_json({"classes": classes})
        return show.table([(label, f"{share:.2%}") for label, share in found])
    if session.task == "tensors":
        raise UsageError(
            "this model takes bare tensors", hint="edgekit.load(ARTIFACT).run({name: array})"
        )
    vector = session.embed(prompt)
    return (
        show.as_json({"embedding": vector}) if as_json else click.echo(" ".join(map(str, vector)))
    )
