"""What a benchmark of models without tokens found: latencies, with what is needed to judge them.

Knows the report's form and its JSON; never how anything was measured.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from typing import Any

from edgekit import intervals, typed_json
from edgekit.errors import UsageError
from edgekit.formats import json_file
from edgekit.formats.foreign import Malformed
from edgekit.intervals import Interval
from edgekit.report import EngineFacts, MachineFacts, ModelFacts, VerdictRow, busy, percentile
from edgekit.telemetry import Conditions, Moment

SCHEMA = 1
KIND = "edgekit bench latency"


@dataclass(frozen=True)
class LatencyRow:
    """One model in one runtime, with one count of threads and one size of batch.

    ``turns_ms`` has milliseconds of every run, a tuple for each turn; turns of several rows
    alternate. ``load_s`` is the first load in a process that has the engine already. ``flops`` are
    those of one input, None where they cannot be told. The shares are parts of all processors'
    time: of other processes, and taken by the host.
    """

    model: str
    n_threads: int
    batch: int
    turns_ms: tuple[tuple[float, ...], ...]
    load_s: float
    peak_rss_bytes: int | None
    flops: float | None
    weight_bytes: int
    others_share: float | None
    steal_share: float | None
    throttled: bool | None
    runtime: str = "ort"

    def __post_init__(self) -> None:
        if not self.turns_ms or not all(turn and min(turn) > 0 for turn in self.turns_ms):
            raise UsageError("a row needs runs, and times that can be")

    def ms(self, percent: float) -> float:
        """A percentile of one run's milliseconds, over all turns."""
        return percentile([ms for turn in self.turns_ms for ms in turn], percent)

    @property
    def items_s(self) -> float:
        """Inputs per second, at the median latency."""
        return 1e3 * self.batch / self.ms(50)

    def times_faster_than(self, other: LatencyRow) -> Interval:
        """The other's latency over this one's, from turns beside each other; a single turn has no
        bounds.
        """
        ours, theirs = (map(statistics.median, row.turns_ms) for row in (self, other))
        return intervals.mean([b / a for a, b in zip(ours, theirs, strict=False)])

    def summary(self) -> dict[str, Any]:
        """The figures that follow from the runs."""
        return {"ms": {f"p{p}": self.ms(p) for p in (50, 95, 99)}, "items_s": self.items_s}


@dataclass(frozen=True)
class OperatorRow:
    """One kind of operator of ``model``: how many there are, and their milliseconds in a run."""

    model: str
    operator: str
    count: int
    ms: float
    share: float


@dataclass(frozen=True)
class LatencyReport:
    """A whole run; fields as in ``report.BenchReport``. ``operators`` only with a profile.

    ``engine`` is that of the first row; ``other_engines`` are those of the rest.
    """

    taken_at: str
    device: str | None
    edgekit: str
    machine: MachineFacts
    engine: EngineFacts
    models: tuple[ModelFacts, ...]
    before: Conditions
    after: Conditions
    energy_note: str | None
    remarks: tuple[str, ...]
    rows: tuple[LatencyRow, ...]
    verdicts: tuple[VerdictRow, ...]
    operators: tuple[OperatorRow, ...]
    moments: tuple[Moment, ...]
    profile: str | None = None
    other_engines: tuple[EngineFacts, ...] = ()

    @property
    def busy(self) -> str | None:
        """What disturbed the run, in words; None if nothing did that could be seen."""
        return busy(self.rows)

    def model(self, name: str) -> ModelFacts:
        return next(model for model in self.models if model.name == name)

    def beside(self, row: LatencyRow) -> LatencyRow | None:
        """The first model's row, in the first runtime, with the same threads and batch; None for
        that row itself.
        """
        same = [
            each
            for each in self.rows
            if (each.n_threads, each.batch) == (row.n_threads, row.batch)
            and (each.model, each.runtime) == (self.rows[0].model, self.rows[0].runtime)
        ]
        return same[0] if same and same[0] is not row else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; every row has a ``summary`` for readers."""
        body = typed_json.write(self)
        for row, plain in zip(self.rows, body["rows"], strict=True):
            plain["summary"] = row.summary()
            first = self.beside(row)
            if first is not None:
                faster = row.times_faster_than(first)
                bounds = (faster.value, faster.low, faster.high)
                plain["summary"]["times_faster"] = [b if math.isfinite(b) else None for b in bounds]
        return {"kind": KIND, "schema": SCHEMA} | body

    def to_json(self) -> bytes:
        """UTF-8 text."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode("utf-8", "replace")


def parse(raw: bytes, *, origin: str) -> LatencyReport:
    """The report that ``raw`` spells; it may be a stranger's. Raises UsageError for any other."""
    try:
        body = json_file.parse(raw)
    except Malformed as error:
        raise UsageError(f"{origin} is no report: it {error}") from None
    if not isinstance(body, dict) or (body.pop("kind", None), body.pop("schema", None)) != (
        KIND,
        SCHEMA,
    ):
        raise UsageError(f"{origin} is no report of latencies with schema {SCHEMA}")
    rows = body.get("rows")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict):
            row.pop("summary", None)
    try:
        return typed_json.read(LatencyReport, body, "the report")
    except typed_json.Mismatch as error:
        raise UsageError(f"{origin}: {error}") from None
