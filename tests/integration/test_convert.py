"""`edgekit convert`: a GGUF file becomes a folder that computes, splits and templates the same."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer

from edgekit.converter import convert
from edgekit.errors import (
    EdgekitError,
    ExportError,
    OutOfSpaceError,
    SourceError,
    UnsupportedModelError,
    UsageError,
)
from edgekit.exporters import (
    hf_to_gguf,
    pre_tokenizers,
    to_hf_families,
    tokenizer_bpe,
    tokenizer_files,
)
from edgekit.exporters.to_hf import MARKER
from edgekit.exporters.to_hf_tokenizer import GgufTokenizer
from edgekit.formats import gguf, safetensors
from edgekit.source import ModelSource, source

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TRICKY = [
    "Hello, world! It's 3.14159, isn't it? I'LL say: 1234567890",
    "  leading, trailing  and     inner spaces   ",
    "tabs\tand\n\nnewlines\r\n\n\n   \n\t end",
    "def f(x):\n    return {'a': x[0] ** 2}  # comment\n\n\nclass A:\n\tpass",
    "Käse, naïve café, Ελληνικά, Кириллица, العربية, 日本語、한국어 🚀 👩‍👩‍👧 ✅",
    "''''''```````\"\"\"\"......!!!!!!?????? ------=======",
    "<s>x</s> <|im_start|>user\nhi<|im_end|> <|begin_of_text|> <|endoftext|>  <0x41>",
    "",
    " ",
    "\n",
]
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why is the sky blue?"},
]


def _logits(folder: Path, ids: list[int], **options: Any) -> Any:
    """Float32 [tokens, vocabulary] of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    )
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """The real SmolLM2 as a folder, made once."""
    return convert("smollm2-135m", tmp_path_factory.mktemp("smollm2") / "hf")


@pytest.mark.slow
def test_smollm2_computes_what_transformers_reads_from_the_file(
    smollm2: ModelSource, smollm2_gguf: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.path)
    ids = tokenizer(" ".join(TRICKY))["input_ids"][:64]
    ours = _logits(smollm2.path, ids)
    theirs = _logits(smollm2_gguf.parent, ids, gguf_file=smollm2_gguf.name)
    assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_smollm2_splits_and_templates_as_transformers_does_from_the_file(
    smollm2: ModelSource, smollm2_gguf: Path
) -> None:
    ours = transformers.AutoTokenizer.from_pretrained(smollm2.path)
    theirs = transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )
    for text in TRICKY:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    for generation in (False, True):
        options = {"tokenize": False, "add_generation_prompt": generation}
        rendered = ours.apply_chat_template(CHAT, **options)
        assert rendered == theirs.apply_chat_template(CHAT, **options)
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert [getattr(ours, name) for name in special] == [getattr(theirs, name) for name in special]


def test_smollm2_speaks_its_own_template_and_comes_back_as_text(smollm2: ModelSource) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.path)
    rendered = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id] == [2]
    for text in TRICKY:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_smollm2_answers_as_llama_cpp_does(smollm2: ModelSource, smollm2_gguf: Path) -> None:
    """llama.cpp rounds activations to 8 bits on quantized weights, hence a mean of 0.01."""
    from edgekit.llama_library import libllama

    libllama()
    import llama_cpp

    engine = llama_cpp.Llama(str(smollm2_gguf), n_ctx=256, logits_all=True, verbose=False)
    text = " ".join(TRICKY[:5])
    ids = engine.tokenize(text.encode(), add_bos=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.path)
    assert tokenizer(text)["input_ids"] == ids
    engine.eval(ids)
    theirs = torch.log_softmax(torch.tensor(np.array(engine.scores[: len(ids)])), -1)
    ours = torch.log_softmax(torch.tensor(_logits(smollm2.path, ids)), -1)
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    assert divergence.mean() < 0.01
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9


def _strip_as_phi3(path: Path) -> None:
    """What the real Phi-3 says of its added tokens, and llama.cpp knows without being told."""
    body = json.loads(path.read_text())
    for token in body["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    path.write_text(json.dumps(body))


@pytest.fixture(scope="module")
def way_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, Path, ModelSource]]:
    """Original folder, its F32 GGUF file, and the folder made of that file."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def make(name: str) -> tuple[Path, Path, ModelSource]:
        if name not in made:
            folder = tiny.make(name, root / name, **tiny.CONVERTIBLE[name])
            if name.startswith("phi3"):
                _strip_as_phi3(folder / "tokenizer.json")
            file = root / f"{name}.gguf"
            hf_to_gguf.write(source(folder), file, "F32")
            made[name] = folder, file, convert(file, root / f"{name}-back")
        return made[name]

    return make


@pytest.mark.parametrize("name", tiny.CONVERTIBLE)
def test_every_family_comes_back_with_equal_logits(way_back: Any, name: str) -> None:
    folder, _, back = way_back(name)
    ids = np.random.default_rng(3).integers(5, 1000, 64).tolist()
    original, ours = _logits(folder, ids), _logits(back.path, ids)
    # Gemma's norms may lose their last bit to the 1 that is added and subtracted.
    assert np.abs(original - ours).max() <= (1e-3 if name == "gemma3" else 0)
    assert (original.argmax(-1) == ours.argmax(-1)).all()


@pytest.mark.parametrize("name", tiny.CONVERTIBLE)
def test_every_family_comes_back_with_its_token_ids(way_back: Any, name: str) -> None:
    folder, _, back = way_back(name)
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = Tokenizer.from_file(str(back.path / "tokenizer.json"))
    for text in TRICKY:
        for special in (False, True):
            expected = original.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, add_special_tokens=special).ids == expected, text


@pytest.mark.parametrize("name", tiny.CONVERTIBLE)
def test_the_same_file_comes_out_again(way_back: Any, tmp_path: Path, name: str) -> None:
    """GGUF -> folder -> GGUF: the same tensors and the same metadata, so nothing got lost."""
    _, file, back = way_back(name)
    again = tmp_path / "again.gguf"
    hf_to_gguf.write(back, again, "F32")
    first, second = gguf.read(file), gguf.read(again)
    # SentencePiece scores come back as ranks; "no end token" goes without saying.
    said = {"tokenizer.ggml.scores": [], "tokenizer.ggml.add_eos_token": False}
    assert first.metadata | said == second.metadata | said
    assert {t.name: t.shape for t in first.tensors} == {t.name: t.shape for t in second.tensors}


@pytest.mark.parametrize(
    "name", ["llama-spm", "llama-bpe", "qwen2", "gpt-2", "refact", "starcoder"]
)
def test_real_vocabularies_give_the_expected_ids(llama_source: Path, name: str) -> None:
    path = llama_source / "vendor" / "llama.cpp" / "models" / f"ggml-vocab-{name}.gguf"
    body = GgufTokenizer(gguf.read(path)).tokenizer_json()
    tokenizer = Tokenizer.from_str(json.dumps(body))
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    ids = Path(f"{path}.out").read_text(encoding="utf-8").split("\n")
    for text, line in zip(texts, ids, strict=True):
        found = tokenizer.encode(text, add_special_tokens=False).ids
        assert found == [int(each) for each in line.split()], text


def test_the_exporter_recognizes_every_rebuilt_splitting_rule(tmp_path: Path) -> None:
    """One table, read in both directions; equal rules get the first of their names."""
    same = {"phi-2": "gpt-2", "refact": "smollm", "starcoder": "smollm"}
    for name, rule in pre_tokenizers.RULES.items():
        (tmp_path / "tokenizer.json").write_text(
            json.dumps(
                {
                    "added_tokens": [],
                    "normalizer": {"type": "NFC"} if rule.nfc else None,
                    "pre_tokenizer": {"type": "Sequence", "pretokenizers": rule.steps},
                    "model": {
                        "type": "BPE",
                        "vocab": {},
                        "merges": [],
                        "ignore_merges": rule.whole_words,
                    },
                }
            )
        )
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        found = ModelSource("x", "hf", tmp_path, "gpt2", ("config.json", "tokenizer.json"))
        files = tokenizer_files.TokenizerFiles(found)
        assert tokenizer_bpe.pre_tokenizer(files) == same.get(name, name)


def test_both_releases_of_transformers_find_their_words(way_back: Any) -> None:
    config = json.loads((way_back("llama-linear")[2].path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["dtype"] == config["torch_dtype"] == "float32"
    tokenizer = json.loads((way_back("qwen2")[2].path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(("dtype", "ours"), [("f32", "F32"), ("f16", "F16"), ("bf16", "BF16")])
def test_weights_are_rounded_as_torch_rounds_them(
    way_back: Any, tmp_path: Path, dtype: str, ours: str
) -> None:
    from safetensors.torch import load_file

    _, file, whole = way_back("llama2")
    back = convert(file, tmp_path / dtype, dtype=dtype)
    header = safetensors.read(back.path / "model.safetensors")
    assert {tensor.dtype for tensor in header.tensors.values()} == {ours}
    exact = load_file(whole.path / "model.safetensors")
    rounded = load_file(back.path / "model.safetensors")
    wanted = getattr(torch, back.config["dtype"])
    for name, tensor in exact.items():
        assert torch.equal(tensor.to(wanted), rounded[name]), name


def test_a_float_file_keeps_its_type(way_back: Any, tmp_path: Path) -> None:
    folder, _, _ = way_back("llama2")
    file = tmp_path / "half.gguf"
    hf_to_gguf.write(source(folder), file, "F16")
    assert convert(file, tmp_path / "half").config["dtype"] == "float16"


def test_values_beyond_float16_are_refused(tmp_path: Path, way_back: Any) -> None:
    _, file, _ = way_back("llama2")
    header, data = gguf.read(file), bytearray(file.read_bytes())
    struct.pack_into("<f", data, header.tensor("blk.0.ffn_up.weight").offset, 1e6)
    large = tmp_path / "large.gguf"
    large.write_bytes(data)
    with pytest.raises(ExportError, match="ffn_up"):
        convert(large, tmp_path / "out", dtype="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.gguf"]
    assert convert(large, tmp_path / "out", dtype="bf16").config["dtype"] == "bfloat16"


def test_a_folder_of_our_own_is_replaced_and_nobody_elses(way_back: Any, tmp_path: Path) -> None:
    _, file, _ = way_back("gpt2")
    out = tmp_path / "out"
    convert(file, out)
    (out / "stale").write_text("from the run before")
    convert(file, out)
    assert not (out / "stale").exists()
    marker = json.loads((out / MARKER).read_text())
    assert marker["sha256"] == source(file).hashes()[file.name]
    (out / MARKER).unlink()
    with pytest.raises(UsageError, match="was not made by edgekit"):
        convert(file, out)


def test_the_same_file_gives_the_same_bytes(way_back: Any, tmp_path: Path) -> None:
    _, file, back = way_back("gpt2")
    again = convert(file, tmp_path / "again")
    for name in [path.name for path in back.path.iterdir()]:
        assert (again.path / name).read_bytes() == (back.path / name).read_bytes(), name


def test_too_little_space_is_said_before_the_work(
    way_back: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file, _ = way_back("gpt2")
    monkeypatch.setattr("edgekit._fs.free_bytes", lambda _: 1 << 20)
    with pytest.raises(OutOfSpaceError):
        convert(file, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _with_metadata(file: Path, out: Path, **changed: Any) -> Path:
    """A copy of ``file`` with other metadata (dots in keys are written as two underscores).

    Its vocabulary is cut short: writing it whole takes seconds, and no case here gets that far.
    """
    import gguf as library

    header, data = gguf.read(file), file.read_bytes()
    architecture = changed.pop("architecture", header.architecture)
    writer = library.GGUFWriter(out, architecture)
    values = header.metadata | {key.replace("__", "."): value for key, value in changed.items()}
    for key, value in values.items():
        if key == "general.architecture" or value is None or key.endswith("_token_id"):
            continue
        if isinstance(value, list):
            writer.add_array(key, value[:300])
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for tensor in header.tensors:
        values = np.frombuffer(data, "<f4", tensor.elements, tensor.offset)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"architecture": "mamba"}, "mamba"),
        ({"tokenizer__ggml__model": "bert"}, "bert"),
        ({"tokenizer__ggml__pre": "new-split"}, "new-split"),
        ({"gpt2__block_count": 3}, "layer 2"),
        ({"gpt2__block_count": 1}, "blk.1."),
        ({"gpt2__embedding_length": None}, "gpt2.embedding_length"),
        ({"gpt2__attention__layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"gpt2__attention__head_count": 0}, "head_count"),
    ],
)
def test_what_has_no_form_is_refused_by_name(
    way_back: Any, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    _, file, _ = way_back("gpt2")
    odd = _with_metadata(file, tmp_path / "odd.gguf", **changed)
    with pytest.raises((UnsupportedModelError, SourceError), match=words) as caught:
        convert(odd, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_rope_factors_of_ones_own_are_refused(tmp_path: Path) -> None:
    folder = tiny.make("llama3", tmp_path / "hf")  # trained for 128 positions: no release is
    hf_to_gguf.write(source(folder), tmp_path / "odd.gguf", "F32")
    with pytest.raises(UnsupportedModelError, match="rope factors"):
        convert(tmp_path / "odd.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("spec", "options"), [("folder", {}), ("file", {"dtype": "int8"}), ("missing.gguf", {})]
)
def test_bad_requests_are_our_errors(
    way_back: Any, tmp_path: Path, spec: str, options: dict[str, str]
) -> None:
    folder, file, _ = way_back("gpt2")
    with pytest.raises(EdgekitError):
        convert({"folder": folder, "file": file}.get(spec, spec), tmp_path / "out", **options)


def test_a_broken_dimension_never_divides_by_zero(way_back: Any, tmp_path: Path) -> None:
    _, file, _ = way_back("llama2")
    odd = _with_metadata(file, tmp_path / "odd.gguf", llama__attention__head_count=1 << 20)
    with pytest.raises(EdgekitError):
        convert(odd, tmp_path / "out")


def test_the_verb_warns_writes_and_answers_in_json(
    cli: Callable[..., Any], tmp_path: Path, way_back: Any
) -> None:
    _, file, _ = way_back("gpt2")
    ran = cli("convert", file, "--out", "hf", "--json", "--dtype", "f16")
    assert ran.code == 0, ran.stderr
    body = json.loads(ran.stdout)
    assert (body["family"], body["dtype"]) == ("gpt2", "float16")
    assert body["size_bytes"] == sum((tmp_path / "hf" / n).stat().st_size for n in body["files"])
    ran = cli("convert", tmp_path / "hf", "--out", "again")
    assert ran.code == 2 and "Hugging Face folder already" in ran.stderr


def test_the_verb_says_that_quantized_weights_stay_what_they_are(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    ran = cli("convert", "smollm2-135m", "--out", "hf", "--dtype", "bf16")
    assert ran.code == 0, ran.stderr
    assert "is quantized (Q4_1)" in ran.stderr
    assert source(tmp_path / "hf").config["dtype"] == "bfloat16"


def test_every_layout_is_proved_here() -> None:
    families = {layout.model_type for layout in to_hf_families.LAYOUTS.values()}
    proved = {tiny.MODELS[name][0] for name in tiny.CONVERTIBLE}
    assert {name.removesuffix("_text") for name in families} == {name.lower() for name in proved}
