"""Settings: every key known, every value typed, and a hint for what is nearly right."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from edgekit.errors import RecipeError
from edgekit.training.settings import Settings, difference, from_dict, rows, setting, with_pairs


@dataclass(frozen=True)
class Own(Settings):
    widths: tuple[int, ...] = setting((1, 2), "widths")


def test_pairs_become_typed_values() -> None:
    pairs = ["steps=12", "lr=3e-4", "latency=no", "schedule=wsd", "widths=8,16,32"]
    found = with_pairs(Own(), pairs)
    assert (found.steps, found.lr, found.latency, found.schedule, found.widths) == (
        *(12, 3e-4, False),
        *("wsd", (8, 16, 32)),
    )


def test_settings_survive_json() -> None:
    settings = with_pairs(Own(), ["widths=3", "ema=0.5"])
    body = settings.to_dict() | {"widths": [3]}
    assert from_dict(Own, body, "settings") == settings


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("step=3", "no setting is called 'step'"),
        ("steps", "not key=value"),
        ("steps=many", "steps must be a whole number"),
        ("steps=1.5", "steps must be a whole number"),
        ("lr=inf", "lr must be a number"),
        ("latency=maybe", "latency must be true or false"),
        ("schedule=linear", "schedule cannot be 'linear'"),
        ("steps=0", "steps must be more than 0"),
        ("ema=1", "ema is 0 or a decay below 1"),
        ("patience=3", "patience needs eval_every"),
        ("widths=1,x", "widths must be a whole number"),
    ],
)
def test_what_is_wrong_is_said(pair: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        with_pairs(Own(), [pair])
    assert words in caught.value.message


def test_a_near_name_is_the_hint() -> None:
    with pytest.raises(RecipeError) as caught:
        with_pairs(Own(), ["acumulate=2"])
    assert caught.value.hint == "did you mean 'accumulate'?"


def test_a_key_is_set_once() -> None:
    with pytest.raises(RecipeError, match="twice"):
        with_pairs(Own(), ["steps=1", "steps=2"])


def test_a_recipes_own_settings_come_first_and_all_say_what_they_are() -> None:
    found = rows(Own())
    assert found[0] == ("widths", "1,2", "widths") and all(about for _, _, about in found)


def test_the_difference_of_two_runs_is_named() -> None:
    assert difference(Own().to_dict(), Own(steps=5).to_dict()) == "steps 1000 -> 5"
