"""What a model says of every token or place, put together to one vector for a text or an image.

Knows arrays and Preprocessing; no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekit.preprocess import Preprocessing


def vectors(hidden: Any, feeds: Mapping[str, Any], steps: Preprocessing) -> Any:
    """float32 [batch, tokens, width] or [batch, width(, height, width)] -> [batch, width].

    The mean of a text's tokens leaves out the padding: https://arxiv.org/abs/1908.10084, section 3.
    Vectors have length 1, but where the model's folder says that they are not normalized.
    """
    text = steps.text
    if text and text.pooling == "mean" and hidden.ndim == 3:
        mask = feeds["attention_mask"][:, :, None].astype(np.float32)
        found = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    elif hidden.ndim == 4:  # the features of a convolution
        found = hidden.mean(axis=(2, 3))
    else:
        found = hidden[:, 0] if hidden.ndim == 3 else hidden
    if text is None or text.normalize:
        found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return found
