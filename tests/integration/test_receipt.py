"""The receipt of an export: what it proves, what it catches, and that it can be measured again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from edgekit import _fs, export_again, exporter, proof
from edgekit.artifact import MANIFEST, Artifact
from edgekit.errors import GateError, OutOfSpaceError, ParityError, RecipeError, UsageError
from edgekit.exporters.to_gguf import GgufExporter
from edgekit.formats import gguf
from edgekit.receipt import PROVEN, Gates, Receipt
from edgekit.registry import PROOFS
from edgekit.source import source

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama2")


@pytest.fixture(scope="module")
def proven(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An export with a receipt; never write to it."""
    out = tmp_path_factory.mktemp("proven") / "q8"
    return exporter.export(model, out=out, type="Q8_0")


def test_an_export_is_proven_against_its_float_model(proven: Artifact) -> None:
    receipt = Receipt.from_dict(proven.receipt)
    assert receipt.status == PROVEN
    assert receipt.reference and receipt.reference.type == "F16"
    assert receipt.completion and 0 < receipt.completion.tokens <= 16
    assert receipt.tokens and receipt.tokens.judge.startswith("tokenizers ")
    assert receipt.tokens.texts > 15 and receipt.tokens.chats >= 1
    quality = receipt.quality
    assert quality and quality.chunks >= 4
    assert 0 < quality.median_kl < quality.p99_kl < quality.p999_kl <= quality.max_kl < 0.5
    assert quality.mean_kl.low < quality.mean_kl.value < quality.mean_kl.high < 0.1
    assert 0.7 < quality.top1.value < 1
    assert quality.perplexity_ratio.low < quality.perplexity_ratio.value < 1.1
    assert receipt.speed and receipt.speed.decode_tok_s > 0 and receipt.speed.rounds >= 3
    assert receipt.size and receipt.size.size_bytes == proven.model_path.stat().st_size
    proven.verify()
    names = sorted(path.name for path in proven.path.parent.rglob("*"))
    assert names == ["manifest.json", "model.gguf", "q8"]


def test_exports_with_and_without_a_receipt_are_the_same_artifact(
    proven: Artifact, model: Path, tmp_path: Path
) -> None:
    plain = exporter.export(model, out=tmp_path / "plain", type="Q8_0", receipt=False)
    assert plain.receipt == {"status": "unproven"}
    assert plain.sha256 == proven.sha256
    assert plain.manifest.files == proven.manifest.files
    again = export_again.repeat(tmp_path / "plain", out=tmp_path / "again")
    assert again.receipt == {"status": "unproven"}
    assert (again.path / MANIFEST).read_bytes() == (plain.path / MANIFEST).read_bytes()


def test_a_format_without_a_proof_is_unproven_and_says_why(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PROOFS, "_rows", {})
    artifact = exporter.export(model, out=tmp_path / "out", type="Q8_0")
    assert artifact.receipt == {
        "status": "unproven",
        "reason": "edgekit has no proof for the format gguf",
    }


@pytest.mark.slow
def test_the_float_model_of_an_f16_file_is_the_file_itself(
    tiny_gguf: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    f16 = exporter.export(model, out=tmp_path / "f16", type="F16", receipt=False)
    artifact = exporter.export(f16.model_path, out=tmp_path / "q8", type="Q8_0")
    receipt = Receipt.from_dict(artifact.receipt)
    assert receipt.reference and receipt.reference.origin == "the source"
    assert receipt.tokens and receipt.tokens.judge == "the source file in the engine"


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_familys_text_is_judged_by_its_own_library(
    name: str, tiny_model: Callable[[str], Path], tiny_gguf: Callable[[str], Path]
) -> None:
    path = tiny_gguf(name)
    claim = exporter.Claim(source(tiny_model(name)), path, (), path, 0)
    tokens, warnings = proof.check_text(claim, exporter.no_progress)
    assert tokens.judge.startswith("tokenizers ") and tokens.texts == len(proof.TEXTS)
    # Qwen's tokenizer composes letters before it splits, and llama.cpp cannot.
    assert [("NFC" in warning) for warning in warnings] == [True] * name.startswith("qwen")


def test_a_tokenizer_that_still_cuts_and_pads_is_judged_all_the_same(
    tiny_model: Callable[[str], Path], tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama2"), tmp_path / "model")
    body = json.loads((folder / "tokenizer.json").read_text())
    body["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(body))
    path = tiny_gguf("llama2")
    tokens, _ = proof.check_text(
        exporter.Claim(source(folder), path, (), path, 0), exporter.no_progress
    )
    assert tokens.texts == len(proof.TEXTS)


def test_sentencepiece_judges_where_there_is_no_tokenizer_json(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("sentencepiece")
    folder = shutil.copytree(tiny_model("llama2"), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    artifact = exporter.export(folder, out=tmp_path / "out", type="F16", receipt=False)
    claim = exporter.Claim(source(folder), artifact.model_path, (), artifact.model_path, 0)
    tokens, _ = proof.check_text(claim, exporter.no_progress)
    assert tokens.judge.startswith("sentencepiece ")


def test_the_room_for_the_float_model_is_checked_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = exporter.plan(model, options=exporter.ExportOptions(type="Q8_0"))
    float_model = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert plan.reference_bytes >= float_model // 2
    room = plan.size_bytes + plan.reference_bytes
    monkeypatch.setattr(_fs, "free_bytes", lambda path: room - 1)
    with pytest.raises(OutOfSpaceError):
        exporter.export(model, out=tmp_path / "out", type="Q8_0")
    assert list(tmp_path.iterdir()) == []


# Broken products


def _patched(path: Path, change: Callable[[np.memmap[Any, Any], gguf.GgufHeader], None]) -> None:
    data = np.memmap(path, dtype=np.uint8, mode="r+")
    change(data, gguf.read(path))
    data.flush()


def _swap_blocks(data: np.memmap[Any, Any], header: gguf.GgufHeader) -> None:
    """The blocks of a row trade places, as a wrong stride would have it."""
    for tensor in header.tensors:
        if tensor.type == "Q8_0" and tensor.name.startswith("blk."):
            blocks = data[tensor.offset : tensor.offset + tensor.size_bytes].reshape(-1, 2, 34)
            blocks[:] = blocks[:, ::-1].copy()


def _not_a_number(data: np.memmap[Any, Any], header: gguf.GgufHeader) -> None:
    scale = header.tensor("output.weight").offset
    data[scale : scale + 2].view(np.float16)[:] = np.nan


def _replace(old: str, new: str) -> Callable[[np.memmap[Any, Any], gguf.GgufHeader], None]:
    def change(data: np.memmap[Any, Any], header: gguf.GgufHeader) -> None:
        head = data[: header.data_offset].tobytes()
        before, after = old.encode(), new.encode()
        assert len(before) == len(after) and before in head
        data[: header.data_offset] = np.frombuffer(head.replace(before, after), np.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_swap_blocks, "does not predict what its source predicts: mean KL"),
        (_not_a_number, "logits that are no numbers"),
        (_replace("▁family", "▁familz"), "into other tokens than its source"),
        (_replace("{{ m.content }}", "{{ m.role    }}"), "chat template renders"),
    ],
    ids=["shuffled weights", "not a number", "another token", "another chat template"],
)
def test_a_broken_product_is_caught_and_not_kept(
    change: Callable[[Any, gguf.GgufHeader], None],
    words: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = GgufExporter.run

    def broken(self: GgufExporter, *arguments: Any) -> exporter.Product:
        product = run(self, *arguments)
        _patched(arguments[3] / "model.gguf", change)
        return product

    monkeypatch.setattr(GgufExporter, "run", broken)
    with pytest.raises(ParityError, match=words):
        exporter.export(model, out=tmp_path / "out", type="Q8_0")
    assert list(tmp_path.iterdir()) == []


# Gates


def test_a_failed_gate_keeps_nothing_and_leaves_the_older_artifact(
    proven: Artifact, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(proven.path, tmp_path / "out")
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    gates = Gates(max_kld=1e-5, max_size_bytes=1000, min_top1=0.1)
    with pytest.raises(
        GateError, match=r"^2 of 3 gates failed, nothing was kept: mean KL .*; size"
    ):
        exporter.export(model, out=tmp_path / "out", type="Q8_0", gates=gates)
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before
    Artifact.open(tmp_path / "out").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_size_is_a_gate_without_a_receipt_too(model: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"size .* above --max-size 1 MB"):
        exporter.export(
            model,
            out=tmp_path / "out",
            type="Q8_0",
            receipt=False,
            gates=Gates(max_size_bytes=1_000_000),
        )
    with pytest.raises(UsageError, match="nothing is measured"):
        exporter.export(model, out=tmp_path / "out", receipt=False, gates=Gates(max_kld=1.0))
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_the_card_and_carries_it_in_json(
    cli: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    gates = ["--max-kld", "0.5", "--min-top1", "50%", "--max-size", "100MiB"]
    ran = cli("export", model, "--type", "Q8_0", "--out", "out", *gates, "--json")
    assert ran.code == 0, ran.stderr
    receipt = json.loads(ran.stdout)["receipt"]
    assert receipt["gates"] == {"max_kld": 0.5, "min_top1": 0.5, "max_size_bytes": 100 << 20}
    shown = cli("inspect", "out").stdout
    for words in ("proven against F16", "mean KL", "same top-1", "perplexity", "speed here"):
        assert words in shown
    assert json.loads(cli("inspect", "out", "--json").stdout)["receipt"] == receipt

    for options, words in (
        (["--min-top1", "ninety"], "neither a share like 0.9 nor 90%"),
        (["--min-top1", "90"], "min_top1 must be a share of at most 1"),
        (["--max-size", "12 elephants"], "no size such as 120MB"),
        (["--max-kld", "-1"], "max_kld must be a number above 0"),
        (["--no-receipt", "--max-kld", "1"], "drop --no-receipt"),
    ):
        ran = cli("export", model, "--type", "Q8_0", "--out", "other", *options)
        assert ran.code == 2 and words in ran.stderr
    assert not (tmp_path / "other").exists()


# Measured again


@pytest.fixture
def copy(proven: Artifact, tmp_path: Path) -> Iterator[Artifact]:
    """A copy that a test may forge; whatever happens, only the forging writes to it."""
    shutil.copytree(proven.path, tmp_path / "copy")
    yield Artifact.open(tmp_path / "copy")


def _contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_true_receipt_holds_when_it_is_measured_again(
    copy: Artifact, cli: Callable[..., Any], home: Path
) -> None:
    before = _contents(copy.path)
    ran = cli("verify", "copy", "--deep", "--json")
    assert ran.code == 0, ran.stderr
    body = json.loads(ran.stdout)
    assert body["differences"] == []
    assert body["receipts"]["manifest"] == copy.receipt
    assert body["receipts"]["measured"]["quality"] == copy.receipt["quality"]
    assert _contents(copy.path) == before
    assert list((home / "cache" / "receipt").iterdir()) == []


def test_a_forged_receipt_is_found(copy: Artifact, cli: Callable[..., Any]) -> None:
    receipt = json.loads(json.dumps(copy.receipt))
    receipt["quality"]["mean_kl"] = {"value": 0.001, "low": 0.0009, "high": 0.0011}
    forged = replace(copy.manifest, receipt=receipt)
    (copy.path / MANIFEST).write_bytes(forged.to_bytes())
    assert cli("verify", "copy").code == 0
    ran = cli("verify", "copy", "--deep")
    assert ran.code == 5
    assert "does not hold: mean_kl was 0.001, is 0.01" in ran.stderr
    assert "(manifest: mean KL 0.001 [0.0009, 0.0011]" in ran.stdout


def test_another_source_is_no_ground_to_measure_on(
    copy: Artifact, tiny_model: Callable[[str], Path], cli: Callable[..., Any], model: Path
) -> None:
    with pytest.raises(RecipeError, match="is not the model that the manifest was made from"):
        export_again.reprove(copy, model=tiny_model("llama-linear"))
    ran = cli("verify", "copy", "--source", model)
    assert ran.code == 2 and "need --deep" in ran.stderr


@pytest.mark.slow
def test_the_receipt_of_smollm2_has_the_figures_of_the_table(tmp_path: Path) -> None:
    artifact = exporter.export("smollm2-135m", out=tmp_path / "q4", bits=4)
    receipt = Receipt.from_dict(artifact.receipt)
    assert receipt.reference and receipt.reference.requantized_from == "Q4_1"
    assert receipt.quality and receipt.speed and receipt.size
    assert 0.02 < receipt.quality.mean_kl.value < 0.1
    assert 0.8 < receipt.quality.top1.value < 0.95
    assert 1.0 < receipt.quality.perplexity_ratio.value < 1.1
    assert receipt.size.fallbacks == 180
