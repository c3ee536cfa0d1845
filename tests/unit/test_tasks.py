"""Task files are read strictly, turned into prompts as lm-eval does, and scored honestly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from edgekit import tasks
from edgekit.errors import PromptTooLongError, UsageError
from edgekit.formats import task_file
from edgekit.formats.task_file import Item


def write(path: Path, *lines: Any) -> Path:
    """A task file; text stays as it is, everything else becomes JSON."""
    rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(rows) + "\n")
    return path


def question(**changed: Any) -> dict[str, Any]:
    return {"question": "Two and two?", "choices": ["three", "four"], "answer": 1} | changed


# Reading


@pytest.mark.parametrize(
    "line",
    [
        {"query": "Q", "choices": ["a", "b", "c"], "gold": 2},
        {"question": "Q", "choices": ["a", "b", "c"], "answer": "C", "subject": "letters"},
        {"ctx": "Q", "endings": ["a", "b", "c"], "label": "2", "ind": 7},
    ],
    ids=["lm-eval", "MMLU", "HellaSwag"],
)
def test_the_common_forms_of_multiple_choice_mean_the_same(tmp_path: Path, line: Any) -> None:
    found = task_file.read(write(tmp_path / "t.jsonl", line))
    assert found.kind == "choice"
    assert found.items == (Item(1, "Q", ("a", "b", "c"), 2),)


def test_a_cloze_has_its_target_as_its_only_choice(tmp_path: Path) -> None:
    found = task_file.read(
        write(
            tmp_path / "t.jsonl",
            {"prefix": "The sky is", "target": "blue"},
            "",
            {"context": "Grass is", "continuation": " green"},
        )
    )
    assert found.kind == "cloze"
    assert found.items == (
        Item(1, "The sky is", ("blue",), 0),
        Item(3, "Grass is", (" green",), 0),
    )


def test_every_label_of_the_file_is_a_choice_of_every_line(tmp_path: Path) -> None:
    lines = [{"text": text, "label": label} for text, label in (("x", "up"), ("y", "down"))]
    found = task_file.read(write(tmp_path / "t.jsonl", *lines))
    assert found.kind == "label"
    assert [(item.choices, item.gold) for item in found.items] == [
        (("down", "up"), 1),
        (("down", "up"), 0),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ('{"question": "Q", "choices": ["a", "b"], "answer": NaN}', "NaN"),
        ('{"text": "a", "text": "b", "label": "c"}', "twice"),
        ("[1]", "no JSON object"),
        ({"text": "a"}, "no choices, no target"),
        ({"choices": ["a", "b"], "answer": 0}, "lacks a key: query or question or ctx"),
        (question(query="Q"), "has both query and question"),
        (question(question=3), "must be text"),
        (question(choices=["a"]), "2 to 256"),
        (question(choices=["a", " "]), "choice 1 is blank"),
        (question(choices=["a", 2]), "choice 1 must be text"),
        (question(answer=2), "from 0 to 1"),
        (question(answer=-1), "from 0 to 1"),
        (question(answer=True), "from 0 to 1"),
        (question(answer="C"), "from 0 to 1"),
        (question(answer="four"), "from 0 to 1"),
        ({"text": "a", "label": "b"}, "is a label line among choice lines"),
        ('{"text": "\\ud800", "label": "b"}', "not Unicode"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, reason: str) -> None:
    path = write(tmp_path / "t.jsonl", question(), "", line)
    with pytest.raises(UsageError, match=r"t\.jsonl, line 3 ") as caught:
        task_file.read(path)
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"text": "\xff", "label": "b"}', "line 1 is not UTF-8"),
        (b"\n \n", "holds no line"),
        (b'{"text": "a", "label": "b"}', "has 1 labels"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(data)
    with pytest.raises(UsageError, match=reason):
        task_file.read(tmp_path / "t.jsonl")


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "t.jsonl").open("wb") as file:
        file.truncate(task_file.MAX_BYTES + 1)
    with pytest.raises(UsageError, match="more than the"):
        task_file.read(tmp_path / "t.jsonl")


# From lines to tokens


class Letters:
    """A tokenizer with a token for every character, but one for a blank and its letter."""

    bos: int | None = 0
    n_ctx = 24

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        tokens: list[int] = []
        for before, letter in zip("." + text, text, strict=False):
            if before == " " and letter != " ":
                tokens[-1] = 1000 + ord(letter)
            else:
                tokens.append(ord(letter))
        return tokens


def test_blanks_at_the_end_of_a_text_belong_to_its_continuation() -> None:
    for text in ("ab", "ab "):
        (request,) = tasks.prompts([], [Item(1, text, ("c",), 0)], "{text}")
        assert request == {"line": 1, "context": "ab", "continuations": [" c"]}
        # Were the blank a part of the context, "b" would be followed by a token for it alone.
        found = tasks.encode(Letters(), request)  # type: ignore[arg-type]
        assert found == ([0, ord("a"), ord("b")], [[1000 + ord("c")]])


def test_a_choice_that_brings_its_own_white_space_gets_no_more() -> None:
    (request,) = tasks.prompts([], [Item(1, "ab", (" c", "\nd", "e"), 0)], "{text}")
    assert request["continuations"] == [" c", "\nd", " e"]


def test_a_delimiter_stands_as_it_is_given() -> None:
    for delimiter, continuation in (("", "c"), (" ", " c"), ("\n", "\nc")):
        (request,) = tasks.prompts([], [Item(1, "f(", ("c",), 0)], "{text}", delimiter)
        assert (request["context"], request["continuations"]) == ("f(", [continuation])


def test_shots_are_solved_lines_before_each_question() -> None:
    examples = [Item(1, "1+1", ("2", "3"), 0), Item(2, "2+2", ("5", "4"), 1)]
    (request,) = tasks.prompts(examples, [Item(3, "3+3", ("6", "7"), 0)], "Q: {text}\nA:")
    assert request["context"] == "Q: 1+1\nA: 2\n\nQ: 2+2\nA: 4\n\nQ: 3+3\nA:"
    assert request["continuations"] == [" 6", " 7"]


def test_a_template_puts_nothing_into_braces_of_the_text() -> None:
    (request,) = tasks.prompts([], [Item(1, "{text} {0}", ("c",), 0)], "<{text}>")
    assert request["context"] == "<{text} {0}>"


def test_a_question_that_does_not_fit_is_an_error_with_its_line() -> None:
    request = {"line": 7, "context": "a" * 20, "continuations": [" b", " long"]}
    with pytest.raises(PromptTooLongError, match=r"line 7 has 25 tokens .* n_ctx 24"):
        tasks.encode(Letters(), request)  # type: ignore[arg-type]


def test_a_question_without_text_is_refused() -> None:
    with pytest.raises(UsageError, match="line 4: nothing stands before the answer"):
        tasks.prompts([], [Item(4, " ", ("c",), 0)], "{text}")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"template": "no place"}, "no place for"),
        ({"shots": -1}, "between 0 and"),
        ({"shots": 1}, "leave none"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_opened(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path / "t.jsonl", question())
    with pytest.raises(UsageError, match=reason):
        tasks.evaluate(tmp_path / "no-model", path, **options)


# From scores to figures


def test_accuracy_takes_the_sum_and_accuracy_per_byte_the_mean() -> None:
    items = [
        Item(1, "Q", ("no", "certainly not"), 1),  # -4 / 2 bytes < -6.5 / 13 bytes
        Item(2, "Q", ("yes", "ja"), 0),
        Item(3, "Q", ("é", "no"), 0),  # two bytes each: equally likely, the first is taken
    ]
    found = tasks.judge(
        "choice",
        items,
        [
            [(-4.0, True), (-6.5, False)],
            [(-1.0, True), (-9.0, False)],
            [(-2.0, True), (-2.0, True)],
        ],
    )
    assert found.answers.picks == (0, 0, 0)
    assert found.answers.picks_norm == (1, 0, 0)
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert found.accuracy_norm is not None and found.accuracy_norm.value == 1.0
    assert found.perplexity is None


def test_a_cloze_is_right_when_its_target_is_greedy() -> None:
    items = [Item(1, "a", ("b",), 0), Item(2, "c", ("d",), 0)]
    found = tasks.judge("cloze", items, [[(math.log(0.9), True)], [(math.log(0.1), False)]])
    assert found.accuracy.value == 0.5
    assert found.accuracy_norm is None
    assert found.perplexity is not None
    assert found.perplexity.value == pytest.approx(1 / math.sqrt(0.09))


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (1, 5, 14 / 64),
        (5, 1, 14 / 64),
        (2, 10, 158 / 4096),
        (0, 9, 2 / 512),
    ],
)
def test_mcnemar_is_a_fair_coin(gained: int, lost: int, p_value: float) -> None:
    assert tasks.mcnemar(gained, lost) == pytest.approx(p_value)


def test_mcnemar_stands_thousands_of_flips() -> None:
    assert tasks.mcnemar(5000, 5000) == 1.0
    assert 0 < tasks.mcnemar(4900, 5100) < 0.05


def test_flips_count_both_ways_where_accuracies_are_equal() -> None:
    here, reference = [True, True, False, False], [True, False, True, False]
    found = tasks.flips(here, reference)
    assert (found.gained, found.lost, found.p_value) == (1, 1, 1.0)
    assert found.share.value == 0.5
    assert found.difference.value == 0.0
    assert found.difference.low < 0 < found.difference.high


def test_few_lines_without_a_flip_are_no_certainty() -> None:
    small, large = (tasks.flips([True] * lines, [True] * lines).difference for lines in (6, 600))
    assert small.value == large.value == 0.0
    assert small.high == -small.low > 0.2
    assert large.high == -large.low < 0.01


@pytest.mark.parametrize(
    ("gained", "lost", "total", "low", "high"),
    # By hand: (lead +- 1.95996 sqrt(discordant - lead^2 / lines)) / lines
    [(2, 10, 98, -0.1489, -0.0111), (30, 30, 998, -0.0153, 0.0153), (5, 0, 5, 0.2779, 1.0)],
)
def test_the_difference_has_a_paired_interval(
    gained: int, lost: int, total: int, low: float, high: float
) -> None:
    same = total - gained - lost
    here = [True] * gained + [False] * lost + [True] * same
    reference = [False] * gained + [True] * lost + [True] * same
    found = tasks.flips(here, reference).difference
    assert found.value == pytest.approx((gained - lost) / total)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
