"""Reports as files: JSON, CSV, Markdown or a picture, by the file's suffix.

Knows suffixes; never what the forms look like.
"""

from __future__ import annotations

from pathlib import Path

from edgekit import _fs, report_text
from edgekit.errors import UsageError
from edgekit.report import BenchReport

_FORMS = (".json", ".csv", ".md")


def check(path: Path) -> None:
    """Raises UsageError for a file of no known form: before the work, not after."""
    if path.suffix.lower() not in _FORMS:
        raise UsageError(f"cannot write {path.name}", hint=f"end it in {', '.join(_FORMS)}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder")


def write(report: BenchReport, path: Path) -> None:
    """Write ``report`` in the form that the suffix of ``path`` names, whole or not at all.

    Raises UsageError, ExportError.
    """
    check(path)
    form = path.suffix.lower()
    if form == ".json":
        _fs.write_atomic(path, report.to_json())
    elif form == ".csv":
        _fs.write_atomic(path, report_text.as_csv(report).encode("utf-8", "replace"))
    else:
        _fs.write_atomic(path, report_text.markdown(report).encode("utf-8", "replace"))
