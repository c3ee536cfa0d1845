"""The haystack is as long as it should be, the needle as deep, and the judge strict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgekit import intervals, needle
from edgekit.errors import DoesNotFitError, UsageError
from edgekit.needle import LengthScore, NeedleReport, NeedleScores

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
