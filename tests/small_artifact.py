"""An artifact of 4 kB with the structure of a real one, for tests that damage or replace it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from edgekit.artifact import MANIFEST, Artifact, ArtifactFile, Manifest
from edgekit.recipe import Calibration, Recipe

RECIPE = Recipe("gguf", "Q4_K_M", Calibration("builtin", "ab" * 32, 8), (("ffn_down", "Q8_0"),))


def build(folder: Path) -> Artifact:
    """Write one to ``folder``; its model file holds random bytes."""
    folder.mkdir(parents=True)
    rows = []
    for role, name, size in (("model", "model.gguf", 3000), ("imatrix", "imatrix.gguf", 700)):
        data = random.Random(size).randbytes(size)
        (folder / name).write_bytes(data)
        rows.append(ArtifactFile(role, name, size, hashlib.sha256(data).hexdigest()))
    manifest = Manifest(
        format="gguf",
        recipe=RECIPE,
        source={
            "spec": "smollm2-135m",
            "kind": "gguf",
            "family": "llama",
            "revision": None,
            "quantized": "Q4_1",
            "sha256": {"model.gguf": "cd" * 32},
        },
        files=tuple(rows),
        details={"bits_per_weight": 6.17, "fallbacks": [{"tensor": "blk.0", "type": "Q5_0"}]},
        versions={"edgekit": "0.1.0"},
    )
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return Artifact.open(folder)
