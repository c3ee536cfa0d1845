"""Tokenizers in GGUF: llama.cpp splits as the model's own tokenizer does, or the export refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_folder
import llama_eval
import pytest
import tiny_tokenizers
from hf_folder import byte_tokenizer

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters import hf_to_gguf, pre_tokenizers, to_gguf_tokenizer
from edgekit.exporters.arch.llama import Llama
from edgekit.formats import gguf
from edgekit.source import ModelSource, source

Made = Callable[[dict[str, Any], str], Path]


def vocab_only(folder: Path, vocab_size: int, out: Path) -> Path:
    """A GGUF file with the tokenizer of ``folder`` and nothing else."""
    from gguf import GGUFWriter

    config = hf_folder.LLAMA | {"vocab_size": vocab_size}
    files = tuple(path.name for path in folder.iterdir())
    writer = GGUFWriter(path=None, arch="llama")
    family = Llama(config)
    to_gguf_tokenizer.add(writer, ModelSource("t", "hf", folder, "llama", files, config), family)
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return out


def check(out: Path, expected: list[tuple[str, list[int]]]) -> None:
    assert len(expected) > 40
    with llama_eval.opened(out, vocab_only=True) as engine:
        for text, ids in expected:
            assert engine.ids(text, add_special=False, parse_special=False) == ids, text


@pytest.mark.parametrize(
    ("tokenizer", "vocabulary", "pre"),
    [
        ("llama2", "llama-spm", "default"),
        ("llama2-json", "llama-spm", "default"),
        ("llama3", "llama-bpe", "llama-bpe"),
        ("phi3", "phi-3", "default"),
        ("qwen2", "qwen2", "qwen2"),
        ("gpt2", "gpt-2", "gpt-2"),
    ],
)
def test_ids_are_the_ones_llama_cpp_ships_for_its_own_tests(
    tmp_path: Path, tokenizer: str, vocabulary: str, pre: str
) -> None:
    size = tiny_tokenizers.TOKENIZERS[tokenizer](tmp_path)
    out = vocab_only(tmp_path, size, tmp_path / "vocab.gguf")
    assert gguf.read(out).metadata["tokenizer.ggml.pre"] == pre
    check(out, tiny_tokenizers.vocab_file(vocabulary).expected)


def test_digits_then_words_is_smollm(tmp_path: Path) -> None:
    """StarCoder splits by the same rule, and its expected ids are known."""
    vocab = tiny_tokenizers.vocab_file("starcoder")
    digits = {"type": "Digits", "individual_digits": True}
    tiny_tokenizers.write_json(
        tmp_path,
        "tokenizer.json",
        tiny_tokenizers.byte_level(vocab, [digits, tiny_tokenizers.WORDS]),
    )
    out = vocab_only(tmp_path, len(vocab.tokens), tmp_path / "vocab.gguf")
    assert gguf.read(out).metadata["tokenizer.ggml.pre"] == "smollm"
    check(out, vocab.expected)


def test_the_rule_of_llama_3_with_merges_in_order_is_dbrx(tmp_path: Path) -> None:
    """Phi-4's. Its vocabulary is in no package: Llama 3's own, split by merges alone."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = tiny_tokenizers.vocab_file("llama-bpe")
    steps = [tiny_tokenizers.isolated(tiny_tokenizers.LLAMA_3_SPLIT), tiny_tokenizers.BYTES]
    tiny_tokenizers.write_json(tmp_path, "tokenizer.json", tiny_tokenizers.byte_level(vocab, steps))
    out = vocab_only(tmp_path, len(vocab.tokens), tmp_path / "vocab.gguf")
    assert gguf.read(out).metadata["tokenizer.ggml.pre"] == "dbrx"
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [text for text, _ in vocab.expected]
    check(out, [(text, own.encode(text, add_special_tokens=False).ids) for text in texts])


def test_every_splitting_rule_is_tested_above() -> None:
    tested = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2")
    rules = [pre_tokenizers.RULES[name] for name in tested]
    assert all(rule in rules for rule in pre_tokenizers.RULES.values())


def test_runs_of_spaces_split_as_the_tokenizer_splits_them(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    size = tiny_tokenizers.TOKENIZERS["llama2-json"](tmp_path)
    out = vocab_only(tmp_path, size, tmp_path / "vocab.gguf")
    own = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [f"a{' ' * count}b" for count in range(1, 60)]
    check(out, [(text, own.encode(text, add_special_tokens=False).ids) for text in texts])


def metadata(folder: Path) -> dict[str, Any]:
    out = folder.with_suffix(".gguf")
    hf_to_gguf.write(source(folder), out, "F32")
    return {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value
        for key, value in gguf.read(out).metadata.items()
        if key.startswith("tokenizer.")
    }


def test_both_ways_to_write_merges_are_one(tmp_path: Path) -> None:
    pairs = byte_tokenizer()
    pairs["model"]["merges"] = [["h", "e"], ["l", "lo"]]
    texts = metadata(hf_folder.make(tmp_path / "texts"))
    assert texts["merges"] == ["h e", "l lo"]
    assert texts == metadata(hf_folder.make(tmp_path / "pairs", tokenizer=pairs))


def test_added_tokens_get_the_type_that_llama_cpp_gives_them(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer["added_tokens"].append({"id": 260, "content": "<|tool|>", "special": False})
    tensors = hf_folder.llama_tensors()
    grown = tensors["model.embed_tokens.weight"].repeat(2, axis=0)[:262]
    folder = hf_folder.make(
        tmp_path / "model",
        tokenizer=tokenizer,
        tensors=tensors | {"model.embed_tokens.weight": grown},
        config={"vocab_size": 262},
    )
    found = metadata(folder)
    # control, user defined, control by its looks, unused
    assert found["token_type"][257:] == [1, 3, 4, 3, 5]
    assert found["tokens"][257:] == ["llo", "<|end|>", "[tool]", "<|tool|>", "[PAD261]"]


def around(bos: str | None = None, eos: str | None = None) -> dict[str, Any]:
    ends = [[{"SpecialToken": {"id": end, "type_id": 0}}] if end else [] for end in (bos, eos)]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [*ends[0], text, *ends[1]]}


@pytest.mark.parametrize(
    ("post", "config", "expected"),
    [
        (None, {}, {}),
        (None, {"add_bos_token": True}, {"add_bos_token": True}),
        ({"type": "ByteLevel"}, {}, {"add_bos_token": False, "add_eos_token": False}),
        (around(bos="[tool]"), {"bos_token": "[tool]"}, {"add_bos_token": True}),
        (around(eos="<|end|>"), {}, {"add_eos_token": True}),
        (
            {"type": "Sequence", "processors": [{"type": "ByteLevel"}, around(bos="<|end|>")]},
            {"bos_token": {"content": "<|end|>"}, "add_bos_token": False},
            {"add_bos_token": True, "add_eos_token": False},
        ),
    ],
)
def test_what_goes_around_a_text(
    tmp_path: Path, post: Any, config: dict[str, Any], expected: dict[str, bool]
) -> None:
    tokenizer = byte_tokenizer() | {"post_processor": post}
    found = metadata(
        hf_folder.make(tmp_path / "model", tokenizer=tokenizer, tokenizer_config=config)
    )
    assert {k: v for k, v in found.items() if k.startswith("add_")} == expected


def test_special_ids_come_from_texts_and_then_from_the_config(tmp_path: Path) -> None:
    folder = hf_folder.make(
        tmp_path / "model",
        tokenizer_config={"pad_token": {"content": "[tool]"}, "bos_token": None},
        config={"bos_token_id": 3, "eos_token_id": [1, 2], "pad_token_id": 9},
    )
    found = metadata(folder)
    ids = {key: value for key, value in found.items() if key.endswith("_token_id")}
    assert ids == {"bos_token_id": 3, "eos_token_id": 258, "padding_token_id": 259}


def test_a_chat_template_is_found_wherever_it_lies(tmp_path: Path) -> None:
    plain = hf_folder.make(tmp_path / "plain", tokenizer_config={"chat_template": "{{ a }}"})
    assert metadata(plain)["chat_template"] == "{{ a }}"
    several = [{"name": n, "template": f"{{{{ {n} }}}}"} for n in ("tool_use", "default", "b")]
    listed = metadata(hf_folder.make(tmp_path / "l", tokenizer_config={"chat_template": several}))
    assert listed["chat_template"] == "{{ default }}"
    assert listed["chat_templates"] == ["b", "tool_use"]
    assert listed["chat_template.tool_use"] == "{{ tool_use }}"
    beside = hf_folder.make(tmp_path / "beside")
    (beside / "chat_template.jinja").write_text("{{ c }}")
    assert metadata(beside)["chat_template"] == "{{ c }}"
    assert "chat_template" not in metadata(hf_folder.make(tmp_path / "none"))


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "Whitespace"),
        ("pre_tokenizer", None, "none"),
        ("pre_tokenizer", tiny_tokenizers.isolated(r"\d+|\D+"), r"isolated \\d"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "add_prefix_space"),
        ("normalizer", {"type": "Lowercase"}, "Lowercase"),
        ("post_processor", {"type": "RobertaProcessing"}, "RobertaProcessing"),
        ("post_processor", around(bos="[tool]"), r"\[tool\]"),
    ],
)
def test_a_step_without_a_name_in_llama_cpp_is_refused_by_its_own(
    tmp_path: Path, part: str, value: Any, named: str
) -> None:
    folder = hf_folder.make(tmp_path / "model", tokenizer=byte_tokenizer() | {part: value})
    with pytest.raises(UnsupportedModelError, match=named):
        metadata(folder)


def test_a_join_that_is_no_merge_is_refused(tmp_path: Path) -> None:
    """llama.cpp would make 'ab' of 'a' and 'b', which this tokenizer keeps apart."""
    texts = ["<unk>", "a", "b", "c", "ab", "bc", *(f"<0x{byte:02X}>" for byte in range(254))]
    vocab = {text: index for index, text in enumerate(texts)}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab}
    tokenizer = byte_tokenizer() | {"pre_tokenizer": None, "added_tokens": []}
    apart = tokenizer | {"model": {**model, "merges": [["b", "c"]]}}
    with pytest.raises(UnsupportedModelError, match="'a' and 'b'"):
        metadata(hf_folder.make(tmp_path / "apart", tokenizer=apart))
    joined = tokenizer | {"model": {**model, "merges": [["b", "c"], ["a", "b"]]}}
    with pytest.raises(UnsupportedModelError, match="no token <0xFE>"):
        metadata(hf_folder.make(tmp_path / "joined", tokenizer=joined))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = hf_folder.make(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        metadata(folder)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer["added_tokens"][1]["id"] = 4000
    with pytest.raises(SourceError, match="4000"):
        metadata(hf_folder.make(tmp_path / "model", tokenizer=tokenizer))


def test_a_sentencepiece_model_that_rewrites_text_is_refused(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2 as pb

    model = pb.ModelProto()
    for text in ("<unk>", "a", "b"):
        model.pieces.add(piece=text, score=0.0)
    model.trainer_spec.model_type = 2
    model.normalizer_spec.remove_extra_whitespaces = True
    folder = hf_folder.make(tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedModelError, match="rewrites the text"):
        metadata(folder)
    model.normalizer_spec.remove_extra_whitespaces = False
    model.trainer_spec.model_type = 1
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedModelError, match="unigram"):
        metadata(folder)


def test_tokens_of_older_folders_are_found_without_a_tokenizer_json(tmp_path: Path) -> None:
    size = tiny_tokenizers.TOKENIZERS["llama2"](tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"][str(size)] = {"content": "<|im_start|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[tool]": size + 1}))
    found = gguf.read(vocab_only(tmp_path, size + 2, tmp_path / "vocab.gguf")).metadata
    assert found["tokenizer.ggml.tokens"][size:] == ["<|im_start|>", "[tool]"]
    assert found["tokenizer.ggml.token_type"][size:] == [3, 4]
    assert found["tokenizer.ggml.add_space_prefix"] is True
