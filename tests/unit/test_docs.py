"""The docs name only what exists: files, verbs and options."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from edgekit.cli import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pages
def test_every_file_that_is_named_exists(page: Path) -> None:
    folders = "edgekit|exporters|runtimes|devices|tests|scripts|docs|benchmarks"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
        assert "NAME" in name or (ROOT / name).exists(), name


@pages
def test_every_command_line_is_one_that_edgekit_takes(page: Path) -> None:
    # In a code block, or in backticks; a `#` starts a remark.
    for line in re.findall(
        r"(?:^|`)edgekit ([a-z]+[^`#\n]*)", page.read_text(), flags=re.MULTILINE
    ):
        verb, *words = line.split()
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None, line
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known | {"--help"}, line
