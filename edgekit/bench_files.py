"""Reports and profiles as files: JSON, CSV, Markdown or a picture, by the file's suffix.

Knows suffixes; never what the forms look like.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgekit import _fs, bench_plot, plot, profile, report_text
from edgekit.errors import MissingExtraError, UsageError
from edgekit.profile import Profile
from edgekit.report import BenchReport

_FORMS = (".json", ".csv", ".md", *plot.FORMS)


def check(path: Path) -> None:
    """Raises UsageError for a file of no known form or in a place that cannot be written to, and
    MissingExtraError for a picture without matplotlib: before the work, not after.
    """
    if path.suffix.lower() not in _FORMS:
        raise UsageError(f"cannot write {path.name}", hint=f"end it in {', '.join(_FORMS)}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder")
    above = path.absolute().parent
    while not os.path.exists(above):
        above = above.parent
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise UsageError(f"cannot write {path}: {above} is no folder to write to")
    if path.suffix.lower() in plot.FORMS and find_spec("matplotlib") is None:
        raise MissingExtraError("plot", missing="matplotlib")


def write(report: BenchReport, path: Path) -> None:
    """Write ``report`` in the form that the suffix of ``path`` names, whole or not at all.

    Raises UsageError, ExportError.
    """
    write_form(report, path, report_text.as_csv, report_text.markdown, bench_plot.draw)


def write_form(
    report: Any,
    path: Path,
    as_csv: Callable[[Any], str],
    markdown: Callable[[Any], str],
    draw: Callable[[Any, Path], None],
) -> None:
    """``write`` for any report that has a ``to_json``."""
    check(path)
    form = path.suffix.lower()
    if form == ".json":
        _fs.write_atomic(path, report.to_json())
    elif form == ".csv":
        _fs.write_atomic(path, as_csv(report).encode("utf-8", "replace"))
    elif form == ".md":
        _fs.write_atomic(path, markdown(report).encode("utf-8", "replace"))
    else:
        draw(report, path)


def draw_profile(part: Profile, path: Path, number: int) -> None:
    """Beside the picture ``path`` of a report that of its ``number``-th model's profile.

    ``speed.png`` -> ``speed-profile.png``, ``speed-profile-2.png``; nothing for other forms.
    """
    if path.suffix.lower() in plot.FORMS:
        name = f"{path.stem}-profile" + (f"-{number}" if number > 1 else "")
        profile.draw(part, path.with_name(name + path.suffix))
