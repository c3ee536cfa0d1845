"""Answers are as likely as transformers finds them, and a real model answers what it knows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran

from edgekit import tasks
from edgekit.errors import PromptTooLongError
from edgekit.formats.task_file import Item
from edgekit.runtimes import llama_scorer

# Five choices each, so that guessing gets 20%; the right one is never the first.
FACTS = [
    ("The capital of France is", ("Madrid", "Paris", "Berlin", "Rome", "Oslo"), 1),
    ("The capital of Japan is", ("Seoul", "Beijing", "Tokyo", "Hanoi", "Manila"), 2),
    ("The capital of Italy is", ("Vienna", "Athens", "Lisbon", "Rome", "Bern"), 3),
    ("The capital of Germany is", ("Warsaw", "Prague", "Paris", "London", "Berlin"), 4),
    ("Monday, Tuesday,", ("Friday", "Sunday", "Wednesday", "January", "Monday"), 2),
    ("One, two, three,", ("seven", "four", "ten", "one", "zero"), 1),
    ("The sun rises in the", ("north", "south", "west", "east", "night"), 3),
    ("Water is made of hydrogen and", ("iron", "oxygen", "gold", "helium", "salt"), 1),
    ("A year has twelve", ("days", "weeks", "hours", "minutes", "months"), 4),
    ("The opposite of up is", ("left", "over", "down", "high", "top"), 2),
    ("The planet we live on is called", ("Mars", "Earth", "Venus", "Saturn", "Pluto"), 1),
    ("Romeo and Juliet was written by", ("Goethe", "Dante", "Shakespeare", "Homer", "Plato"), 2),
]
CLOZES = [
    ("The Eiffel Tower stands in the city of", "Paris"),
    ("Monday, Tuesday, Wednesday, Thursday,", "Friday"),
    ("The opposite of hot is", "cold"),
    ("The opposite of hot is", "wardrobe"),
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    rows = [{"query": text, "choices": choices, "gold": gold} for text, choices, gold in FACTS]
    return write(tmp_path / "facts.jsonl", rows)


# Texts whose answers begin with a blank, with none, behind a line break and inside a word.
ITEMS = [
    Item(1, "Two and two are ", ("four", "five hundred and six", " Käse"), 0),
    Item(2, "The sky\n", ("is blue and", "was"), 0),
    Item(3, "x = f(", ("y)", "12, 13)\n"), 1),
]


@pytest.mark.parametrize("name", ["llama2", "qwen2", "gemma3"])
def test_log_likelihoods_equal_transformers(
    name: str, tiny_model: Callable[[str], Path], tiny_gguf: Callable[[str], Path]
) -> None:
    """With and without examples; tokens, BOS and probabilities are all transformers' own."""
    import torch
    import transformers

    folder = tiny_model(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    asked = tasks.prompts(ITEMS[:1], ITEMS[1:], "{text}") + tasks.prompts([], ITEMS, "Q: {text}")
    with llama_scorer.opened(tiny_gguf(name), n_ctx=256, threads=1) as scorer:
        for prompt in asked:
            found = scorer.log_likelihoods(*tasks.encode(scorer, prompt))
            expected = []
            for text in prompt["continuations"]:
                ids = tokenizer(prompt["context"] + text)["input_ids"]
                start = len(tokenizer(prompt["context"])["input_ids"])
                with torch.no_grad():
                    logits = net(torch.tensor([ids])).logits[0, start - 1 : -1].double()
                targets = torch.tensor(ids[start:])
                logs = logits.log_softmax(-1)[range(len(targets)), targets]
                expected.append((float(logs.sum()), bool((logits.argmax(-1) == targets).all())))
                # The cache of keys and values is float16 here: so much for each token.
                assert found[len(expected) - 1][0] == pytest.approx(
                    expected[-1][0], abs=1e-2 * len(targets)
                )
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            assert found.index(max(found)) == expected.index(max(expected))


def test_a_shared_context_changes_no_score(smollm2_gguf: Path) -> None:
    """What the cache holds from the question before must not reach the next one."""
    with llama_scorer.opened(smollm2_gguf, n_ctx=256, threads=1) as scorer:
        first, second = (scorer.tokenize(text) for text in ("The capital of France is", "One, two"))
        answers = [scorer.tokenize(text) for text in (" Paris", " Berlin and Rome", ", three")]
        alone = [
            [scorer.log_likelihoods(context, [answer])[0] for answer in answers]
            for context in (first, second)
        ]
        for _ in range(2):
            scorer.logits(second + first, 0)
            for context, expected in ((first, alone[0]), (second, alone[1])):
                found = scorer.log_likelihoods(context, answers)
                assert [log for log, _ in found] == pytest.approx(
                    [log for log, _ in expected], abs=0.05
                )


def test_a_real_model_knows_simple_facts(smollm2_gguf: Path, facts: Path) -> None:
    found = tasks.evaluate(smollm2_gguf, facts, threads=1)
    assert found.chance == pytest.approx(0.2)
    assert found.here.accuracy.low > 2 * found.chance
    assert found.flips is None


def test_a_real_model_completes_simple_texts(smollm2_gguf: Path, tmp_path: Path) -> None:
    rows = [{"context": text, "continuation": target} for text, target in CLOZES]
    found = tasks.evaluate(smollm2_gguf, write(tmp_path / "c.jsonl", rows), threads=1)
    assert found.here.answers.picks == (0, 0, 0, -1)
    assert found.here.answers.scores[2] > found.here.answers.scores[3]


def test_a_model_against_itself_has_no_flips(smollm2_gguf: Path, facts: Path) -> None:
    found = tasks.evaluate(smollm2_gguf, facts, against=smollm2_gguf, shots=2, threads=1)
    assert found.reference is not None and found.flips is not None
    assert len(found.scored) == len(FACTS) - 2
    assert (found.flips.gained, found.flips.lost, found.flips.p_value) == (0, 0, 1.0)
    assert found.reference.answers == found.here.answers


def test_a_line_that_does_not_fit_stops_the_run_before_it_begins(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    rows = [{"context": "word " * count, "continuation": "word"} for count in (10, 100)]
    reports: list[Any] = []
    with pytest.raises(PromptTooLongError, match=r"line 2 has 10\d tokens"):
        tasks.evaluate(
            smollm2_gguf,
            write(tmp_path / "long.jsonl", rows),
            n_ctx=64,
            threads=1,
            progress=lambda *report: reports.append(report),
        )
    assert reports == [("score", 0, 2)]


# The command


def test_labelled_texts_get_recalls_and_a_confusion(
    smollm2_gguf: Path, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    rows = [
        {"text": "I love this film, it is wonderful.", "label": "good"},
        {"text": "What a great and beautiful day!", "label": "good"},
        {"text": "This is the worst food I ever had.", "label": "bad"},
        {"text": "A terrible, boring waste of time.", "label": "bad"},
        {"text": "Everything about it was perfect.", "label": "good"},
        {"text": "I hated every minute of it.", "label": "bad"},
    ]
    path = write(tmp_path / "mood.jsonl", rows)
    options = ["--tasks", path, "--threads", "1", "--template", r"Review: {text}\nIt was"]
    done = cli("eval", smollm2_gguf, *options, "--json")
    assert done.code == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["labels"] == ["bad", "good"]
    picks = [answer["pick"] for answer in body["answers"]]
    golds = [answer["gold"] for answer in body["answers"]]
    assert golds == [1, 1, 0, 0, 1, 0]
    assert body["confusion"] == [
        [sum(p == pick and g == gold for p, g in zip(picks, golds, strict=True)) for pick in (0, 1)]
        for gold in (0, 1)
    ]
    assert [recall["value"] for recall in body["recalls"]] == [
        body["confusion"][label][label] / 3 for label in (0, 1)
    ]
    done = cli("eval", smollm2_gguf, *options, "--against", smollm2_gguf)
    assert done.code == 0, done.stderr
    assert "as good" in done.stdout
    assert "0 gained, 0 lost, p = 1" in done.stdout


def test_a_bad_line_ends_with_its_number_and_no_output(
    smollm2_gguf: Path, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    path = write(tmp_path / "bad.jsonl", [{"context": "a", "continuation": "b"}, {"context": "a"}])
    done = cli("eval", smollm2_gguf, "--tasks", path)
    assert (done.code, done.stdout) == (2, "")
    assert "bad.jsonl, line 2" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_ends_a_run_and_its_child(smollm2_gguf: Path, tmp_path: Path) -> None:
    rows = [{"context": f"{i} " + "word " * 200, "continuation": "word"} for i in range(2000)]
    path = write(tmp_path / "long.jsonl", rows)
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekit", "eval", smollm2_gguf, "--tasks", path, "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == "score ...\n"
        time.sleep(3)  # the child has loaded the model, and is at work
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.send_signal(signal.SIGINT)
        started_s = time.monotonic()
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - started_s < 5
    finally:
        process.kill()  # its child dies with it
    assert (process.returncode, out, err.strip()) == (130, "", "stopped")
    assert not any(Path(f"/proc/{child}").exists() for child in children)
