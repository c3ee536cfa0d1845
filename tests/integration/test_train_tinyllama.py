"""The recipe tinyllama: each part against its definition, and a toy run that ends in a chat."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_data import prose

import edgekit
from edgekit.errors import DataError
from edgekit.runtime import GenerateParams
from edgekit.training import checkpoint, texts, tinyllama
from edgekit.training.kneser_ney import KneserNey
from edgekit.training.llama import Llama
from edgekit.training.recipe import train

WORDS = ("lamp", "boat", "tree", "house", "river", "stone", "glass", "paper")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edgekit's own pages as a text, and questions about words."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "prose.txt").write_text(prose())
    lines = [
        json.dumps({"prompt": f"What is {n} {word}?", "answer": f"It is a {word}, number {n}."})
        for n, word in itertools.product(range(20), WORDS)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "toy"
    pairs = [f"text={data / 'prose.txt'}", f"pairs={data / 'pairs.jsonl'}", "size=toy", "length=64"]
    pairs += ["steps=60", "batch=16", "tune_steps=40", "held_tokens=2000", "eval_every=30"]
    pairs += ["n_ctx=128", "latency=no", "precision=fp32", "threads=1", "lr=1e-2", "tune_lr=5e-3"]
    train("tinyllama", pairs, out, resume=False, say=lambda status: None)
    return out


def test_a_run_ends_in_a_hugging_face_folder_and_a_report_against_n_grams(run: Path) -> None:
    source = edgekit.source(run)
    assert (source.kind, source.family) == ("hf", "llama")
    body = json.loads((run / "training.json").read_text())
    llama, ngram, fair = (row["figures"] for row in body["results"])
    names = [row["name"] for row in body["results"]]
    assert names[1:] == ["5-gram Kneser-Ney", "5-gram Kneser-Ney, as many tokens"]
    assert fair["trained_tokens"] <= llama["trained_tokens"] < ngram["trained_tokens"]
    assert fair["bits_per_byte"] > ngram["bits_per_byte"]
    # A byte of English has some 2 bits for an n-gram of a small text, and 8 for who knows nothing.
    assert 1 < ngram["bits_per_byte"] < 5 and 1 < llama["bits_per_byte"] < 5
    assert 0 < llama["mfu"] < 1.5
    before, after = (each["figures"]["loss"] for each in body["phases"])
    assert after < before
    assert [phase["name"] for phase in body["phases"]] == ["pretrain", "tune"]


def test_the_network_is_transformers_llama(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(run).eval()
    ours = Llama(tinyllama.SIZES["toy"])
    ours.load_state_dict(checkpoint.read(run / "model.safetensors")[0])
    ids = torch.arange(2 * 50).reshape(2, 50) % 512
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(run)
    chat = [{"role": "user", "content": "What is 3 lamp?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhat is 3 lamp?<|im_end|>\n<|im_start|>assistant\n"


def test_the_exported_model_chats(run: Path, tmp_path: Path) -> None:
    artifact = edgekit.export(run, "gguf", type="F16", out=tmp_path / "gguf", receipt=False)
    with edgekit.load(artifact) as model:
        chat = [{"role": "user", "content": "What is 3 lamp?"}]
        answer = "".join(model.chat(chat, GenerateParams(max_tokens=24, temperature=0.0)))
    assert answer.strip() and "<|im_" not in answer


def test_the_model_in_onnx_chats_and_says_what_torch_says(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    artifact = edgekit.export(run, "onnx", type="F32", out=tmp_path / "onnx", receipt=False)
    asked = "What is 3 lamp?"
    chat = [{"role": "user", "content": asked}]
    with edgekit.load(artifact) as model:
        answer = "".join(model.chat(chat, GenerateParams(max_tokens=24, temperature=0.0)))
    tokenizer = AutoTokenizer.from_pretrained(run)
    theirs = AutoModelForCausalLM.from_pretrained(run).eval()
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        told = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert answer == tokenizer.decode(told, skip_special_tokens=True)
    assert answer.strip() and "<|im_" not in answer


def test_experts_are_a_mixtral_beside_their_dense_twin(tmp_path: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "sparse"
    pairs = [f"text={data / 'prose.txt'}", "pairs=", "size=toy", "length=64", "steps=30", "batch=8"]
    pairs += ["held_tokens=2000", "n_ctx=128", "latency=no", "threads=1", "lr=1e-2", "ngram=no"]
    body = train(
        "tinyllama",
        [*pairs, "experts=4", "optimizer=adamw"],
        out,
        resume=False,
        say=lambda status: None,
    )
    sparse, twin = (row["figures"] for row in body["results"])
    assert [row["name"] for row in body["results"]] == ["sparse", "dense twin"]
    # As much work a token, but for the router; four halves of the feed-forward part for one whole.
    assert sparse["active_parameters"] - twin["active_parameters"] == 2 * 64 * 4
    assert sparse["parameters"] - twin["parameters"] == 2 * (3 * 64 * 128 + 64 * 4)
    # Weights, gradients and AdamW's two values at least.
    assert sparse["training_bytes"] >= 16 * sparse["parameters"]
    assert any(
        each.startswith("bits per byte of sparse less those of dense") for each in body["remarks"]
    )
    assert 1 < sparse["bits_per_byte"] < 5 and sparse["bits_per_byte"] != twin["bits_per_byte"]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "MixtralForCausalLM"
    state, _ = checkpoint.read(out / "model.safetensors")
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    stacked: dict[str, list[torch.Tensor]] = {}
    for name in sorted(state):
        parent, _, rest = name.partition(".experts.")
        if rest:
            stacked.setdefault(f"{parent}.{names[rest.split('.')[1]]}", []).append(state.pop(name))
    shape = replace(tinyllama.SIZES["toy"], inner=64, experts=4)
    ours = Llama(shape).eval()
    ours.load_state_dict(state | {name: torch.stack(each) for name, each in stacked.items()})
    ids = torch.arange(2 * 50).reshape(2, 50) % 512
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-3, atol=1e-4)


# The parts


def test_kneser_ney_shares_one_among_all_tokens() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 12, 3000) * random.integers(0, 2, 3000)
    model = KneserNey(tokens, 12)
    for history in ([], [3], [3, 0], [0, 0, 5, 1], [11, 11, 11, 11], [0, 0, 0, 0, 0]):
        # The first token of a text has no figure: one more stands before.
        rows = [[0, *history, token] for token in range(12)]
        sums = sum(math.exp(model.log_probabilities(np.array(row))[-1]) for row in rows)
        assert sums == pytest.approx(1.0, abs=1e-9)


def test_kneser_ney_counts_what_comes_before_and_not_how_often() -> None:
    """The word of the paper's example: frequent, but only ever behind one other word."""
    san, francisco, glasses, new = 40, 41, 42, 43
    random = np.random.default_rng(0)
    pieces: list[list[int]] = []
    for _ in range(2000):
        word = int(random.integers(0, 40))
        pieces += [[word], [word, glasses], [san, francisco], [san, francisco]]
    tokens = np.array([token for at in random.permutation(len(pieces)) for token in pieces[at]])
    counts = np.bincount(tokens)
    assert counts[francisco] > 1.5 * counts[glasses]
    model = KneserNey(tokens, 64, order=2)
    behind_new = [model.log_probabilities(np.array([new, t]))[0] for t in (glasses, francisco)]
    assert behind_new[0] > behind_new[1]
    assert model.log_probabilities(np.array([san, francisco]))[0] > math.log(0.9)


def test_the_order_is_what_fits_into_a_number() -> None:
    tokens = np.arange(1000) % 300
    assert KneserNey(tokens, 4096).order == 5 and KneserNey(tokens, 8192).order == 4


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Any:
    return texts.byte_pairs(texts.read(str(data / "prose.txt")).train, 512)


def test_tokens_give_the_text_back(tokenizer: Any, tmp_path: Path) -> None:
    blocks = ["Grüße, 世界!\n\t ends", "\x00\x7f odd"]
    texts.pack(tokenizer, blocks, tmp_path / "tokens")
    tokens = texts.tokens_of(tokenizer, tmp_path / "tokens")
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    assert text == "".join(block + texts.END for block in blocks)


def test_every_token_but_the_first_is_predicted_once() -> None:
    data = texts.Packed(np.arange(33, dtype=np.uint16), 8)
    ids, targets = data.batch(torch.arange(len(data)))
    assert targets.flatten().tolist() == list(range(1, 33)) and torch.equal(ids + 1, targets)


def test_the_loss_is_on_answers_and_their_ends_alone(tokenizer: Any) -> None:
    chats = texts.chats(tokenizer, [texts.Pair("Who?", "Nobody.")])
    answers = texts.Answers(chats, 64, tokenizer.token_to_id(texts.END))
    ids, targets = answers.batch(torch.tensor([0]))
    learned = targets[targets != -100].tolist()
    assert tokenizer.decode(learned, skip_special_tokens=False) == f"Nobody.{texts.TURN_END}"
    begin = int((targets[0] != -100).nonzero()[0])
    asked = tokenizer.decode(ids[0, : begin + 1].tolist(), skip_special_tokens=False)
    assert asked.endswith("assistant\n") and int(texts.terms((ids, targets))) == len(learned)


def test_a_batch_is_as_wide_as_its_longest_chat() -> None:
    chats = [([1] * asked, [2] * told) for asked, told in ((2, 1), (3, 9), (1, 4), (40, 40))]
    answers = texts.Answers(texts.longest_first(chats), 20, pad=0)
    widths = [answers.batch(torch.tensor([n]))[0].shape[1] for n in range(4)]
    assert widths == [20, 11, 4, 2]  # one token less: the last one is only a target
    ids, targets = answers.batch(torch.tensor([3, 1]))
    assert ids.shape == targets.shape == (2, 11)
    assert ids[0].tolist() == [1, 1] + [2] + [0] * 8 and (targets[1] == 2).sum() == 9


def test_tokens_that_are_spread_lie_all_over_the_text() -> None:
    tokens = np.arange(1000)
    assert np.array_equal(texts.spread(tokens, 2000, 100), tokens)
    found = texts.spread(tokens, 250, 50)
    assert len(found) == 250 and found[0] == 0 and found[-1] == 999
    assert (np.diff(found) == 1).sum() == 245  # five pieces, each whole


@pytest.mark.parametrize(
    ("count", "length"), [(100, 16), (64, 16), (16, 16), (17, 16), (5, 16), (40, 7)]
)
def test_windows_make_each_token_a_target_once_with_half_a_piece_before_it(
    count: int, length: int
) -> None:
    tokens = np.arange(count + 1)
    ids, targets = texts.windows(tokens, length)
    rows, places = (targets != -100).nonzero(as_tuple=True)
    assert targets[rows, places].tolist() == list(range(1, count + 1))
    assert torch.equal(ids[rows, places] + 1, targets[rows, places])
    before = places + 1
    assert bool(((before > length - length // 2) | (rows == 0)).all())


def test_judging_weighs_each_held_out_token_once() -> None:
    held = np.arange(100) % 7

    class Uniform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(7))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.weight.expand(*ids.shape, 7)

    found = tinyllama.judge_of(held, held_bytes=50, length=16)(Uniform())
    assert found["loss"] == pytest.approx(math.log(7), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(99 * math.log2(7) / 50, rel=1e-6)


def test_two_models_are_held_against_each_other_window_by_window() -> None:
    held, nats = np.arange(101) % 7, torch.arange(1.0, 101.0).double()
    windows = tinyllama.by_window(nats, held, length=16)
    # The first window has 16 targets, each of the others 8, the last one what is left.
    assert windows[0] == nats[:16].sum() and windows[1] == nats[16:24].sum()
    assert windows.sum() == nats.sum()
    said = tinyllama.ahead("a", windows + math.log(2), "b", windows, held_bytes=100)
    assert "a less those of b: +0.120 [+0.120, +0.120]" in said and "12 pieces" in said


@pytest.mark.parametrize(
    ("raw", "words"),
    [(b"\xff\xfe" * 50_000, "not UTF-8"), (b"short\n", "1 blocks"), (b"", "0 blocks")],
)
def test_texts_that_are_none_are_refused(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "bad.txt").write_bytes(raw)
    with pytest.raises(DataError, match=words):
        texts.read(str(tmp_path / "bad.txt"))


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"prompt": "x"}', "line 2 has no texts"), ("no", "line 2 is not JSON")],
)
def test_a_bad_pair_is_named_by_its_line(tmp_path: Path, line: str, words: str) -> None:
    good = '{"prompt": "x", "answer": "y"}'
    (tmp_path / "pairs.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=words):
        texts.pairs(tmp_path / "pairs.jsonl")


def test_more_entries_than_a_text_has_are_refused() -> None:
    with pytest.raises(DataError, match="gives only"):
        texts.byte_pairs(["a b c"] * 10, 4096)
