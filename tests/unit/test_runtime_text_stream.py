"""Text comes out in whole characters, and never with a part of a stop string."""

from __future__ import annotations

import random

import pytest

from edgekit.runtimes.text_stream import TextStream


def _feed(stream: TextStream, raw: bytes, size: int) -> list[str]:
    pieces = []
    for at in range(0, len(raw), size):
        pieces.append(stream.feed(raw[at : at + size]))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_half_character_is_released(size: int) -> None:
    text = "aé世🙂 – ok"
    pieces = _feed(TextStream(), text.encode(), size)
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stop_string_is_found_across_pieces_and_never_shown(size: int) -> None:
    stream = TextStream(("</s>", "END"))
    assert "".join(_feed(stream, b"one <s> two </s> three", size)) == "one <s> two "
    assert stream.stopped


def test_what_only_began_like_a_stop_string_is_released_at_the_end() -> None:
    stream = TextStream(("STOP",))
    assert stream.feed(b"go STO") == "go "
    assert stream.finish() == "STO"
    assert not stream.stopped


def test_the_earliest_of_several_stop_strings_wins() -> None:
    stream = TextStream(("later", "now"))
    assert stream.feed(b"it is now or later") == "it is "


def test_half_a_character_at_the_end_becomes_a_replacement() -> None:
    stream = TextStream()
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.finish() == "�"


def test_random_cuts_give_the_text_before_the_first_stop_string() -> None:
    dice = random.Random(7)
    for _ in range(300):
        text = "".join(dice.choices("abé世", k=30))
        stop = "".join(dice.choices("abé世", k=dice.randint(1, 4)))
        stream, shown, raw = TextStream((stop,)), "", text.encode()
        while raw and not stream.stopped:
            size = dice.randint(1, 5)
            shown += stream.feed(raw[:size])
            assert stop not in shown
            raw = raw[size:]
        shown += stream.finish()
        assert shown == text.split(stop)[0]
