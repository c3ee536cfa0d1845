"""Texts to tensors: token ids, their mask and their segments, padded to the longest of a batch.

Knows tokenizer.json and TextSteps; no model, and nothing of what comes out of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.errors import CorruptArtifactError, MissingExtraError, UsageError
from edgekit.preprocess import TextSteps
from edgekit.runtime import TensorSpec


class Tokens:
    """The tokenizer of an artifact."""

    def __init__(self, folder: Path, steps: TextSteps) -> None:
        """Raises CorruptArtifactError for a broken tokenizer.json, MissingExtraError."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingExtraError("ort", missing="tokenizers") from None
        path = folder / steps.tokenizer
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise CorruptArtifactError(f"{path} is no tokenizer: {error}"[:300]) from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(steps.max_length)
        self._pad_id = steps.pad_id
        self._least = steps.max_length if steps.padded else 1

    def tensors(
        self, texts: Sequence[str], names: Sequence[str], *, length: int = 1
    ) -> dict[str, Any]:
        """int64 [len(texts), longest] for each of ``names``: input_ids, attention_mask,
        token_type_ids; padded to ``length`` at least.

        Raises UsageError for what is no text, and for other names.
        """
        import numpy as np

        if not texts or not all(isinstance(text, str) for text in texts):
            raise UsageError("give a text, or a list of at least one")
        known = {"input_ids", "attention_mask", "token_type_ids"}
        if unknown := sorted(set(names) - known):
            raise UsageError(f"no text can be made into the input '{unknown[0]}'")
        rows = self._tokenizer.encode_batch(list(texts))
        longest = max(length, self._least, *(len(row.ids) for row in rows))
        found = {name: np.zeros((len(rows), longest), np.int64) for name in names}
        if "input_ids" in found:
            found["input_ids"][:] = self._pad_id
        for i, row in enumerate(rows):
            parts = {
                "input_ids": row.ids,
                "attention_mask": row.attention_mask,
                "token_type_ids": row.type_ids,
            }
            for name in names:
                found[name][i, : len(row.ids)] = parts[name]
        return found


def fixed_length(inputs: Sequence[TensorSpec]) -> int | None:
    """Tokens that a model takes at one time, None where any number will do."""
    sizes = [spec.shape[1] for spec in inputs if len(spec.shape) == 2]
    return next((size for size in sizes if isinstance(size, int)), None)
