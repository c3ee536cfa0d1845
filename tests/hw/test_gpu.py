"""Layers on an NVIDIA card: as many as fit, and the same answers as the processor gives.

Needs a card, a wheel of ``scripts/build --cuda``, torch with CUDA (it takes memory away) and
EDGEKIT_LLAMA_SOURCE: ``pytest -m hw tests/hw/test_gpu.py``. The model has TinyLlama's shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from large_llama import LAYERS, make

import edgekit
from edgekit import llama_library
from edgekit.exporters import hf_to_gguf
from edgekit.runtimes import gpu_layers
from edgekit.source import source

pytestmark = [pytest.mark.hw, pytest.mark.timeout(1200)]

PROMPT = "The sky is blue because"
_GIB = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama_library.libllama()
    if not llama_library.free_gpu_bytes():
        pytest.skip("the engine sees no graphics card: scripts/build --cuda")
    folder = tmp_path_factory.mktemp("gpu")
    file = folder / "tinyllama-f16.gguf"
    hf_to_gguf.write(source(make(folder / "hf")), file, "F16")
    return file


def _used_bytes(file: Path, **options: Any) -> tuple[int, Any, float]:
    """Graphics memory that a session takes, its likeliest first tokens, and its decode tok/s."""
    before = llama_library.free_gpu_bytes()
    with edgekit.load(file, n_ctx=512, n_threads=4, **options) as session:
        answer = session.complete(PROMPT, max_tokens=48, temperature=0, logprobs=1)
        used = before - llama_library.free_gpu_bytes()
        return used, answer.logprobs[0], answer.decode_tok_s


def test_a_model_that_fits_goes_to_the_card_whole(model: Path) -> None:
    used, first, fast = _used_bytes(model)
    assert used > 0.9 * model.stat().st_size
    none, same, slow = _used_bytes(model, n_gpu_layers=0)
    assert none < 0.1 * model.stat().st_size
    print(f"decode: {fast:.0f} tok/s on the card, {slow:.0f} on the processor")
    assert fast > 2 * slow
    assert first.token == same.token
    assert first.logprob == pytest.approx(same.logprob, abs=0.02)


@pytest.fixture
def crowded(model: Path) -> Iterator[int]:
    """Leave room for about half of the model; yields the free bytes."""
    torch = pytest.importorskip("torch")
    leave = gpu_layers._RESERVE_BYTES + model.stat().st_size // 2
    torch.zeros(1, device="cuda")
    taken = torch.empty(llama_library.free_gpu_bytes() - leave, dtype=torch.uint8, device="cuda")
    yield llama_library.free_gpu_bytes()
    del taken
    torch.cuda.empty_cache()


def test_of_a_model_that_does_not_fit_some_layers_go_there(model: Path, crowded: int) -> None:
    used, first, _ = _used_bytes(model)
    assert 0.2 * model.stat().st_size < used < crowded
    _, same, _ = _used_bytes(model, n_gpu_layers=LAYERS // 4)
    assert first.token == same.token
