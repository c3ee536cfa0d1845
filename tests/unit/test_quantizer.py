"""What the quantizer is told and what is read from its log."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter

from edgekit.errors import RecipeError, UnsupportedModelError
from edgekit.exporters import quantizer
from edgekit.formats import gguf

NAMES = ["token_embd.weight", "blk.0.ffn_down.weight", "blk.10.ffn_down.weight"]


def test_the_first_matching_override_wins() -> None:
    overrides = ((r"blk\.0\.", "Q8_0"), ("ffn_down", "q6_k"))
    q8, q6 = quantizer.tensor_type_id("Q8_0"), quantizer.tensor_type_id("Q6_K")
    assert quantizer.resolve_overrides(NAMES, overrides) == [(NAMES[1], q8), (NAMES[2], q6)]


def test_an_override_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="matches no tensor"):
        quantizer.resolve_overrides(NAMES, (("attn", "Q8_0"),))


def write(path: Path, *, name: str = "x.weight", shards: int = 1) -> Path:
    import numpy as np

    writer = GGUFWriter(path, "llama")
    if shards > 1:
        writer.add_uint16("split.count", shards)
    writer.add_tensor(name, np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_tensor_name_that_the_log_cannot_show_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", name="foo bar")
    with pytest.raises(UnsupportedModelError, match="holds a blank"):
        quantizer.plan(path, "Q8_0", imatrix=False, overrides=())


def test_a_shard_is_refused_before_the_engine_opens_its_sisters(tmp_path: Path) -> None:
    path = write(tmp_path / "model-00001-of-00003.gguf", shards=3)
    with pytest.raises(UnsupportedModelError, match="one of 3 shards") as caught:
        gguf.read(path)
    assert "merge" in (caught.value.hint or "")
