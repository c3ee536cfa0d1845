"""`edgekit convert --off-grid`: the same function, no weight on its old grid, whole or absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np
import pytest
import tiny

from edgekit import _fs
from edgekit.converter import convert, off_grid
from edgekit.errors import OutOfSpaceError, ParityError, UnsupportedModelError, UsageError
from edgekit.exporters import fair_reference
from edgekit.formats import gguf

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def _tensor(path: Path, name: str) -> Any:
    found = gguf.read(path).tensor(name)
    raw = np.memmap(path, dtype=np.uint8, mode="r")[found.offset :][: found.size_bytes]
    kind = ggml.GGMLQuantizationType[found.type]
    rows = raw.reshape(found.elements // found.shape[0], -1)
    return ggml.dequantize(rows.view(np.float32) if kind == 0 else rows, kind)


def _loss(values: Any, kind: ggml.GGMLQuantizationType) -> float:
    """The error of quantizing, relative to the weights."""
    back = ggml.dequantize(ggml.quantize(values, kind), kind)
    return float(np.linalg.norm(back - values) / np.linalg.norm(values))


def test_smollm2_leaves_the_grid_that_made_q4_1_free(
    cli: Callable[..., Any], smollm2_gguf: Path, tmp_path: Path
) -> None:
    done = cli("convert", "smollm2-135m", "--out", "fair.gguf", "--off-grid", "--seed", "1")
    assert done.code == 0, done.stderr
    assert "F32" in done.stdout and "fair.gguf" in done.stdout
    for name in LINEAR:
        stored = _tensor(smollm2_gguf, f"blk.3.{name}.weight")
        moved = _tensor(tmp_path / "fair.gguf", f"blk.3.{name}.weight")
        kind = ggml.GGMLQuantizationType.Q4_1
        assert _loss(stored, kind) < 1e-3, name
        assert 0.05 < _loss(moved, kind) < 0.15, name
        assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(stored), rel=0.1)


@pytest.mark.parametrize(
    "name",
    [
        *("phi3", "gemma3"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llama2", "llama3", "qwen2", "qwen3")
        ),
    ],
)
def test_transformers_computes_the_same_with_the_other_weights(tmp_path: Path, name: str) -> None:
    """The check inside runs llama.cpp; here the other engine says the same."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder = tiny.make(name, tmp_path / "whole", **tiny.CONVERTIBLE.get(name, {}))
    made = off_grid(folder, tmp_path / "fair.gguf", seed=4)
    back = convert(made, tmp_path / "back")
    ids = torch.tensor([np.random.default_rng(3).integers(5, 1000, 48).tolist()])
    logits = []
    for path in (folder, back.path):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits.append((model.eval()(ids).logits[0], model.state_dict()))
    (before, old), (after, new) = logits
    assert (before - after).abs().max() < 1e-3
    on_grid = ("embed_tokens", "lm_head", "q_norm", "k_norm", "rotary", "post_attention_layernorm")
    for key, values in old.items():
        if values.ndim > 1 and not any(part in key for part in on_grid):
            assert not torch.isclose(values, new[key], rtol=1e-3).all(), key


def test_a_seed_gives_the_same_bytes_and_another_others(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_gguf("tinyllama")
    hashes = []
    for number, seed in enumerate((1, 1, 2)):
        made = off_grid(model, tmp_path / f"{number}.gguf", seed=seed)
        hashes.append(_fs.sha256_file(made.path))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_a_family_whose_activation_lets_no_scale_through_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be moved off its grid") as caught:
        off_grid(tiny_model(name), tmp_path / "fair.gguf")
    assert "llama" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.weight", "blk.1.attn_q.bias", "cls.weight"])
def test_a_tensor_that_may_read_a_scaled_channel_is_refused(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    header = gguf.read(tiny_gguf("tinyllama"))
    stranger = gguf.GgufTensor(name, (64,), "F32", 0, 256)
    with pytest.raises(UnsupportedModelError, match=name.rpartition(".")[0].rpartition(".")[2]):
        fair_reference._check(
            gguf.GgufHeader(**{**vars(header), "tensors": (*header.tensors, stranger)})
        )


def test_a_scale_that_is_not_taken_out_again_is_found(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair_reference, "_value_rows", lambda *_: iter(()))
    with pytest.raises(ParityError, match="logits moved by"):
        off_grid(tiny_gguf("tinyllama"), tmp_path / "fair.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "move off the grid":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        off_grid(tiny_gguf("tinyllama"), tmp_path / "fair.gguf", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_the_work(
    tiny_gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fs, "free_bytes", lambda path: 1000)
    with pytest.raises(OutOfSpaceError):
        off_grid(tiny_gguf("tinyllama"), tmp_path / "fair.gguf")
    assert list(tmp_path.iterdir()) == []


def test_nobody_s_file_is_overwritten(tiny_gguf: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "fair.gguf").write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        off_grid(tiny_gguf("tinyllama"), tmp_path / "fair.gguf")
    with pytest.raises(UsageError, match=r"must end in \.gguf"):
        off_grid(tiny_gguf("tinyllama"), tmp_path / "fair")
    assert (tmp_path / "fair.gguf").read_bytes() == b"mine"


def test_options_that_mean_nothing_together_are_refused(cli: Callable[..., Any]) -> None:
    both = cli("convert", "smollm2-135m", "--out", "x.gguf", "--off-grid", "--dtype", "f16")
    alone = cli("convert", "smollm2-135m", "--out", "x", "--seed", "3")
    assert (both.code, alone.code) == (2, 2)
    assert "--dtype" in both.stderr and "--off-grid" in alone.stderr
