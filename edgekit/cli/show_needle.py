"""`edgekit eval --needle`: its options, and how its grid is shown. Never measures anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgekit import needle, plot
from edgekit.cli import show
from edgekit.cli.lists import numbers
from edgekit.cli.show_tasks import flips_line, percent
from edgekit.needle import NeedleReport, NeedleScores

# The options that only --needle knows.
NAMES = ("lengths", "depths", "trials", "seed", "raw")


_OPTIONS = (
    click.option(
        "--needle",
        "needle_",
        is_flag=True,
        help="Instead of a text: find a sentence in long texts, by length and by depth.",
    ),
    click.option(
        "--lengths",
        callback=numbers,
        metavar="N,N,...",
        help="With --needle: context lengths in tokens (default 512,1024,... up to 4096).",
    ),
    click.option(
        "--depths",
        callback=numbers,
        metavar="N,N,...",
        help="With --needle: percent of the text before the sentence (default 0,25,50,75,100).",
    ),
    click.option(
        "--trials",
        type=click.IntRange(min=1),
        help="With --needle: questions per length and depth (default 3).",
    ),
    click.option("--seed", type=click.IntRange(min=0), help="With --needle: of the codes."),
    click.option(
        "--raw", is_flag=True, default=None, help="With --needle: no chat template, plain text."
    ),
)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of this file."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run(
    model: Path,
    *,
    against: Path | None,
    text: Path | None,
    plot_file: Path | None,
    raw: bool | None,
    threads: int | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Ask and show; ``fields`` as in ``needle.evaluate``, None for its default."""
    if plot_file is not None:
        plot.check_form(plot_file)
    given = {name: value for name, value in fields.items() if value is not None}
    with show.progress(quiet=as_json) as progress:
        found = needle.evaluate(
            model,
            against=against,
            text=text,
            plain=bool(raw),
            threads=threads,
            progress=progress,
            **given,
        )
    if as_json:
        show.as_json(found.to_dict())
    else:
        _show(found)
    # The figures are out already, should there be no matplotlib or no room for the file.
    if plot_file is not None:
        needle.draw(found, plot_file)


def _show(found: NeedleReport) -> None:
    for scores in (found.here, found.reference):
        if scores is not None:
            how = "its chat template" if scores.chat else "plain text"
            click.echo(f"{scores.model}: codes found of {found.trials}, asked through {how}")
            _show_grid(scores, found)
            click.echo(f"all: {percent(scores.recall)}\n")
    if found.flips is not None:
        show.table(
            [("difference", percent(found.flips.difference)), ("flips", flips_line(found.flips))]
        )


def _show_grid(scores: NeedleScores, found: NeedleReport) -> None:
    """A row for each length: hits by depth, their share, and what such a prompt costs."""
    rows = [
        [
            str(row.length),
            *map(str, row.hits),
            percent(row.recall),
            f"{row.ttft_ms / 1e3:.2f} s",
            show.size(row.kv_bytes),
        ]
        for row in scores.lengths
    ]
    depths = [f"at {depth}%" for depth in found.depths]
    show.table(rows, head=["tokens", *depths, "all", "TTFT", "KV cache"])
