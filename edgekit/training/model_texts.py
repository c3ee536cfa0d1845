"""A text in the tokens of a model that exists: a part to learn from, a part to judge by.

Knows texts and the model's tokenizer; never its weights, nor what is done with the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgekit.errors import DataError, RecipeError
from edgekit.source import ModelSource
from edgekit.training import texts
from edgekit.training.run import Run
from edgekit.training.settings import Settings, setting


@dataclass(frozen=True)
class ModelTextSettings(Settings):
    """The model, and how much of which text is learned from and judged by."""

    model: str = setting("smollm2-135m", "a Hugging Face folder, or a GGUF file")
    text: str = setting("prose", "a .txt file, a folder of them, or prose")
    length: int = setting(256, "tokens of a piece")
    held_tokens: int = setting(8000, "most tokens of held-out text to judge by")
    train_chars: int = setting(2_000_000, "of the text that is tokenized; 0: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.length, self.held_tokens) < 2 or self.train_chars < 0:
            raise RecipeError("length and held_tokens are 2 or more, train_chars 0 or more")


@dataclass(frozen=True)
class ModelText:
    """Tokens to learn from, those to judge by, and the bytes of text that the latter are."""

    train: np.ndarray[Any, Any]
    held: np.ndarray[Any, Any]
    held_bytes: int


def tokens(run: Run, found: ModelSource, settings: ModelTextSettings) -> ModelText:
    """The text of ``settings`` (as ``texts.read``), tokenized once a run. Both parts lie evenly in
    it, the held-out one in pieces of eight times ``length``.

    Raises DataError.
    """
    tokenizer = Tokenizer.from_file(str(found.path / "tokenizer.json"))
    if tokenizer.token_to_id(texts.END) is None:
        raise DataError(f"{found.spec} has no {texts.END}", hint="another model")
    text = texts.read(settings.text)
    share = 1.0
    if settings.train_chars:
        share = min(1.0, settings.train_chars / sum(map(len, text.train)))
    count = max(1, round(share * len(text.train)))
    chosen = [text.train[n] for n in np.linspace(0, len(text.train) - 1, count).astype(int)]
    parts = {}
    for name, blocks in (("train", chosen), ("held", text.held)):
        packed = run.once(f"{name}.tokens", partial(texts.pack, tokenizer, blocks))
        parts[name] = texts.tokens_of(tokenizer, packed)
    held = texts.spread(parts["held"], settings.held_tokens, 8 * settings.length)
    held_bytes = len(tokenizer.decode(held[1:].tolist(), skip_special_tokens=True).encode())
    return ModelText(parts["train"], held, held_bytes)
