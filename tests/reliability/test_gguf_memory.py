"""Writing a float GGUF file needs little memory, whatever the model weighs."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import hf_folder
import numpy as np
import pytest

WRITE = """
import sys
from pathlib import Path
from edgekit.exporters import hf_to_gguf
from edgekit.source import source

def peak_bytes():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024

found = source(sys.argv[1])
hf_to_gguf.header_only(found, Path(sys.argv[2]), sys.argv[3])  # all imports, the whole header
before = peak_bytes()
hf_to_gguf.write(found, Path(sys.argv[2]), sys.argv[3])
print(peak_bytes() - before)
"""


def model(folder: Path, largest_bytes: int, *, random: bool) -> Path:
    """The two-layer llama with matrices of BF16, the largest of ``largest_bytes``."""
    width, middle = 1024, largest_bytes // 2048
    config = {"hidden_size": width, "intermediate_size": middle, "num_attention_heads": 8}
    shapes = {name: list(values.shape) for name, values in hf_folder.llama_tensors().items()}
    for name, shape in shapes.items():
        sizes = {hf_folder.WIDTH: width, hf_folder.WIDTH // 2: width // 8, 16: middle}
        shapes[name] = [sizes.get(size, size) for size in shape]
    hf_folder.make(folder, config=config, tensors={})
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        if random:
            rng = np.random.default_rng(1)
            for start in range(0, at, 1 << 24):
                count = min(1 << 24, at - start) // 2
                # Below the exponents of infinity, so that every value fits F16.
                file.write(rng.integers(0, 0x4000, count, dtype=np.uint16).tobytes())
        file.truncate(8 + len(raw) + at)
    return folder


def grown_bytes(folder: Path, dtype: str) -> int:
    """How far the peak of resident memory rises while the tensors are written."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(folder), str(folder.with_suffix(".gguf")), dtype],
        env=os.environ,
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


@pytest.mark.parametrize("dtype", ["F16", "F32", "native"])
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path, dtype: str) -> None:
    folder = model(tmp_path / "model", 96 << 20, random=False)
    assert grown_bytes(folder, dtype) < 96 << 20


@pytest.mark.slow
def test_a_model_of_a_gigabyte_needs_far_less_than_its_largest_tensor(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", 160 << 20, random=True)
    assert (folder / "model.safetensors").stat().st_size > 950 << 20
    assert grown_bytes(folder, "F16") < 96 << 20
