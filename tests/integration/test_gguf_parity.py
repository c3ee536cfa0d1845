"""The float GGUF of every family computes what transformers computes, from the same token ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_eval
import numpy as np
import pytest
import tiny

from edgekit.converter import convert
from edgekit.exporters import hf_to_gguf
from edgekit.exporters.arch.llama import Llama
from edgekit.source import source

TRICKY = [
    "Hello, world! It's 3.14159, isn't it? I'LL say: 1234567890",
    "  leading, trailing  and     inner spaces   ",
    "tabs\tand\n\nnewlines\r\n\n\n   \n\t end",
    "def f(x):\n    return {'a': x[0] ** 2, \"b\": [1, 2]}  # comment\n\n\nclass A:\n\tpass",
    "Käse, naïve café, Ünïcödé, Ελληνικά, Кириллица, العربية, עברית",
    "日本語のテキスト、中文字符，한국어 텍스트",
    "🚀 rocket 👩‍👩‍👧 family 🏳️‍🌈 flag ✅",
    "''''''```````\"\"\"\"......!!!!!!?????? ------=======",
    "a" * 40 + " " * 20 + "b" + " " * 7 + "c",
    "\u200bzero\u200dwidth\ufeffmarks\u00a0and\u3000wide spaces",
    "<s>first <|im_start|>user\nhi<|im_end|> <|begin_of_text|><|end|> <table>  </table> <0x41>",
    "",
    " ",
    "\n",
]


def reference_logits(folder: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    """Logits of transformers in float32."""
    import torch
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return net.eval()(torch.tensor([ids])).logits[0].numpy()


def some_ids(folder: Path, count: int = 64) -> list[int]:
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    return [int(i) for i in np.random.default_rng(7).integers(300, size - 70, count)]


@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_equal_transformers(
    name: str, tiny_model: Callable[[str], Path], tiny_gguf: Callable[[str], Path]
) -> None:
    ids = some_ids(tiny_model(name))
    expected = reference_logits(tiny_model(name), ids)
    with llama_eval.opened(tiny_gguf(name)) as engine:
        found = engine.logits(ids)
    assert np.abs(found - expected).max() <= 1e-2
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_smollm2_answers_as_transformers_does(smollm2_gguf: Path, tmp_path: Path) -> None:
    """The real model, from the folder that ``edgekit convert`` makes of it."""
    import transformers

    folder, out = tmp_path / "folder", tmp_path / "smollm2.gguf"
    convert(smollm2_gguf, folder)
    hf_to_gguf.write(source(folder), out, "F32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(" ".join(TRICKY[3:8]))["input_ids"][:64]
    assert len(ids) == 64
    expected = reference_logits(folder, ids)
    with llama_eval.opened(out) as engine:
        found = engine.logits(ids)
        for text in TRICKY:
            assert (
                engine.ids(text, add_special=True, parse_special=True)
                == (tokenizer(text)["input_ids"])
            ), text
    assert np.abs(found - expected).max() <= 1e-2
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_a_wrong_head_order_would_be_seen(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama, "_pair_neighbours", lambda self, rows: rows)
    folder, out = tiny_model("llama-linear"), tmp_path / "wrong.gguf"
    hf_to_gguf.write(source(folder), out, "F32")
    ids = some_ids(folder)
    with llama_eval.opened(out) as engine:
        found = engine.logits(ids)
    assert np.abs(found - reference_logits(folder, ids)).max() > 1


def test_logits_with_the_long_factors_equal_transformers(
    tiny_model: Callable[[str], Path], tiny_gguf: Callable[[str], Path]
) -> None:
    ids = some_ids(tiny_model("phi3-long"), 300)  # longer than the length it was trained with
    expected = reference_logits(tiny_model("phi3-long"), ids)
    with llama_eval.opened(tiny_gguf("phi3-long")) as engine:
        found = engine.logits(ids)
    assert np.abs(found - expected).max() <= 1e-2
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("name", tiny.MODELS)
def test_token_ids_equal_the_tokenizer(
    name: str, tiny_model: Callable[[str], Path], tiny_gguf: Callable[[str], Path]
) -> None:
    import tokenizers

    expected = tokenizers.Tokenizer.from_file(str(tiny_model(name) / "tokenizer.json"))
    with llama_eval.opened(tiny_gguf(name), vocab_only=True) as engine:
        for text in TRICKY:
            assert engine.ids(text, add_special=True, parse_special=True) == (
                expected.encode(text).ids
            ), text
