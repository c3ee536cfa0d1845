"""`edgekit train`: parse, call, render."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from shlex import quote
from typing import Any

import click
from click.shell_completion import CompletionItem

from edgekit.cli import show
from edgekit.errors import UsageError
from edgekit.registry import RECIPES, load
from edgekit.training.catalogue import CATALOGUE, Entry

_TICK_S, _LINE_S = 0.2, 10.0
_WIDEST = 110  # letters of a line
_CLASSES = 12  # that are shown; training.md has all


def _recipe_words(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return [
        CompletionItem(name, help=CATALOGUE[name].about if name in CATALOGUE else None)
        for name in RECIPES
        if name.startswith(incomplete)
    ]


def _pair_words(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """``KEY=`` of the recipe's settings, and behind it what the setting may be."""
    # While an option still lacks its value, click has not sorted the words yet.
    recipe = next((word for word in context.args if word in list(RECIPES)), None)
    if recipe is None:
        return []
    settings = RECIPES.load(recipe).settings
    rows, choices = (
        load(f"edgekit.training.settings:{name}", extra="train") for name in ("rows", "choices")
    )
    key, equals, value = incomplete.partition("=")
    if equals:
        words = [word for word in choices(settings, key) if word.startswith(value)]
        return [CompletionItem(f"{key}={word}") for word in words]
    return [
        CompletionItem(f"{name}=", help=about)
        for name, _, about in rows(settings)
        if name.startswith(key)
    ]


@click.command()
@click.argument("recipe", required=False, shell_complete=_recipe_words)
@click.option("--list", "listing", is_flag=True, help="The recipes, or the settings of RECIPE.")
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=_pair_words,
    help="Change a setting of the recipe; may be repeated.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the run (default build/RECIPE).",
)
@click.option("--resume", is_flag=True, help="Go on where an earlier run was stopped, or start.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    recipe: str | None,
    listing: bool,
    pairs: tuple[str, ...],
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Train a small model by RECIPE, into a folder that `edgekit export` takes.

    \b
    edgekit train --list
    edgekit train minimal --list
    edgekit train minimal --set data=photos/ --set steps=2000 --out build/photos
    edgekit train minimal --out build/minimal --resume
    """
    if listing:
        if out or resume:
            raise UsageError("--list trains nothing: --out and --resume mean nothing with it")
        return _settings(recipe, pairs, as_json) if recipe else _recipes(as_json)
    if recipe is None:
        raise UsageError("which recipe?", hint="edgekit train --list")
    RECIPES.check(recipe)
    train: Callable[..., dict[str, Any]] = load("edgekit.training.recipe:train", extra="train")
    say = _Line(quiet=as_json)
    out = out or Path("build") / recipe
    try:
        body = train(recipe, pairs, out.absolute(), resume=resume, say=say)
    except KeyboardInterrupt:
        say.close()
        click.echo(f"--resume goes on with what is in {out}.training", err=True)
        raise
    finally:
        say.close()
    if os.environ.get("RANK", "0") != "0":
        return  # one process of several tells it
    if as_json:
        return show.as_json({"path": str(out), **body})
    _render(out, body)


def _recipes(as_json: bool) -> None:
    entries = {name: CATALOGUE.get(name, Entry("(from another package)")) for name in RECIPES}
    if as_json:
        return show.as_json({name: vars(entry) for name, entry in entries.items()})
    wide = max(map(len, entries)) + 2
    form = textwrap.TextWrapper(
        width=max(wide + 40, min(shutil.get_terminal_size().columns, _WIDEST)),
        initial_indent=" " * wide,
        subsequent_indent=" " * wide,
        break_long_words=False,
        break_on_hyphens=False,
    )
    for name, entry in entries.items():
        lines = [entry.about]
        if entry.measured:
            lines += [f"measured: {entry.measured}", f"printed by: {entry.command}"]
        text = "\n".join(map(form.fill, lines))
        click.echo(click.style(name, bold=True) + text[len(name) :])


def _settings(recipe: str, pairs: tuple[str, ...], as_json: bool) -> None:
    found = RECIPES.load(recipe)
    rows, with_pairs = (
        load(f"edgekit.training.settings:{name}", extra="train") for name in ("rows", "with_pairs")
    )
    settings = with_pairs(found.settings, pairs)
    if as_json:
        return show.as_json(settings.to_dict())
    show.table(rows(settings), head=("setting", "value", "what it is"))


def _render(out: Path, body: dict[str, Any]) -> None:
    columns, class_columns, worst, parse = (
        load(f"edgekit.training.report:{name}", extra="train")
        for name in ("columns", "class_columns", "worst", "parse")
    )
    report = parse(body)
    head, rows = columns(report)
    show.table(rows, head=head)
    if report.classes:
        few = len(report.classes) <= _CLASSES
        shown = report.classes if few else worst(report.classes, _CLASSES)
        head, rows = class_columns(shown)
        click.echo(f"\n{'classes' if few else f'the {len(shown)} classes that are found least'}")
        show.table(rows, head=head)
    click.echo()
    for remark in report.remarks:
        click.echo(f"- {remark}")
    entry = CATALOGUE.get(report.recipe)
    into = f" --format {entry.into}" if entry else ""
    click.echo(f"\nthe run is in {out}; next: edgekit export {quote(str(out))}{into}")


class _Line:
    """Where the training stands: one line that is redrawn on a terminal, else one now and then."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._redraws = sys.stderr.isatty()
        self._shown_s = 0.0
        self._open = False

    def __call__(self, status: Any) -> None:
        if status.memory:
            if not self._quiet:
                click.echo(f"{status.phase}: a step needs {status.memory}", err=True)
            return
        if status.note:
            if not self._quiet:
                self.close()
                click.echo(f"{status.phase}: {status.note}", err=True)
            return
        now_s = time.monotonic()
        wait_s = _TICK_S if self._redraws else _LINE_S
        last = status.step == status.steps
        if self._quiet or (now_s - self._shown_s < wait_s and not last):
            return
        self._shown_s = now_s
        left_s = round(status.left_s)
        loss = f"  loss {status.loss:.4f}  lr {status.lr:.2g}" if isfinite(status.loss) else ""
        text = (
            f"{status.phase} {status.step}/{status.steps}{loss}"
            f"  {status.per_s:,.0f} {status.unit}/s  {left_s // 60}:{left_s % 60:02} left"
        )
        if self._redraws:
            click.echo(f"\r\033[K{text}", nl=last, err=True)
            self._open = not last
        else:
            click.echo(text, err=True)

    def close(self) -> None:
        if self._open:
            click.echo("", err=True)
            self._open = False
