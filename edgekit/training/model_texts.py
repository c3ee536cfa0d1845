"""A text in the tokens of a model that exists: a part to learn from, a part to judge by.

Knows texts and the model's tokenizer; never the model itself, nor what is done with the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgekit.errors import DataError
from edgekit.source import ModelSource
from edgekit.training import texts
from edgekit.training.run import Run


@dataclass(frozen=True)
class ModelText:
    """Tokens to learn from, those to judge by, and the bytes of text that the latter are."""

    train: np.ndarray[Any, Any]
    held: np.ndarray[Any, Any]
    held_bytes: int


def tokens(
    run: Run, found: ModelSource, spec: str, *, train_chars: int, held_tokens: int, length: int
) -> ModelText:
    """The text ``spec`` (as ``texts.read``), tokenized once a run. Of its blocks about
    ``train_chars`` characters are learned from (0: all), of its held-out tokens ``held_tokens`` at
    most are judged by; both lie evenly, the latter in pieces of eight times ``length``.

    Raises DataError.
    """
    tokenizer = Tokenizer.from_file(str(found.path / "tokenizer.json"))
    if tokenizer.token_to_id(texts.END) is None:
        raise DataError(f"{found.spec} has no {texts.END}", hint="another model")
    text = texts.read(spec)
    share = 1.0
    if train_chars:
        share = min(1.0, train_chars / sum(map(len, text.train)))
    count = max(1, round(share * len(text.train)))
    chosen = [text.train[n] for n in np.linspace(0, len(text.train) - 1, count).astype(int)]
    parts = {}
    for name, blocks in (("train", chosen), ("held", text.held)):
        packed = run.once(f"{name}.tokens", partial(texts.pack, tokenizer, blocks))
        parts[name] = texts.tokens_of(tokenizer, packed)
    held = texts.spread(parts["held"], held_tokens, 8 * length)
    held_bytes = len(tokenizer.decode(held[1:].tolist(), skip_special_tokens=True).encode())
    return ModelText(parts["train"], held, held_bytes)
