"""The recipe distill-lm: what is cut, what is learned from, and a toy run that ends in a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_data import prose, toy_llama

import edgekit
from edgekit.errors import RecipeError
from edgekit.training import distill_lm, pretrained, texts
from edgekit.training.recipe import train


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prose.txt"
    path.write_text(prose())
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    return toy_llama(tmp_path_factory.mktemp("models") / "teacher", text)


def opened(folder: Path) -> Any:
    return pretrained.model(edgekit.source(folder), "AutoModelForCausalLM", eager=True).eval()


def test_layers_stay_evenly_with_the_first_and_the_last() -> None:
    assert distill_lm.kept_layers(30, 0.3) == [0, 4, 7, 11, 14, 18, 22, 25, 29]
    assert distill_lm.kept_layers(4, 1.0) == [0, 1, 2, 3]
    assert distill_lm.kept_layers(4, 0.01) == [0]


def test_a_student_of_everything_is_the_teacher(teacher: Path) -> None:
    whole = opened(teacher)
    same = distill_lm.cut(whole, [0, 1], 1.0).eval()
    ids = torch.arange(80).reshape(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(same(ids).logits, whole(ids).logits)


def test_channels_that_count_for_nothing_go_first(teacher: Path) -> None:
    whole = opened(teacher)
    dead = torch.arange(0, 128, 2)
    with torch.no_grad():
        for layer in whole.model.layers:
            layer.mlp.down_proj.weight[:, dead] = 0
    half = distill_lm.cut(whole, [0, 1], 0.5).eval()
    assert half.config.intermediate_size == 64
    ids = torch.arange(80).reshape(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(half(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_text_decides_what_stays_and_the_rest_stands_in(teacher: Path, text: Path) -> None:
    """Pairs of channels that are each other's double: a half says it all, if it is told so."""
    whole = opened(teacher)
    with torch.no_grad():
        for layer in whole.model.layers:
            for name in ("gate_proj", "up_proj"):
                weight = layer.mlp.get_submodule(name).weight
                weight[64:] = weight[:64]
    tokens = torch.randint(0, 200, (4000,), generator=torch.Generator().manual_seed(0))
    data = texts.Packed(tokens.numpy().astype("uint16"), 64)
    found = {}
    for by in ("text", "size"):
        settings = distill_lm.DistillLmSettings(layers=1.0, inner=0.5, cut_by=by)
        student, kept = distill_lm.begun(whole, data, settings)
        assert kept == [0, 1] and student.config.intermediate_size == 64
        with torch.no_grad():
            ids = data.batch(torch.arange(4))[0]
            found[by] = (student.eval()(ids).logits - whole(ids).logits).square().mean().item()
    assert found["text"] < 1e-5 and 100 * found["text"] < found["size"]


def test_hidden_states_are_those_that_the_next_layer_knows(teacher: Path) -> None:
    """And what leaves the student's last layer shall be what leaves the teacher's."""
    whole = opened(teacher)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        states = whole(ids, output_hidden_states=True).hidden_states
    settings = distill_lm.DistillLmSettings(hard=0.0, soft=0.0, attention=0.0, hidden=1.0)
    same = distill_lm.loss_of(whole, [0, 1], settings)(whole, (ids, ids)).item()
    assert same == pytest.approx(0, abs=1e-6)
    first = distill_lm.cut(whole, [0], 1.0)  # what leaves it is normed, and shall be the last
    with torch.no_grad():
        mine = first(ids, output_hidden_states=True).hidden_states[1]
        distance = ((mine - states[2]).square().mean(-1) / states[2].square().mean(-1)).mean()
    found = distill_lm.loss_of(whole, [0], settings)(first, (ids, ids)).item()
    assert found == pytest.approx(40 * distance.item(), rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_but_the_text(teacher: Path) -> None:
    whole = opened(teacher)
    settings = distill_lm.DistillLmSettings(hard=0.0, attention=0.1)
    loss = distill_lm.loss_of(whole, [0, 1], settings)
    ids = torch.arange(80).reshape(2, 40)
    same = distill_lm.cut(whole, [0, 1], 1.0)
    assert loss(same, (ids, ids)).item() == pytest.approx(0, abs=1e-3)
    other = distill_lm.cut(whole, [1], 1.0)
    assert distill_lm.loss_of(whole, [1], settings)(other, (ids, ids)).item() > 1


def test_the_teacher_s_distribution_at_a_temperature() -> None:
    torch.manual_seed(0)
    mine, theirs = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    p, q = (theirs / 2).softmax(-1), (mine / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum()
    assert distill_lm.soft_loss(mine, theirs, 2.0).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_a_run_ends_in_a_smaller_folder_and_a_table(
    teacher: Path, text: Path, tmp_path: Path
) -> None:
    pairs = [f"model={teacher}", f"text={text}", "layers=0.5", "inner=0.5", "length=64"]
    pairs += ["steps=40", "batch=16", "lr=3e-3", "held_tokens=1000", "latency=no", "threads=1"]
    out = tmp_path / "student"
    body = train("distill-lm", [*pairs, "precision=fp32"], out, resume=False, say=lambda s: None)
    found = {row["name"]: row["figures"] for row in body["results"]}
    assert list(found) == ["taught", "untaught", "cut", "teacher"]
    assert found["taught"]["parameters"] < 0.7 * found["teacher"]["parameters"]
    losses = {name: figures["loss"] for name, figures in found.items()}
    assert max(losses["teacher"], losses["taught"], losses["untaught"]) < losses["cut"]
    assert any("the teacher gives back" in remark for remark in body["remarks"])
    for figures in found.values():
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
    again = opened(out)
    assert sum(each.numel() for each in again.parameters()) == found["taught"]["parameters"]


@pytest.mark.slow
def test_teacher_and_both_students_are_exported_and_timed(
    teacher: Path, text: Path, tmp_path: Path
) -> None:
    pairs = [f"model={teacher}", f"text={text}", "layers=0.5", "inner=0.5", "length=64"]
    pairs += ["steps=2", "batch=4", "held_tokens=1000", "threads=1"]
    body = train("distill-lm", pairs, tmp_path / "student", resume=False, say=lambda s: None)
    found = {row["name"]: row["figures"] for row in body["results"]}
    sizes = {name: each["gguf_bytes"] for name, each in found.items() if name != "cut"}
    assert sizes["taught"] == sizes["untaught"]
    # Half a layer's width and half of the layers: two bytes for each weight that is gone.
    gone = found["teacher"]["parameters"] - found["taught"]["parameters"]
    assert sizes["teacher"] - sizes["taught"] == pytest.approx(2 * gone, rel=0.05)
    assert all(found[name]["decode_tok_s"] > 0 for name in sizes)
    assert "gguf_bytes" not in found["cut"]


def test_what_is_no_llama_is_told_how_it_can_be_cut() -> None:
    other = SimpleNamespace(config=SimpleNamespace(model_type="qwen2"))
    with pytest.raises(RecipeError, match="qwen2") as error:
        distill_lm.check(other)
    assert error.value.hint == "--set cut_by=size"


def test_shares_beyond_one_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="shares above 0"):
        train("distill-lm", ["layers=1.5"], tmp_path / "x", resume=False, say=lambda s: None)
