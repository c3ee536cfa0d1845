"""`edgekit convert` writes folders that transformers 4 reads as transformers 5 does.

The older release runs in a process of its own, where EDGEKIT_OLDER_TRANSFORMERS, a folder,
stands before the installed packages. ``scripts/test --all`` makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from edgekit.converter import convert
from edgekit.exporters import hf_to_gguf
from edgekit.source import source

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

TEXTS = [
    "Why is the sky blue?",
    "  Käse,\n\n 1234 日本語 🚀 def f(x):\n\treturn x",
    "<|im_start|>user",
]
ANSWER = """
import json, sys, numpy, torch, transformers
folder, ids, texts, out = sys.argv[1], *map(json.loads, sys.argv[2:4]), sys.argv[4]
load = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **load).eval()
with torch.no_grad():
    numpy.save(out, model(torch.tensor([ids])).logits[0].numpy())
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
print(json.dumps([transformers.__version__, [tokenizer(text)["input_ids"] for text in texts]]))
"""


@pytest.fixture(scope="module")
def older() -> Path:
    folder = os.environ.get("EDGEKIT_OLDER_TRANSFORMERS")
    if not folder:
        pytest.skip("EDGEKIT_OLDER_TRANSFORMERS is not set: run scripts/test --all")
    return Path(folder)


def _answers(folder: Path, ids: list[int], out: Path, **env: str) -> tuple[str, Any, Any]:
    """Release, float32 logits [tokens, vocabulary] and token ids of ``TEXTS``."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(folder), json.dumps(ids), json.dumps(TEXTS), str(out)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    release, tokens = json.loads(done.stdout.splitlines()[-1])
    return release, np.load(out), tokens


def _compare(folder: Path, older: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(5, 1000, 64).tolist()
    new, ours, tokens = _answers(folder, ids, tmp_path / "5.npy")
    old, theirs, older_tokens = _answers(folder, ids, tmp_path / "4.npy", PYTHONPATH=str(older))
    assert new.startswith("5.") and old.startswith("4.")
    assert np.abs(ours - theirs).max() <= 1e-3
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    assert tokens == older_tokens


@pytest.mark.parametrize("name", tiny.CONVERTIBLE)
def test_a_converted_folder_of_every_family(name: str, older: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / name, tmp_path / "model.gguf"
    hf_to_gguf.write(source(tiny.make(name, folder, **tiny.CONVERTIBLE[name])), file, "F32")
    _compare(convert(file, tmp_path / "back").path, older, tmp_path)


def test_the_real_smollm2(older: Path, tmp_path: Path) -> None:
    _compare(convert("smollm2-135m", tmp_path / "back").path, older, tmp_path)
