"""The recipes finetune and finetune-vit: each method at toy length, and what becomes of it."""

from __future__ import annotations

import csv
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from training_data import picture_folder, prose

import edgekit
from edgekit.errors import DataError, RecipeError, SourceError, UnsupportedModelError
from edgekit.exporters import lora
from edgekit.runtime import GenerateParams
from edgekit.training import (
    adapters,
    checkpoint,
    classify,
    finetune,
    finetune_vit,
    images,
    language,
    preferences,
    pretrained,
    texts,
    tinyllama,
)
from edgekit.training.llama import Llama
from edgekit.training.recipe import train

pytest.importorskip("peft")

WORDS = ("lamp", "boat", "tree", "house", "river", "stone", "glass", "paper")
TOY = ("steps=30", "batch=8", "lr=1e-2", "held=10", "limit=0", "threads=1", "latency=no")
TOY += ("precision=fp32",)


def test_adapters_are_put_in_without_the_libraries_warnings_of_each_other() -> None:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.ViTForImageClassification(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        adapters.put_in(model, rank=2, alpha=4.0, dora=False, heads=["classifier"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that has read edgekit's pages, with a chat template that it never saw."""
    out = tmp_path_factory.mktemp("models") / "base"
    (out.parent / "prose.txt").write_text(prose())
    pairs = [f"text={out.parent / 'prose.txt'}", "pairs=", "size=toy", "length=64", "steps=60"]
    pairs += ["batch=16", "held_tokens=1000", "n_ctx=128", "latency=no", "threads=1", "lr=1e-2"]
    train("tinyllama", [*pairs, "ngram=no"], out, resume=False, say=lambda status: None)
    return out


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = [
        {"prompt": f"What is {n} {w}?", "answer": f"It is a {w}.", "chosen": f"It is a {w}.",
         "rejected": f"A {w} is what {n} may be, who knows."}
        for n, w in itertools.product(range(20), WORDS)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def tuned(base: Path, data: Path, out: Path, *pairs: str) -> dict[str, Any]:
    given = once(f"model={base}", f"data={data}", *TOY, *pairs)
    return train("finetune", given, out, resume=False, say=lambda status: None)


def once(*pairs: str) -> list[str]:
    """The last of those with the same key."""
    return list({pair.partition("=")[0]: pair for pair in pairs}.values())


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, base: Path, questions: Path
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    rates = {"lora": 1e-2, "qlora": 1e-2, "dora": 5e-3, "full": 1e-2}
    return {
        method: (
            folder / method,
            tuned(base, questions, folder / method, f"method={method}", f"lr={rate}"),
        )
        for method, rate in rates.items()
    }


def rows(body: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["name"]: row["figures"] for row in body["results"]}


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "full"])
def test_each_method_learns_and_the_folder_has_what_it_learned(
    runs: dict[str, tuple[Path, dict[str, Any]]], questions: Path, method: str
) -> None:
    out, body = runs[method]
    found = rows(body)
    assert [row["name"] for row in body["results"]] == [method, "before"]
    assert found[method]["loss"] < found["before"]["loss"] - 0.4
    if method != "qlora":  # merged, it is what was trained
        trained = body["phases"][0]["figures"]["loss"]
        assert found[method]["loss"] == pytest.approx(trained, rel=1e-3)
    if method == "full":
        assert found[method]["trained_parameters"] == found["before"]["parameters"]
        assert not (out / "adapter").exists()
    else:
        assert found[method]["trained_parameters"] < 0.3 * found["before"]["parameters"]
    source = edgekit.source(out)
    assert (source.kind, source.family) == ("hf", "llama")
    model = Llama(tinyllama.SIZES["toy"])
    model.load_state_dict(checkpoint.read(out / "model.safetensors")[0])
    held = texts.json_lines(questions, ("prompt", "answer"))[1][:10]
    chats = pretrained.Chats(source).tokens([(line[0], line[1]) for line in held])
    with torch.no_grad():
        again = language.judge_answers(texts.Answers(chats, 128, 0))(model)
    assert again["loss"] == pytest.approx(found[method]["loss"], rel=1e-4)


def test_each_line_held_out_is_written_down_before_and_after(
    runs: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    for method, (out, body) in runs.items():
        with (out / finetune.HELD).open() as file:
            lines = [(float(row["before"]), float(row["after"])) for row in csv.DictReader(file)]
        assert len(lines) == 4  # of 160
        found = rows(body)
        for place, name in enumerate(("before", method)):
            mean = sum(line[place] for line in lines) / len(lines)
            assert mean == pytest.approx(found[name]["loss"], rel=1e-6)
        gain = next(each for each in body["remarks"] if each.startswith("loss less what it was"))
        expected = found[method]["loss"] - found["before"]["loss"]
        assert f"{expected:+.3f} [" in gain and "over the 4 lines" in gain
        if method != "full":
            weights = out / "adapter" / "adapter_model.safetensors"
            assert 0 < weights.stat().st_size - found[method]["adapter_bytes"] < 10_000


def test_four_bits_take_less_memory_than_floats(
    runs: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    taken = {name: rows(body)[name]["weights_bytes"] for name, (_, body) in runs.items()}
    # The table of embeddings stays in floats, and the toy is mostly that.
    assert taken["qlora"] < 0.75 * taken["lora"] and taken["full"] < taken["lora"]
    assert any("four bits" in remark for remark in runs["qlora"][1]["remarks"])


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_adapter_merged_by_export_is_the_folder_s_model(
    runs: dict[str, tuple[Path, dict[str, Any]]], base: Path, method: str
) -> None:
    out, _ = runs[method]
    adapter = lora.open_adapter(out / "adapter")
    adapter.check(edgekit.source(base))
    before, _ = checkpoint.read(base / "model.safetensors")
    merged, _ = checkpoint.read(out / "model.safetensors")
    assert set(before) == set(merged)
    for name in merged:
        patched = torch.from_numpy(adapter.patch(name, before[name].numpy()))
        torch.testing.assert_close(patched, merged[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"],
                           merged["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


def test_an_adapter_beside_the_model_answers_as_the_merged_one(
    runs: dict[str, tuple[Path, dict[str, Any]]], base: Path, tmp_path: Path
) -> None:
    out, _ = runs["lora"]
    merged = edgekit.export(out, "gguf", type="F32", out=tmp_path / "merged", receipt=False)
    beside = edgekit.export(
        base,
        "gguf",
        type="F32",
        adapter=out / "adapter",
        adapter_mode="keep",
        out=tmp_path / "beside",
        receipt=False,
    )
    answers = []
    for artifact in (merged, beside):
        with edgekit.load(artifact) as model:
            chat = [{"role": "user", "content": "What is 3 lamp?"}]
            answers.append(
                "".join(model.chat(chat, GenerateParams(max_tokens=16, temperature=0.0)))
            )
    assert answers[0] == answers[1] and answers[0].strip()


def test_a_dora_is_merged_here_and_refused_by_name_elsewhere(
    runs: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"DoRA|dora"):
        lora.open_adapter(runs["dora"][0] / "adapter")


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_preferences_are_learned(base: Path, questions: Path, tmp_path: Path, method: str) -> None:
    pairs = (f"method={method}", "teach=preferences", "steps=20", "lr=3e-3")
    found = rows(tuned(base, questions, tmp_path / "dpo", *pairs))
    assert found["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[method]["accuracy"] == 1.0 and found[method]["loss"] < 0.6
    assert found[method]["likelier_share"] >= found["before"]["likelier_share"]
    assert found[method]["training_tok_s"] > 0


def test_the_loss_of_preferences_is_the_paper_s() -> None:
    chosen, rejected = [([1, 2], [3, 4]), ([1], [2])], [([1, 2], [5]), ([1], [6, 7, 8])]
    data = preferences.Preferences(chosen, rejected, 16, pad=0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9))
    data.reference = torch.tensor([[-3.0, -2.0], [-1.0, -4.0]])
    total = 0.0
    # The longest pair comes first.
    for (good, bad), reference in zip(
        [(chosen[0], rejected[0]), (chosen[1], rejected[1])], data.reference, strict=True
    ):
        logs = []
        for question, answer in (good, bad):
            ids = torch.tensor([*question, *answer])
            found = model(ids[:-1]).log_softmax(-1)
            logs.append(sum(found[len(question) - 1 + n, token] for n, token in enumerate(answer)))
        margin = (logs[0] - reference[0]) - (logs[1] - reference[1])
        total += -torch.log(torch.sigmoid(0.1 * margin)).item()
    found = preferences.loss_of(0.1)(model, data.batch(torch.tensor([0, 1])))
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_what_cannot_be_taught_is_refused(base: Path, questions: Path, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    silent.mkdir()
    for path in base.iterdir():
        (silent / path.name).write_bytes(path.read_bytes())
    body = json.loads((base / "tokenizer_config.json").read_text())
    body.pop("chat_template")
    (silent / "tokenizer_config.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="no chat template"):
        tuned(silent, questions, tmp_path / "a")
    with pytest.raises(DataError, match="line 1 has no texts prompt and answer"):
        (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n' * 80)
        tuned(base, tmp_path / "bad.jsonl", tmp_path / "b")
    with pytest.raises(SourceError):
        tuned(tmp_path / "nothing", questions, tmp_path / "c")
    with pytest.raises(RecipeError, match="rank"):
        tuned(base, questions, tmp_path / "d", "rank=0")


# Vision transformers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("data") / "pictures", each=40)


def taught(pictures: Path, out: Path, *pairs: str) -> dict[str, Any]:
    given = [f"data={pictures}", f"start_data={pictures}", "start_steps=60", "width=32", "layers=2"]
    given += ["patch=8", "examples=48", "seeds=2", "rates=1e-3,1e-2", "steps=25", "batch=16"]
    given += ["shift=0", "threads=1", "latency=no", *pairs]
    return train("finetune-vit", once(*given), out, resume=False, say=lambda status: None)


@pytest.mark.slow
def test_five_methods_stand_side_by_side_by_default(pictures: Path, tmp_path: Path) -> None:
    body = taught(pictures, tmp_path / "vit")
    found = rows(body)
    assert list(found) == ["lora", "adapter", "linear", "full", "scratch"]
    for figures in found.values():
        assert figures["rate"] in (1e-3, 1e-2)
        assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]
    trained = [
        found[n]["trained_parameters"] for n in ("linear", "adapter", "lora", "full", "scratch")
    ]
    assert trained[0] == 2 * 32 + 2 and trained == sorted(trained)
    assert found["full"]["parameters"] == found["full"]["trained_parameters"]
    assert max(figures["accuracy"] for figures in found.values()) > 0.9
    assert sum("image by image" in remark for remark in body["remarks"]) == 4
    source = edgekit.source(tmp_path / "vit")
    assert (source.kind, source.family) == ("hf", "vit")
    again = taught(
        pictures, tmp_path / "again", f"model={tmp_path / 'vit'}", "methods=lora", "seeds=1"
    )
    assert len(again["results"]) == 1
    config = json.loads((tmp_path / "again" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (8, str(tmp_path / "vit"))


def test_low_rank_in_three_ways(pictures: Path, tmp_path: Path) -> None:
    body = taught(pictures, tmp_path / "vit", "methods=qlora,lora,dora", "seeds=1", "rates=1e-2")
    found = rows(body)
    # Twelve matrices, of 24,576 weights: 4.13 bits for 32, and a table of 2 kB each to unpack them.
    saved = found["lora"]["weights_bytes"] - found["qlora"]["weights_bytes"]
    assert saved == pytest.approx(24_576 * (4 - 4.127 / 8) - 12 * 2048, rel=0.02)
    assert found["qlora"]["parameters"] == found["lora"]["parameters"]
    assert found["qlora"]["trained_parameters"] == found["lora"]["trained_parameters"]
    # DoRA learns a length for each output too: six matrices a block, of 32 or 128 outputs.
    lengths = found["dora"]["trained_parameters"] - found["lora"]["trained_parameters"]
    assert lengths == 2 * (5 * 32 + 128)
    assert min(figures["accuracy"] for figures in found.values()) > 0.7
    (told,) = [remark for remark in body["remarks"] if "merged into the floats" in remark]
    assert f"{100 * found['qlora']['accuracy']:.2f}% merged" in told
    # The folder has what was judged: the first model's floats with the adapters in them.
    vit = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
    data = images.load(str(pictures))
    right = classify.right(finetune_vit.Logits(vit), data, data.test)
    assert sum(right) / len(right) == pytest.approx(found["qlora"]["accuracy"])


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "adapter"])
def test_the_folder_classifies_after_export(pictures: Path, tmp_path: Path, method: str) -> None:
    body = taught(pictures, tmp_path / "vit", f"methods={method}", "seeds=1", "rates=1e-2")
    artifact = edgekit.export(tmp_path / "vit", "onnx", type="F32", out=tmp_path / "onnx")
    with edgekit.load(artifact) as model:
        held = [
            path
            for label in ("lying", "upright")
            for path in sorted((pictures / label).glob("*.png"))[4::5]
        ]
        right = [model.classify(path)[0][0] == path.parent.name for path in held]
    assert sum(right) / len(right) == pytest.approx(rows(body)[method]["accuracy"], abs=0.07)


def test_adapters_change_nothing_at_first() -> None:
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(3, 8)
    assert torch.equal(finetune_vit.Bottleneck(layer, 8, 4)(x), layer(x))


def test_methods_that_are_none_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="methods are some of"):
        taught(pictures, tmp_path / "x", "methods=lora,magic")
