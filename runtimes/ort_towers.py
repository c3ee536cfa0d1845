"""Two encoders in one space as a TensorSession: images and texts in, vectors and likeness out.

Knows how the two belong together; never the engine, that is ``ort``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgekit.errors import UsageError
from edgekit.preprocess import Matching
from edgekit.runtime import TensorSession, TensorSpec

_MOST_LABELS = 100_000


class TwoEncoders:
    """A model of task "image-text"."""

    task = "image-text"

    def __init__(self, image: TensorSession, text: TensorSession, matching: Matching) -> None:
        self.image, self.text = image, text
        self.threads: int = getattr(image, "threads", 0)
        self.inputs: tuple[TensorSpec, ...] = (*image.inputs, *text.inputs)
        self.outputs: tuple[TensorSpec, ...] = (*image.outputs, *text.outputs)
        self._matching = matching
        self._known: tuple[tuple[str, ...], Any] = ((), None)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of one encoder, or of both; the outputs of those that ran.

        Raises UsageError as either does.
        """
        found: dict[str, Any] = {}
        for side in (self.image, self.text):
            own = {spec.name: inputs[spec.name] for spec in side.inputs if spec.name in inputs}
            if own:
                found |= side.run(own)
        names = {spec.name for spec in self.inputs}
        if not found or set(inputs) - names:
            raise UsageError(
                f"the model takes the inputs {', '.join(sorted(names))}, not"
                f" {', '.join(inputs) or 'none'}"
            )
        return found

    def embed(self, what: Any) -> list[float] | list[list[float]]:
        """A vector for a text (``str``), or for an image (a Path, bytes, a PIL image, an array);
        several for a list of either.
        """
        several = isinstance(what, list | tuple)
        kinds = {isinstance(each, str) for each in what} if several else {isinstance(what, str)}
        if len(kinds) > 1:
            raise UsageError("a list of texts, or one of images, but not both together")
        side = self.text if kinds == {True} else self.image
        return side.embed(what)

    def embed_image(self, image: Any) -> list[float] | list[list[float]]:
        """As ``embed``, but a ``str`` is the path of an image, too."""
        return self.image.embed(image)

    def classify(
        self, what: Any, *, labels: Sequence[str] | None = None, top: int = 5
    ) -> list[tuple[str, float]]:
        """The likeliest of ``labels``, texts such as "a photo of a cat", for an image; best first,
        with their shares of 1 (CLIP), or with a probability for each by itself (SigLIP).
        """
        if labels is None or isinstance(labels, str) or not all(isinstance(x, str) for x in labels):
            raise UsageError(
                "this model has no classes of its own",
                hint='name some: classify(image, labels=["a photo of a cat", ...])',
            )
        if not 0 < len(labels) <= _MOST_LABELS:
            raise UsageError(f"give 1 to {_MOST_LABELS} labels, not {len(labels)}")
        if top < 1:
            raise UsageError(f"top must be at least 1, not {top}")
        image = np.asarray(self.image.embed(what), np.float64)
        shares = likeness(image[None], self._vectors(tuple(labels)), self._matching)[0]
        best = np.argsort(-shares, kind="stable")[:top]
        return [(labels[i], float(shares[i])) for i in best]

    def _vectors(self, labels: tuple[str, ...]) -> Any:
        """float64 [labels, width]; those of the last labels are remembered."""
        if self._known[0] != labels:
            # One by one: a batch would be padded, which costs more than it saves here.
            rows = [self.text.embed(label) for label in labels]
            self._known = (labels, np.asarray(rows, np.float64))
        return self._known[1]

    def close(self) -> None:
        """Free both; closing twice is fine."""
        self.image.close()
        self.text.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def likeness(images: Any, texts: Any, matching: Matching) -> Any:
    """float64 [images, width] and [texts, width], rows of length 1 -> [images, texts]: of each
    image the texts' shares, or their probabilities.
    """
    logits = matching.scale * (images @ texts.T) + matching.bias
    if matching.alone:
        return 1 / (1 + np.exp(-logits))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)
