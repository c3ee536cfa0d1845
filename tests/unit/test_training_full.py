"""The configurations on paper: each line of the docs is one that its recipe takes, unrun."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch

from edgekit.registry import RECIPES
from edgekit.training import language, memory, tinyllama
from edgekit.training.llama import Llama
from edgekit.training.recipe import Recipe
from edgekit.training.settings import Settings, with_pairs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "train.md"
_PAPER = 1_100_048_384  # TinyLlama's weights, as its published files have them
META = torch.device("meta")


@cache
def lines() -> dict[str, list[str]]:
    """``key=value`` pairs of each recipe, as the page has them."""
    section = PAGE.read_text().split("## Full configurations\n")[1].split("\n## ")[0]
    found = {}
    for line in section.replace("\\\n", " ").splitlines():
        if line.startswith("edgekit train "):
            _, _, recipe, *words = shlex.split(line)
            assert re.fullmatch(r"(--set --out )?(--set )*--out", " ".join(words[::2])), line
            assert recipe not in found
            found[recipe] = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    return found


def full(recipe: str) -> tuple[Settings, Settings]:
    """The settings by default, and those of the page."""
    loaded: Recipe = RECIPES.load(recipe)
    return loaded.settings, with_pairs(loaded.settings, lines()[recipe])


def test_each_recipe_has_a_line() -> None:
    assert sorted(lines()) == sorted(RECIPES)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_line_is_one_that_its_recipe_takes_and_that_asks_for_more(recipe: str) -> None:
    small, large = full(recipe)
    more = 10
    if recipe == "finetune-vit":  # as few images: that is its question
        more = 1
    assert large.steps * large.batch > more * small.steps * small.batch
    assert large.batch % large.accumulate == 0
    assert large.precision == "bf16" or recipe == "minimal"


@pytest.fixture(scope="module")
def largest() -> Llama:
    """On torch's meta device: shapes, and no numbers."""
    with META:
        return Llama(tinyllama.SIZES["1.1b"])


def test_the_largest_llama_is_the_paper_s_but_for_a_second_table(largest: Llama) -> None:
    shape = largest.shape
    count = sum(each.numel() for each in largest.parameters())
    assert count + shape.vocab * shape.width == _PAPER
    assert f"{count:,} weights" in PAGE.read_text() and f"{_PAPER:,}" in PAGE.read_text()


def test_what_its_step_needs_is_told_before_a_weight_is_there(largest: Llama) -> None:
    _, settings = full("tinyllama")
    length = settings.length  # type: ignore[attr-defined]

    def forward(count: int) -> torch.Tensor:
        ids = torch.zeros(count, length, dtype=torch.int64, device=META)
        return language.loss(largest, (ids, ids))

    pieces = settings.batch // (8 * settings.accumulate)
    needed = memory.measure(largest, forward, samples=pieces, averages=False, device=META)
    size = 4 * sum(each.numel() for each in largest.parameters())
    assert (needed.gradients, needed.optimizer) == (size, 2 * size)
    assert needed.per_sample > 22 * 4 * length * 2048
    told = f"{needed.per_sample / 1e9:.1f} GB a piece"
    assert told in PAGE.read_text(), str(needed)
