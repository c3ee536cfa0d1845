"""`edgekit eval --sensitivity`: fewer bits lose more, outliers are found, and no work is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import pytest
import tiny

from edgekit import _fs, evaluate
from edgekit.errors import OutOfSpaceError, UsageError
from edgekit.exporters import hf_to_gguf, quantizer
from edgekit.formats import gguf
from edgekit.sensitivity import sensitivity
from edgekit.sensitivity_report import ModelRows, Report
from edgekit.source import source

pytest.importorskip("transformers")

# 256 columns: the blocks of every type fit. 1024 positions: an importance matrix reads 512.
_LLAMA = tiny.MODELS["tinyllama"][2] | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
    "vocab_size": hf_folder.VOCAB,
}
_GPT2 = {"vocab_size": hf_folder.VOCAB, "n_embd": 256, "n_layer": 2, "n_head": 4}
_PLANTED_LAYER = 1
_FEW: dict[str, Any] = {"n_ctx": 128, "text_bytes": 6000, "part_bytes": 3000, "chunks": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained llama whose tokens are bytes."""
    import transformers

    folder = tmp_path_factory.mktemp("models") / "llama"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA))
    tiny._weights(model, 0.3)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(hf_folder.byte_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama as a float GGUF."""
    out = tmp_path_factory.mktemp("plain") / "plain.gguf"
    hf_to_gguf.write(source(llama), out, "F32")
    return out


@pytest.fixture(scope="module")
def planted(plain: Path) -> Path:
    """The same function, with a fifth of the channels before one ffn_down a hundred times larger.

    Their columns in ffn_down are a hundred times smaller than their neighbours in a block.
    """
    out = plain.with_name("planted.gguf")
    shutil.copyfile(plain, out)
    header, data = gguf.read(out), np.memmap(out, dtype=np.uint8, mode="r+")

    def view(kind: str) -> Any:
        found = header.tensor(f"blk.{_PLANTED_LAYER}.{kind}.weight")
        part = data[found.offset : found.offset + found.size_bytes]
        return part.view(np.float32).reshape(found.shape[::-1])

    view("ffn_up")[::5] *= 100
    view("ffn_down")[:, ::5] /= 100
    data.flush()
    return out


@pytest.fixture(scope="module")
def outliers(plain: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What the two say of each other, at 4 bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_HOME", str(tmp_path_factory.mktemp("home")))
        return sensitivity([plain, planted], evaluate.read_text(None), bits=(4,), **_FEW)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fewer_bits_lose_more_of_smollm2(smollm2_gguf: Path) -> None:
    few = _FEW | {"text_bytes": 3000}
    report = sensitivity([smollm2_gguf], evaluate.read_text(None), bits=(2, 8, 4), layers=0, **few)
    (model,) = report.models
    assert [row.bits for row in model.bits] == [8, 4, 2]
    eight, four, two = (row.mean_kl.value for row in model.bits)
    assert 0 < eight < 0.5 * four < 0.25 * two
    assert [row.type for row in model.bits] == ["Q8_0", "Q4_K_M", "Q2_K"]
    assert model.bits[0].bits_per_weight > model.bits[1].bits_per_weight
    assert 3 < model.bytes_per_token < 5
    assert report.answers == () and "starts from Q4_1" in report.notes[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_outlier_channels_make_a_model_more_sensitive(outliers: Report) -> None:
    (answer,) = outliers.answers
    assert answer.per_byte == answer.per_token == {4: "planted"}
    assert "planted is more sensitive than plain at 4 bits" in answer.sentence
    plain, planted = outliers.models
    # The floats are one function.
    assert planted.reference_perplexity == pytest.approx(plain.reference_perplexity, rel=1e-3)


@pytest.mark.slow
def test_the_breakdown_finds_the_tensor_and_the_layer(outliers: Report) -> None:
    plain, planted = outliers.models
    for parts, guilty in (("kinds", "ffn_down"), ("layers", str(_PLANTED_LAYER))):
        before = {row.name: row.mean_kl.value for row in getattr(plain, parts)}
        after = {row.name: row.mean_kl.value for row in getattr(planted, parts)}
        grown = {name: after[name] / before[name] for name in before}
        assert max(grown, key=lambda name: grown[name]) == guilty, grown
        assert grown[guilty] > 2
        assert all(grown[name] == pytest.approx(1, abs=0.3) for name in grown if name != guilty)
    assert sum(row.share_of_weights for row in planted.kinds) == pytest.approx(1)
    assert {kind for row in planted.kinds for kind in row.types} == {"Q4_K"}


@pytest.mark.slow
def test_the_activations_show_the_outliers(outliers: Report) -> None:
    plain, planted = outliers.models

    def widest(model: ModelRows) -> Any:
        return max(model.inputs, key=lambda row: row.kurtosis)

    found = widest(planted)
    assert (found.kind, found.layer) == ("ffn_down", _PLANTED_LAYER)
    (same,) = [r for r in plain.inputs if (r.kind, r.layer) == (found.kind, found.layer)]
    assert found.kurtosis > 3 * same.kurtosis
    assert found.max_to_median > 30 * same.max_to_median
    names = {(row.kind, row.layer) for row in plain.inputs}
    assert names >= {("attn_q", 0), ("attn_output", 1), ("ffn_up", 1), ("output", None)}


def test_kurtosis_is_that_of_a_known_distribution() -> None:
    from edgekit.runtimes.llama_activations import _Spread

    values = np.random.default_rng(1).standard_normal((4000, 50)).astype(np.float32) + 0.5
    spread = _Spread(50)
    spread.add(values[:1000])
    spread.add(values[1000:])
    assert spread.figures()["kurtosis"] == pytest.approx(3, abs=0.05)
    assert spread.figures()["max_to_median"] == pytest.approx(1.2, abs=0.2)
    values[:, 7] *= 40
    wide = _Spread(50)
    wide.add(values)
    assert wide.figures()["kurtosis"] > 50
    assert wide.figures()["max_to_median"] == pytest.approx(40, rel=0.2)


def test_an_interrupted_run_goes_on_where_it_was_and_leaves_no_model(
    plain: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, made = evaluate.read_text(None), []
    real = quantizer.quantize

    def counted(*arguments: Any, **options: Any) -> None:
        made.append(arguments[2])
        real(*arguments, **options)

    def stop(stage: str, done: int, total: int) -> None:
        if stage.endswith("bits") and done > total / 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(quantizer, "quantize", counted)
    options: dict[str, Any] = {"bits": (8, 2), "layers": 0, **_FEW}
    with pytest.raises(KeyboardInterrupt):
        sensitivity([plain], text, progress=stop, **options)
    assert list((home / "cache" / "sensitivity-scratch").iterdir()) == []
    assert made == ["Q8_0", "Q2_K"]
    first = sensitivity([plain], text, **options)
    assert made == ["Q8_0", "Q2_K", "Q2_K"], "only what was not yet measured is made again"
    assert sensitivity([plain], text, **options) == first
    assert len(made) == 3


def test_what_a_killed_run_left_is_removed(plain: Path, home: Path) -> None:
    left = home / "cache" / "sensitivity-scratch" / "4194305"  # above the largest process number
    left.mkdir(parents=True)
    (left / "floats.gguf").write_bytes(b"x")
    sensitivity([plain], evaluate.read_text(None), bits=(8,), layers=0, **_FEW)
    assert list(left.parent.iterdir()) == []


def test_sixteen_bits_lose_next_to_nothing_and_have_no_parts(plain: Path) -> None:
    (model,) = sensitivity([plain], evaluate.read_text(None), bits=(16,), **_FEW).models
    assert model.bits[0].type == "F16" and model.bits[0].mean_kl.value < 1e-3
    assert model.kinds == model.layers == ()


def test_a_full_disk_is_said_before_a_file_is_made(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fs, "free_bytes", lambda path: 1000)
    with pytest.raises(OutOfSpaceError):
        sensitivity([plain], evaluate.read_text(None), bits=(8,), **_FEW)


@pytest.fixture(scope="module")
def gpt2(llama: Path) -> Path:
    """The folder of an untrained model of another family."""
    import transformers

    folder = llama.with_name("gpt2")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2))
    tiny._weights(model, 0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llama / name, folder / name)
    return folder


def test_two_families_are_compared_from_the_command_line(
    cli: Callable[..., Any], llama: Path, gpt2: Path
) -> None:
    words: list[Any] = ["eval", "--sensitivity", llama, gpt2, "--bits", "8,2", "--layers", 0]
    done = cli(*words, "--text-bytes", 2000, "--ctx", 128, "--json")
    assert done.code == 0, done.stderr
    body = json.loads(done.stdout)
    one, other = body["models"]
    assert (one["family"], other["family"]) == ("llama", "gpt2")
    for model in (one, other):
        eight, two = model["bits"]
        assert eight["kl_per_byte"]["value"] < two["kl_per_byte"]["value"]
    assert set(body["answers"][0]["per_byte"]) == {"8", "2"}
    assert body["text_bytes"] == 2000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_parts_and_activations_of_two_families_are_shown_and_drawn(
    cli: Callable[..., Any], llama: Path, gpt2: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    words: list[Any] = ["eval", "--sensitivity", llama, gpt2, "--bits", "2", "--layers", 2]
    words += ["--text-bytes", 2000, "--ctx", 128, "--plot", "loss.png"]
    done = cli(*words, timeout_s=1000)
    assert done.code == 0, done.stderr
    assert "llama" in done.stdout.splitlines()[0] and "gpt2" in done.stdout.splitlines()[0]
    for word in ("attn_qkv", "ffn_gate", "layer 1", "kurtosis"):
        assert word in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "loss.png",
        "loss-tensors.png",
        "loss-activations.png",
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_and_a_model_trained_here_are_compared_by_the_benchmark(tmp_path: Path) -> None:
    """Two families whose distributions mean something: the script that trains the second."""
    root = Path(__file__).resolve().parents[2]
    words: list[str | Path] = [root / "benchmarks" / "llm" / "sensitivity.py", "--quick"]
    words += ["--text", root / "exporters" / "calibration.txt", "--scratch", tmp_path / "scratch"]
    words += ["--json", tmp_path / "figures.json"]
    done = subprocess.run([sys.executable, "-B", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["training"]["last_loss"] < figures["training"]["first_loss"]
    smollm2, rival = figures["report"]["models"]
    assert (smollm2["family"], rival["family"]) == ("llama", "qwen2")
    for model in (smollm2, rival):
        eight, two = model["bits"]
        assert eight["mean_kl"]["value"] < two["mean_kl"]["value"]
        assert {row["name"] for row in model["kinds"]} >= {"attn_v", "ffn_down", "token_embd"}
    assert figures["report"]["answers"][0]["sentence"] in done.stdout


def test_a_text_that_is_too_short_is_a_usage_error(plain: Path) -> None:
    with pytest.raises(UsageError, match="less than one chunk"):
        sensitivity([plain], "Too short.", bits=(8,), layers=0, n_ctx=128)


def test_options_that_mean_nothing_are_refused(cli: Callable[..., Any], plain: Path) -> None:
    for words, name in (
        (("--sensitivity", "--against", plain), "--against"),
        (("--sensitivity", "--chunks", 3), "--chunks"),
        (("--bits", "4"), "--bits"),
        (("--sensitivity", "--bits", "7"), "7 bits"),
        (("--sensitivity", "--plot", "loss.jpg"), "loss.jpg"),
        (("--sensitivity", plain), "named twice"),
    ):
        done = cli("eval", plain, *words)
        assert done.code == 2 and name in done.stderr, done.stderr
        assert done.stdout == ""
