"""What every engine's TensorSession has in common: inputs are made and checked, answers read.

Knows Preprocessing and arrays; an engine says how it opens, runs and lets go of a graph.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from edgekit import image_input, preprocess, text_input
from edgekit.errors import UsageError
from edgekit.preprocess import Preprocessing
from edgekit.runtime import LoadParams, TensorSpec
from edgekit.runtimes import pooling


def check_params(params: LoadParams) -> None:
    """Raises UsageError for what only a language model can take."""
    for field in fields(LoadParams):
        if field.name != "n_threads" and getattr(params, field.name) != field.default:
            raise UsageError(f"{field.name} is for language models; this one takes n_threads alone")
    if params.n_threads is not None and not 1 <= params.n_threads <= 512:
        raise UsageError(f"n_threads must lie between 1 and 512, not {params.n_threads}")


class PreparedSession:
    """A loaded graph with its preprocessing (edgekit.runtime.TensorSession).

    An engine's own class calls ``__init__`` with the model's file, then sets ``inputs``,
    ``outputs`` and ``threads``.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    threads: int

    def __init__(self, path: Path, steps: Preprocessing | None = None) -> None:
        """``steps`` None are those beside the file. Raises CorruptArtifactError for broken ones."""
        self._preprocessing = steps or preprocess.beside(path)
        self.task: str = self._preprocessing.task
        self._folder = path.parent
        self._tokens: text_input.Tokens | None = None
        self._closed = False

    @abstractmethod
    def _answers(self, feeds: dict[str, Any]) -> list[Any]:
        """The outputs for checked inputs, arrays of their own. Raises InferenceError."""

    @abstractmethod
    def _let_go(self) -> None:
        """Free the engine's side."""

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by name in; numpy arrays by name out, in the order of ``outputs``.

        Raises UsageError for wrong names, shapes or types, InferenceError when the engine fails.
        """
        if self._closed:
            raise UsageError("the model is closed")
        found = self._answers(self._checked(inputs))
        return {spec.name: value for spec, value in zip(self.outputs, found, strict=True)}

    def classify(self, what: Any, *, top: int = 5) -> list[tuple[str, float]]:
        """(label, probability) of the likeliest classes; ``what`` as in ``embed``."""
        if not self._preprocessing.task.endswith("classification"):
            raise UsageError(
                f"this model is for {self._preprocessing.task}, it has no classes",
                hint="session.embed() or session.run()",
            )
        if top < 1:
            raise UsageError(f"top must be at least 1, not {top}")
        logits = self._first_output([what])[0].reshape(-1).astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        labels = self._preprocessing.labels
        best = np.argsort(-shares, kind="stable")[:top]
        return [(labels[i] if i < len(labels) else str(i), float(shares[i])) for i in best]

    def embed(self, what: Any) -> list[float] | list[list[float]]:
        """A vector for a text, or for an image (path, bytes, PIL image, array); several for a list
        of them.
        """
        if self._preprocessing.task not in ("text-embedding", "image-features"):
            raise UsageError(
                f"this model is for {self._preprocessing.task}, it makes no vectors",
                hint="session.classify() or session.run()",
            )
        several = isinstance(what, list | tuple)
        vectors = self._vectors(list(what) if several else [what])
        found: list[list[float]] = vectors.tolist()
        return found if several else found[0]

    def _vectors(self, items: list[Any]) -> Any:
        """float32 [len(items), width]."""
        feeds = self._feeds(items)
        return pooling.vectors(self._first(feeds), feeds, self._preprocessing)

    def _first_output(self, items: list[Any]) -> Any:
        return self._first(self._feeds(items))

    def _first(self, feeds: Mapping[str, Any]) -> Any:
        return self.run(feeds)[self.outputs[0].name]

    def _feeds(self, items: list[Any]) -> dict[str, Any]:
        steps = self._preprocessing
        if not items:
            raise UsageError("give at least one input")
        if steps.image:
            images = [image_input.tensor(item, steps.image) for item in items]
            return {steps.image.input: np.concatenate(images)}
        assert steps.text is not None
        if self._tokens is None:
            self._tokens = text_input.Tokens(self._folder, steps.text)
        names = [spec.name for spec in self.inputs]
        return self._tokens.tensors(items, names, length=text_input.fixed_length(self.inputs) or 1)

    def _checked(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays, if they are what the graph takes."""
        wanted = {spec.name: spec for spec in self.inputs}
        if set(inputs) != set(wanted):
            raise UsageError(
                f"the model takes the inputs {', '.join(wanted)}, not {', '.join(inputs) or 'none'}"
            )
        feeds = {}
        for name, spec in wanted.items():
            try:
                value = np.asarray(inputs[name])
            except (ValueError, TypeError) as error:
                raise UsageError(f"{name} is no array: {error}") from None
            if value.dtype != spec.dtype:
                if value.dtype.kind != np.dtype(spec.dtype).kind:
                    raise UsageError(f"{name} must be {spec.dtype}, not {value.dtype}")
                value = value.astype(spec.dtype)
            fits = len(value.shape) == len(spec.shape) and all(
                size == dim if isinstance(dim, int) else size > 0
                for size, dim in zip(value.shape, spec.shape, strict=True)
            )
            if not fits:
                shape = ", ".join(str(dim or "?") for dim in spec.shape)
                raise UsageError(f"{name} must have the shape ({shape}), not {value.shape}")
            feeds[name] = value
        return feeds

    def close(self) -> None:
        """Free the model; closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
