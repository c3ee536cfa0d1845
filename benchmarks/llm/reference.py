"""A fair float model to measure quantizers on: SmolLM2, moved off the grid that it was stored on.

Knows where it is kept; how it is made, ``edgekit.converter.off_grid`` knows.
"""

from __future__ import annotations

from pathlib import Path

import measure
import peers

from edgekit.converter import off_grid


def make(scratch: Path, seed: int) -> Path:
    """The F32 GGUF of the reference, made once per seed and kept.

    Raises ParityError when its logits differ from the original's by 1e-3 or more.
    """
    path = scratch / f"{peers.MODEL}-reference-{seed}.gguf"
    if not path.is_file():
        measure.say(f"making {path.name}")
        off_grid(peers.MODEL, path, seed=seed)
    return path
