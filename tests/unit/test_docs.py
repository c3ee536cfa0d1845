"""The docs name only what exists, and all that a user must know: files, verbs, variables, codes."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from edgekit import errors
from edgekit.cli import cli
from edgekit.training.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def _anchors(page: Path) -> set[str]:
    """The names that a page's headings get on the web: small letters, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^):]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        assert not anchor or anchor in _anchors(other), target


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
        if isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.get_command(click.Context(command), words.pop(0))
        assert command is not None, line
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known | {"--help"}, line


def test_every_variable_that_is_read_is_explained() -> None:
    sources = [*(ROOT / "scripts").iterdir()]
    for folder in ("edgekit", "exporters", "runtimes", "devices"):
        sources += (ROOT / folder).rglob("*.py")
    read = {
        name
        for source in sources
        for name in re.findall(r"\b(?:EDGEKIT|HF)_[A-Z_]+\b", source.read_text())
    }
    text = "".join(page.read_text() for page in PAGES)
    assert "EDGEKIT_HOME" in read
    assert {name for name in read if f"`{name}" not in text} == set()


def test_every_exit_code_is_explained() -> None:
    table = (ROOT / "docs/quickstart.md").read_text().partition("## Exit codes")[2]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, flags=re.MULTILINE)
    explained = {int(code) for row in rows for code in row.split(",")}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    raised = {kind.exit_code for kind in classes if issubclass(kind, errors.EdgekitError)}
    assert explained == {0, 130, 143} | raised


_FIGURE = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?%?(?![\w%]|[.,]\d)")


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_the_list_of_recipes_claims_stands_beside_its_command_in_the_docs(name: str) -> None:
    entry = CATALOGUE[name]
    assert entry.measured and entry.command
    page = (ROOT / "docs" / "train.md").read_text()
    sections = [" ".join(each.split()) for each in re.split(r"^## ", page, flags=re.MULTILINE)]
    printed = [
        re.compile(rf"Printed by (?:the commands of )?`{re.escape(one)}` on \d{{4}}-")
        for one in entry.command.split("; ")
    ]
    (section,) = (each for each in sections if all(words.search(each) for words in printed))
    assert _FIGURE.findall(entry.measured)
    assert set(_FIGURE.findall(entry.measured)) <= set(_FIGURE.findall(section))
