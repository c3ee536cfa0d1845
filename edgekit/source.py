"""What the model is and where its bytes come from: a folder, a file, a hub id, a built-in name.

Pinned, hashed, and checked for anything that would run; it never loads a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit import _fs


@dataclass(frozen=True)
class ModelSource:
    """A checked model on this disk.

    ``kind`` is "hf" (a Hugging Face folder; ``path`` is the folder) or "gguf" (``path`` is the
    file). ``family`` is ``model_type`` of config.json, or ``general.architecture`` of the GGUF.
    ``files`` are names relative to the folder. ``quantized`` names the type of weights that are
    already quantized (``Q4_1``), else None. ``revision`` is the hub's commit, if there is one.
    """

    spec: str
    kind: str
    path: Path
    family: str
    files: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    quantized: str | None = None
    revision: str | None = None

    def file_path(self, name: str) -> Path:
        """Where one of ``files`` lies."""
        return self.path if self.kind == "gguf" else _fs.contained(self.path, name)
