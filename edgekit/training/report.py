"""What a training run found: settings, phases, the table of results; as JSON and as Markdown.

Knows the report's form; never how anything was trained or measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import typed_json
from edgekit.errors import SourceError
from edgekit.formats import json_file
from edgekit.report import MachineFacts

FILE = "training.json"
PAGE = "training.md"
_SCHEMA = 1
_MAX_BYTES = 8 << 20
_SHARES = ("accuracy", "recall", "share", "mfu", "low", "high", "difference")


@dataclass(frozen=True)
class Phase:
    """One ``fit``: its steps and seconds, and what its last evaluation found. Of the memory that a
    step takes beside the weights, ``needed_bytes`` is the sum that was told before the first one,
    and ``taken_bytes`` what the first two took.
    """

    name: str
    steps: int
    samples: int
    seconds: float
    per_s: float
    unit: str
    figures: dict[str, float]
    needed_bytes: int = 0
    taken_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """A row of the table: a model, and its figures by name, units in the names."""

    name: str
    figures: dict[str, float]


@dataclass(frozen=True)
class ClassFigures:
    """What the folder's model, a classifier, makes of the test images of one class: how many were
    trained and tested on, recall and precision (None for 0 of 0), and the class that they are most
    often ``taken_for``, so many ``times``.
    """

    name: str
    trained: int
    tested: int
    recall: float | None
    precision: float | None
    taken_for: str
    times: int


@dataclass(frozen=True)
class _Figures:
    recipe: str
    about: str
    taken_at: str
    edgekit: str
    versions: dict[str, str]
    machine: MachineFacts
    processes: int
    device: str
    phases: tuple[Phase, ...]
    results: tuple[Result, ...]
    remarks: tuple[str, ...]
    classes: tuple[ClassFigures, ...]


@dataclass(frozen=True)
class TrainingReport(_Figures):
    """``results`` hold the model that the folder has, first, and what it is compared with.
    ``remarks`` are sentences: what a reader must know to believe the table. ``classes`` are those
    of a classifier of images. ``settings`` are the recipe's own, each by its name.
    """

    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"schema": _SCHEMA, **typed_json.write(self)}

    def to_bytes(self) -> bytes:
        return (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n").encode()


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is what a finished run left: only such a one is ever replaced."""
    return (folder / FILE).is_file()


def columns(report: TrainingReport) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of results, as text."""
    names = list(dict.fromkeys(name for row in report.results for name in row.figures))
    rows = [
        [
            row.name,
            *(shown(name, row.figures[name]) if name in row.figures else "-" for name in names),
        ]
        for row in report.results
    ]
    return ["model", *(name.replace("_", " ") for name in names)], rows


def class_columns(classes: Sequence[ClassFigures]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of classes, as text."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}%"

    rows = [
        [
            each.name,
            f"{each.trained:,}",
            f"{each.tested:,}",
            share(each.recall),
            share(each.precision),
            f"{each.taken_for} ({each.times:,})" if each.times else "-",
        ]
        for each in classes
    ]
    return ["class", "trained on", "tested on", "recall", "precision", "most taken for"], rows


def worst(classes: Sequence[ClassFigures], count: int) -> list[ClassFigures]:
    """The ``count`` classes that are found the least, in that order."""
    tested = [each for each in classes if each.recall is not None]
    return sorted(tested, key=lambda each: each.recall or 0.0)[:count]


def shown(name: str, value: float) -> str:
    """A figure as people read it: shares in per cent, counts whole, the rest in four digits."""
    if any(word in name.split("_") for word in _SHARES):
        return f"{100 * value:.2f}%"
    if value == int(value) and abs(value) >= 100:
        return f"{int(value):,}"
    return f"{value:.4g}"


def markdown(report: TrainingReport) -> str:
    """The report as a page."""
    head, rows = columns(report)
    lines = [f"# {report.recipe}", "", report.about, ""]
    lines += _table(head, rows)
    lines += ["", *(f"- {remark}" for remark in report.remarks), ""]
    if report.classes:
        lines += ["## Classes", "", *_table(*class_columns(report.classes)), ""]
    lines += ["## Phases", ""]
    phases = [
        [
            each.name,
            str(each.steps),
            f"{each.samples:,}",
            f"{each.seconds:.0f}",
            f"{each.per_s:,.0f} {each.unit}/s",
            f"{each.needed_bytes / 1e6:,.0f} MB",
            "-" if each.taken_bytes is None else f"{each.taken_bytes / 1e6:,.0f} MB",
            ", ".join(f"{name} {shown(name, value)}" for name, value in each.figures.items()),
        ]
        for each in report.phases
    ]
    head = ["phase", "steps", "samples", "seconds", "speed", "a step needs", "took", "held out"]
    lines += _table(head, phases)
    where = f"{report.machine.cpu or report.machine.architecture}, {report.device}"
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    lines += [
        "",
        f"Taken at {report.taken_at} on {where}, {report.processes} process(es); edgekit"
        f" {report.edgekit}, {versions}.",
        "",
        "## Settings",
        "",
        "```",
        *(f"{name}={_given(value)}" for name, value in report.settings.items()),
        "```",
        "",
    ]
    return "\n".join(lines)


def _given(value: Any) -> str:
    """As ``--set`` takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(_given, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    return [f"| {' | '.join(line)} |" for line in (cells[0], ["---"] * len(head), *cells[1:])]


def read(folder: Path) -> dict[str, Any]:
    """The JSON of a finished run's report. Raises SourceError where there is none."""
    return dict(json_file.read(folder / FILE, _MAX_BYTES))


def parse(body: dict[str, Any]) -> TrainingReport:
    """The report of a ``to_dict``. Raises SourceError for another form."""
    try:
        fields = {name: value for name, value in body.items() if name not in ("schema", "settings")}
        # Earlier reports tell neither of memory nor of classes.
        fields["phases"] = [{"needed_bytes": 0, "taken_bytes": None} | e for e in body["phases"]]
        fields.setdefault("classes", [])
        found = typed_json.read(_Figures, fields, FILE)
        return TrainingReport(settings=dict(body["settings"]), **vars(found))
    except (typed_json.Mismatch, KeyError, TypeError) as error:
        raise SourceError(f"{FILE} is no report of a training run: {error}"[:200]) from None
