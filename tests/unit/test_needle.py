"""The haystack is as long as it should be, the needle as deep, and the judge strict."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from edgekit import intervals, needle
from edgekit.errors import DoesNotFitError, UsageError
from edgekit.needle import LengthScore, NeedleReport, NeedleScores
from edgekit.runtime import Generation

SENTENCES = [f"Sentence {i} is here. " for i in range(10)]
COSTS = [5] * 10


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (25, 5), (50, 10), (75, 15), (100, 20)])
def test_the_needle_stands_at_its_depth(depth: int, place: int) -> None:
    text = needle.haystack(SENTENCES, COSTS, 100, depth, "NEEDLE.")
    before, _, after = text.partition("NEEDLE.")
    assert before.count("Sentence") == place
    assert after.count("Sentence") == 20 - place, "a haystack that is too short begins again"


def test_the_haystack_never_takes_more_than_its_room() -> None:
    text = needle.haystack(SENTENCES, COSTS, 34, 50, "NEEDLE.")
    assert text.count("Sentence") == 6


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The code is 123456.", True),
        ("123,456", True),
        ("123 456", True),
        ("1234567", False),
        ("9123456", False),
        ("12345", False),
        ("654321", False),
        ("", False),
    ],
)
def test_an_answer_is_right_when_it_holds_the_code(answer: str, right: bool) -> None:
    assert needle.holds(answer, "123456") is right


def test_the_builtin_haystack_is_prose() -> None:
    sentences = needle.sentences(None)
    text = "".join(sentences)
    assert len(text) > 50_000
    assert text.isascii() and "$" not in text and "def " not in text
    assert max(map(len, sentences)) < 2_000


def test_an_own_haystack_must_be_text(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text('One is here. "Two?" asked three!\nA line without a stop\n\n')
    assert needle.sentences(own) == (
        "One is here. ",
        '"Two?" ',
        "asked three!\n\n",
        "A line without a stop\n\n",
    )
    own.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        needle.sentences(own)
    own.write_text("\n \n")
    with pytest.raises(UsageError, match="blank"):
        needle.sentences(own)


@pytest.mark.parametrize(
    "options", [{"lengths": [512, 1 << 20]}, {"depths": [101]}, {"depths": []}, {"trials": 0}]
)
def test_an_impossible_grid_is_refused(smollm2_gguf: Path, options: dict[str, list[int]]) -> None:
    with pytest.raises(UsageError):
        needle.evaluate(smollm2_gguf, **options)  # type: ignore[arg-type]


def test_a_cache_beyond_the_free_memory_is_refused_before_the_load(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 512000 kB\nMemAvailable: 250000 kB\n")
    monkeypatch.setenv("EDGEKIT_SYSROOT", str(tmp_path))
    with pytest.raises(DoesNotFitError, match=r"8192 tokens needs .* GB are free"):
        needle.evaluate(smollm2_gguf, lengths=[8192])


class HalfReader:
    """A session whose model only reads the first half of a prompt, a token a word."""

    has_chat_template = False

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.last = Generation()

    def tokenize(self, text: str) -> list[int]:
        return [1] * len(text.split())

    def complete(self, prompt: str, *, max_tokens: int) -> Generation:
        self.prompts.append(prompt)
        code = re.search("[0-9]{6}", prompt[: len(prompt) // 2])
        self.last = Generation(code[0] if code else "?", prompt_tokens=len(prompt.split()))
        return self.last

    def reset(self) -> None:
        pass

    def __enter__(self) -> HalfReader:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def ask(
    monkeypatch: pytest.MonkeyPatch, model: Path, seed: int = 0
) -> tuple[NeedleReport, list[str]]:
    session = HalfReader()
    monkeypatch.setattr(needle, "load", lambda *_, **__: session)
    found = needle.evaluate(
        model, lengths=[2048, 1024], depths=[100, 0, 25, 75], trials=2, seed=seed
    )
    return found, session.prompts


def test_hits_stand_under_their_length_and_depth(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = ask(monkeypatch, smollm2_gguf)
    assert found.depths == (0, 25, 75, 100)
    assert [(row.length, row.hits) for row in found.here.lengths] == [
        (1024, (2, 2, 0, 0)),
        (2048, (2, 2, 0, 0)),
    ]
    assert all(row.recall.value == 0.5 for row in found.here.lengths)
    # A word counts as a token here, so the length is met but for the last sentence's part.
    for row in found.here.lengths:
        assert row.length - 150 < row.tokens <= row.length - 32


def test_a_seed_hides_the_same_codes_again(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = ask(monkeypatch, smollm2_gguf)
    assert ask(monkeypatch, smollm2_gguf)[1] == first
    assert ask(monkeypatch, smollm2_gguf, seed=1)[1] != first
    codes = [re.findall("[0-9]{6}", prompt) for prompt in first[1:]]
    assert len({code for found in codes for code in found}) == len(codes) == 16


def test_each_prompt_begins_like_the_one_before_it_up_to_its_needle(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an engine has read of the text before is in its cache, and costs nothing."""
    _, prompts = ask(monkeypatch, smollm2_gguf)
    for before, prompt in itertools.pairwise(prompts[1:]):
        own = prompt.index("The access code of the archive")
        assert before.startswith(prompt[:own]) or len(prompt) > len(before) + 2000


def report() -> NeedleReport:
    rows = tuple(
        LengthScore(length, length - 20, hits, intervals.proportion(sum(hits), 6), 12.0, length)
        for length, hits in ((512, (3, 2)), (1024, (0, 1)))
    )
    scores = NeedleScores("m.gguf", True, rows, intervals.proportion(6, 12), (True, False) * 6)
    return NeedleReport((0, 100), 3, 0, "builtin", scores, None, None)


def test_the_report_is_json(tmp_path: Path) -> None:
    body = json.loads(json.dumps(report().to_dict(), allow_nan=False))
    assert [row["hits"] for row in body["lengths"]] == [[3, 2], [0, 1]]
    assert body["recall"]["value"] == 0.5


def test_the_grid_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    needle.draw(report(), tmp_path / "grid.svg")
    drawn = (tmp_path / "grid.svg").read_text()
    assert drawn.count("<image") >= 1


def test_a_length_without_room_for_a_sentence_is_refused(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needle, "load", lambda *_, **__: HalfReader())
    with pytest.raises(UsageError, match="no room for the haystack's first sentence"):
        needle.evaluate(smollm2_gguf, lengths=[80])
