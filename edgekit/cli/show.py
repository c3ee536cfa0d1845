"""How every verb shows things: tables, JSON, sizes and progress.

Progress and remarks go to stderr, always; stdout holds the answer alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from edgekit.exporter import Progress

_TICK_S = 0.2


def as_json(body: Any) -> None:
    """One JSON document on stdout. Tokens may hold bytes that are no text: they come escaped."""
    text = json.dumps(body, indent=2, ensure_ascii=False)
    click.echo(text.encode("utf-8", "backslashreplace").decode())


def table(rows: Sequence[Sequence[str]], *, head: Sequence[str] = ()) -> None:
    """Columns as wide as they need be; columns of figures are flushed right."""
    lines = [list(head), *rows] if head else list(rows)
    if not lines:
        return
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    right = [all(_is_figure(str(row[i])) for row in rows) for i in range(len(widths))]
    for number, line in enumerate(lines):
        cells = [
            str(cell).rjust(width) if flush else str(cell).ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ]
        text = "  ".join(cells).rstrip()
        click.echo(click.style(text, bold=True) if head and number == 0 else text)


def _is_figure(text: str) -> bool:
    return text.replace(",", "").replace(".", "").rstrip("%BMGkix ").isdigit()


def size(size_bytes: int) -> str:
    """``105454144`` -> ``105.5 MB``: decimal units, as disks and download pages count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} B"


def warn(text: str) -> None:
    """A remark that must not be missed, on stderr."""
    click.echo(click.style("warning: ", fg="yellow", bold=True) + text, err=True)


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Bars with the time left on a terminal, one line a stage elsewhere, nothing when ``quiet``."""
    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        bars = _Bars()
        try:
            yield bars
        finally:
            bars.close()
    else:
        yield _Lines()


@contextmanager
def progress_of_each(
    names: Sequence[str], *, quiet: bool = False
) -> Iterator[Callable[[str], Progress]]:
    """``progress`` for several at once, each by its name; one alone has bars as ever."""
    if len(names) == 1 or quiet:
        with progress(quiet=quiet) as only:
            yield lambda name: only
    else:
        yield lambda name: _Lines(f"{name}: ")


class _Lines:
    """For logs: each stage once, when it starts, behind ``who``."""

    def __init__(self, who: str = "") -> None:
        self._who = who
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            click.echo(f"{self._who}{stage} ...", err=True)


class _Bars:
    """For people: a bar that is redrawn a few times a second and stays when its stage is done."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None
        self._done = 0
        self._drawn_s = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.close()
            self._stage, self._done = stage, 0
            self._bar = click.progressbar(
                length=max(1, total), label=f"{stage:20}", file=sys.stderr, width=30
            )
            self._bar.__enter__()
        now_s = time.monotonic()
        if done < total and now_s - self._drawn_s < _TICK_S:
            return
        self._drawn_s = now_s
        self._bar.update(done - self._done)
        self._done = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
