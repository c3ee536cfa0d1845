"""A greedy answer of any engine of tokens, to see whether a new file works at all.

Must never judge what it sees, nor know which engine it is (``token_engine``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.runtimes.token_engine import TokenEngine


def complete(engine: TokenEngine, prompt: str, n_tokens: int) -> dict[str, Any]:
    """A greedy answer of at most ``n_tokens``; "finite" is False at the first logit that is not."""
    fed = engine.tokenize(prompt, special=False)
    if engine.adds_bos or not fed:
        fed = [max(0, engine.bos), *fed]
    position = 0
    found: list[int] = []
    while len(found) < n_tokens:
        engine.decode(fed, position)
        logits = engine.logits()
        if not np.isfinite(logits).all():
            return {"finite": False, "text": "", "tokens": len(found)}
        position += len(fed)
        fed = [int(logits.argmax())]
        if engine.ends(fed[0]):
            break
        found += fed
    text = b"".join(map(engine.piece, found)).decode("utf-8", "replace")
    return {"finite": True, "text": text, "tokens": len(found)}
