"""`edgekit eval --tasks`: its options, and how its figures are shown. Never measures anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from edgekit import tasks
from edgekit.cli import show
from edgekit.intervals import Interval
from edgekit.tasks import Flips, TaskReport, TaskScores

# The options that only --tasks knows.
NAMES = ("template", "delimiter", "shots")
_KINDS = {"choice": "multiple choice", "cloze": "cloze", "label": "labelled texts"}
_WIDEST = 12  # labels whose confusion fits a terminal

_OPTIONS = (
    click.option(
        "--tasks",
        "task_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Instead of a text: questions with answers, one JSON object a line.",
    ),
    click.option(
        "--template",
        metavar="TEXT",
        help="With --tasks: what the model reads, with {text} for the line's text, \\n for a"
        " line break.",
    ),
    click.option(
        "--delimiter",
        metavar="TEXT",
        help="With --tasks: between text and answer (default: a blank, where neither has any).",
    ),
    click.option(
        "--shots",
        type=click.IntRange(min=0),
        help="With --tasks: so many lines of the file become solved examples (default 0).",
    ),
)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of this file."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run(
    model: Path,
    task_file: Path,
    *,
    against: Path | None,
    template: str | None,
    delimiter: str | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Score and show; ``fields`` as in ``tasks.evaluate``, None for its default."""
    written = {"template": template, "delimiter": delimiter}
    fields |= {name: text and text.replace("\\n", "\n") for name, text in written.items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    with show.progress(quiet=as_json) as progress:
        found = tasks.evaluate(model, task_file, against=against, progress=progress, **fields)
    if as_json:
        files = {"model": str(model), "against": None if against is None else str(against)}
        return show.as_json(files | found.to_dict())
    rows = [("model", str(model))]
    rows += [("against", str(against))] if against is not None else []
    show.table([*rows, *_rows(found)])
    if found.labels:
        click.echo()
        _show_labels(found)


def _rows(found: TaskReport) -> Iterator[tuple[str, str]]:
    shots = f", {found.shots} shots" if found.shots else ""
    yield (
        "tasks",
        f"{found.tasks.name}: {len(found.scored)} lines, {_KINDS[found.tasks.kind]}{shots}",
    )
    yield from _figures(found.here, "")
    if found.chance:
        yield "chance", f"{100 * found.chance:.1f} %"
    if found.reference:
        yield from _figures(found.reference, "reference's ")
    if found.flips:
        yield from _flips(found.flips, "")
    if found.flips_norm:
        yield from _flips(found.flips_norm, " per byte")
    if found.perplexity_ratio:
        yield "perplexity ratio", show_bounds(found.perplexity_ratio, ".4f")


def _figures(scores: TaskScores, whose: str) -> Iterator[tuple[str, str]]:
    yield f"{whose}accuracy", percent(scores.accuracy)
    if scores.accuracy_norm:
        yield f"{whose}accuracy per byte", percent(scores.accuracy_norm)
    if scores.perplexity:
        yield f"{whose}perplexity", show_bounds(scores.perplexity, ".4g")


def _flips(found: Flips, which: str) -> Iterator[tuple[str, str]]:
    yield f"difference{which}", percent(found.difference)
    yield f"flips{which}", flips_line(found)


def flips_line(found: Flips) -> str:
    """``2.0 % (1.0 .. 3.9 %): 3 gained, 7 lost, p = 0.34``."""
    return (
        f"{percent(found.share)}: {found.gained} gained, {found.lost} lost, p = {found.p_value:.2g}"
    )


def percent(found: Interval) -> str:
    """``51.2 % (46.8 .. 55.6)``: a share and its 95% interval."""
    value, low, high = (f"{100 * end:.1f}" for end in vars(found).values())
    return f"{value} % ({low} .. {high})"


def show_bounds(found: Interval, form: str) -> str:
    """``1.03 (1.02 .. 1.04)``: a figure and its 95% interval."""
    value, low, high = (format(end, form) for end in vars(found).values())
    return f"{value} ({low} .. {high})"


def _show_labels(found: TaskReport) -> None:
    """Each label's recall, and what its lines were taken for."""
    wide = len(found.labels) <= _WIDEST
    head = ["label", "lines", "recall", *(f"as {name}" for name in found.labels if wide)]
    rows = [
        [
            label,
            str(sum(counts)),
            percent(recall) if recall else "",
            *(str(count) for count in counts if wide),
        ]
        for label, counts, recall in zip(found.labels, found.confusion, found.recalls, strict=True)
    ]
    show.table(rows, head=head)
