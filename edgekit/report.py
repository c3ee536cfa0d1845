"""What a benchmark found, with all that is needed to judge it: settings, machine, every sample.

Knows the report's form and its JSON, which people exchange; never how anything was measured.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import machine, typed_json
from edgekit.errors import UsageError, VersionError
from edgekit.formats import json_file
from edgekit.formats.foreign import Malformed, read_whole
from edgekit.telemetry import Conditions, Moment

SCHEMA = 2
KIND = "edgekit bench"
_MAX_BYTES = 32 << 20
# A spread of normal noise is 1.4826 times its median absolute deviation.
_NORMAL_MAD = 1.4826
_OUTLIER_MADS = 3.0
_FEWEST_FOR_OUTLIERS = 4
# What others may take of the machine before a report calls it busy.
BUSY_SHARE = 0.10
BUSY_STEAL = 0.05
# A stranger's figures must be such that speeds can be computed from them.
_SHORTEST, _MOST = 1e-9, 1e9


@dataclass(frozen=True)
class MachineFacts:
    """What the figures were taken on; no address. ``usable_cores`` were ours to use.

    The times of an ``emulated`` machine say nothing of a real one.
    """

    cpu: str | None
    architecture: str
    cores: int
    usable_cores: int
    board: str | None
    memory_bytes: int | None
    kernel: str
    emulated: bool


def machine_facts(root: Path) -> MachineFacts:
    """Those of the machine whose files lie below ``root``."""
    cpu = machine.cpu(root)
    return MachineFacts(
        cpu=cpu.model,
        architecture=cpu.architecture,
        cores=cpu.cores,
        usable_cores=len(os.sched_getaffinity(0)),
        board=machine.board(root),
        memory_bytes=machine.memory(root).total_bytes,
        kernel=platform.release(),
        emulated=False,
    )


@dataclass(frozen=True)
class EngineFacts:
    """The engine, its version, and the file with its CPU code (None for a fixed build)."""

    name: str
    version: str
    backend: str | None


@dataclass(frozen=True)
class ModelFacts:
    """A model: ``name`` is what rows call it, ``type`` that of most of its weights."""

    name: str
    sha256: str
    size_bytes: int
    type: str
    architecture: str
    parameters: int


@dataclass(frozen=True)
class BenchRow:
    """One test with one setting: reading ``n_prompt`` tokens, or generating ``n_gen``.

    A test that generates decodes ``n_seqs`` sequences side by side, each behind ``n_depth`` tokens.
    ``samples_s`` are seconds, one for each repetition, in the order of the rounds; ``step_ms`` are
    milliseconds of every step of all repetitions (none for a prompt).
    ``peak_rss_bytes`` is what the process held at most, in all tests of the setting.
    ``energy_j`` is that of the processor package in all repetitions; None where it cannot be told.
    The shares are parts of all processors' time: of other processes, and taken by the host.
    ``throttled``: the processor slowed itself down in some repetition. Those are in no other
    figure, and their seconds are ``throttled_s``; where it did so in all, none is left out.
    ``predicted_tok_s`` is what `edgekit plan` says of it: low, mid, high, or nothing.
    """

    model: str
    model_type: str
    size_bytes: int
    n_threads: int
    n_prompt: int
    n_gen: int
    n_depth: int
    n_batch: int
    n_seqs: int
    kv_type: str
    flash_attention: bool
    samples_s: tuple[float, ...]
    step_ms: tuple[float, ...]
    peak_rss_bytes: int | None = None
    energy_j: float | None = None
    others_share: float | None = None
    steal_share: float | None = None
    throttled: bool | None = None
    throttled_s: tuple[float, ...] = ()
    predicted_tok_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.n_prompt) == bool(self.n_gen):
            raise UsageError("a row either reads a prompt or generates")
        counts = (self.n_threads, self.n_batch, self.n_seqs, self.size_bytes)
        tokens = (self.n_prompt, self.n_gen, self.n_depth)
        if min(counts) < 1 or min(tokens) < 0 or max(*tokens, self.n_seqs) > _MOST:
            raise UsageError("a count is out of bounds")
        times = (*self.samples_s, *self.step_ms, *self.throttled_s)
        if len(self.predicted_tok_s) not in (0, 3) or min(self.predicted_tok_s, default=0) < 0:
            raise UsageError("a prediction is low, mid and high")
        if not self.samples_s or not all(_SHORTEST <= time <= _MOST for time in times):
            raise UsageError("a row needs samples, and times that can be")

    @property
    def setting(self) -> tuple[Any, ...]:
        """What two rows must share to be comparable, whatever their models are."""
        return (
            self.n_prompt,
            self.n_gen,
            self.n_depth,
            self.n_seqs,
            self.n_threads,
            self.kv_type,
            self.n_batch,
            self.flash_attention,
        )

    @property
    def test(self) -> str:
        """The test in llama-bench's words: ``pp512``, ``tg128 @ d512``, ``tg128 x 4``."""
        text = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        text += f" @ d{self.n_depth}" if self.n_depth else ""
        return text + (f" x {self.n_seqs}" if self.n_seqs > 1 else "")

    @property
    def tokens(self) -> int:
        """Tokens of one repetition, of all sequences together."""
        return self.n_prompt or self.n_gen * self.n_seqs

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each repetition, all sequences together."""
        return [self.tokens / seconds for seconds in self.samples_s]

    @property
    def tok_s(self) -> float:
        """The mean of ``speeds``: llama-bench's figure."""
        return statistics.fmean(self.speeds)

    @property
    def tok_s_sd(self) -> float:
        """The standard deviation of ``speeds``; 0 for one repetition."""
        return standard_deviation(self.speeds)

    def ms_per_token(self, percent: float) -> float:
        """A percentile of a token's milliseconds: over steps, over repetitions for a prompt."""
        if self.step_ms:
            return percentile(self.step_ms, percent)
        return percentile([1e3 * seconds / self.tokens for seconds in self.samples_s], percent)

    @property
    def outliers(self) -> list[int]:
        """Repetitions that lie far from the others; they count in every figure all the same."""
        return outliers(self.samples_s)

    @property
    def energy_j_per_token(self) -> float | None:
        if self.energy_j is None:
            return None
        return self.energy_j / (self.tokens * len(self.samples_s))

    def summary(self) -> dict[str, Any]:
        """The figures that follow from the samples."""
        return {
            "test": self.test,
            "tok_s": self.tok_s,
            "tok_s_sd": self.tok_s_sd,
            "ms_per_token": {f"p{p}": self.ms_per_token(p) for p in (50, 95, 99)},
            "energy_j_per_token": self.energy_j_per_token,
            "outliers": self.outliers,
        }


@dataclass(frozen=True)
class SessionRow:
    """What a user of ``edgekit.load`` gets: load times, the first token, and the pace after it.

    A load counts until the first token is out; ``cold_load_s`` is with the file's pages dropped
    from memory, None where ``cold_note`` says why that was not possible. ``ttft_s`` is from the
    call to the first piece of text of a prompt of ``prompt_tokens``. ``decode_tok_s`` is with
    sampling, text and Python, behind ``n_depth`` tokens; empty where the model ended its answers
    at once. ``n_threads`` decode.
    """

    model: str
    n_threads: int
    kv_type: str
    prompt_tokens: int
    decode_tokens: int
    n_depth: int
    cold_load_s: float | None
    cold_note: str | None
    warm_load_s: float
    ttft_s: tuple[float, ...]
    decode_tok_s: tuple[float, ...]
    peak_rss_bytes: int | None

    def summary(self) -> dict[str, Any]:
        """The figures that follow from the samples."""
        return {
            "ttft_s": {f"p{p}": percentile(self.ttft_s, p) for p in (50, 95) if self.ttft_s},
            "decode_tok_s": statistics.fmean(self.decode_tok_s) if self.decode_tok_s else None,
        }


@dataclass(frozen=True)
class VerdictRow:
    """What bounds ``model``, and its ``rows`` one by one; what would help; with the evidence.

    ``kind`` and ``share`` are those of the sentence, which speaks of the row that matters most.
    """

    model: str
    kind: str
    share: float | None
    sentence: str
    rows: tuple[str, ...]
    evidence: tuple[str, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class BenchReport:
    """A whole run. ``energy_note`` says why there are no energies; ``remarks`` what to mind.

    ``device`` is the user's name of the board it ran on, None for the machine that asked;
    ``moments`` are what the machine felt, second by second. Predictions are those for ``profile``.
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
    rows: tuple[BenchRow, ...]
    sessions: tuple[SessionRow, ...]
    verdicts: tuple[VerdictRow, ...]
    moments: tuple[Moment, ...]
    profile: str | None

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise UsageError("two models have one name")
        of_rows = {row.model for row in self.rows} | {row.model for row in self.sessions}
        if (of_rows | {verdict.model for verdict in self.verdicts}) - set(names):
            raise UsageError("a row is of a model that the report does not list")
        if not self.rows:
            raise UsageError("a report needs rows")

    def model(self, name: str) -> ModelFacts:
        return next(model for model in self.models if model.name == name)

    def rows_of(self, name: str) -> list[BenchRow]:
        return [row for row in self.rows if row.model == name]

    @property
    def busy(self) -> str | None:
        """What disturbed the run, in words; None if nothing did that could be seen."""
        return busy(self.rows)

    @property
    def throttled(self) -> bool:
        """Whether the processor slowed itself down during any row."""
        return any(row.throttled for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Every row has a ``summary`` for readers, which ``parse`` does not trust."""
        body = typed_json.write(self)
        for name in ("rows", "sessions"):
            for row, plain in zip(getattr(self, name), body[name], strict=True):
                plain["summary"] = row.summary()
        return {"kind": KIND, "schema": SCHEMA} | body

    def to_json(self) -> bytes:
        """UTF-8 text that ``parse`` takes back."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode("utf-8", "replace")

    def __str__(self) -> str:
        lines = [
            f"{row.model}  {row.test}  -t {row.n_threads}  {row.tok_s:.1f} tok/s"
            f" ± {row.tok_s_sd:.1f}"
            for row in self.rows
        ]
        return "\n".join([*lines, *(verdict.sentence for verdict in self.verdicts)])


def busy(rows: Sequence[Any]) -> str | None:
    """What disturbed rows with an ``others_share`` and a ``steal_share``, in words."""
    others = max((row.others_share or 0.0 for row in rows), default=0.0)
    steal = max((row.steal_share or 0.0 for row in rows), default=0.0)
    words = []
    if others > BUSY_SHARE:
        words.append(f"other processes took up to {others:.0%} of the processors")
    if steal > BUSY_STEAL:
        words.append(f"the host of this virtual machine took up to {steal:.0%} of their time")
    return " and ".join(words) or None


def read(path: Path) -> BenchReport:
    """The report in a JSON file. Raises SourceError, UsageError, VersionError."""
    return parse(read_whole(path, _MAX_BYTES), origin=str(path))


def parse(raw: bytes, *, origin: str) -> BenchReport:
    """The report that ``raw`` spells: strangers' reports are bounded and checked, key by key.

    Raises VersionError for a newer form, UsageError for anything that is no report.
    """
    try:
        body = json_file.parse(raw)
    except Malformed as error:
        raise UsageError(f"{origin} is no report: it {error}") from None
    if not isinstance(body, dict) or body.pop("kind", None) != KIND:
        raise UsageError(f"{origin} is no report of edgekit bench")
    schema = body.pop("schema", None)
    if type(schema) is int and schema > SCHEMA:
        raise VersionError(
            f"{origin} has schema {schema}, this edgekit knows up to {SCHEMA}",
            hint="upgrade edgekit",
        )
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise UsageError(f"{origin} is no report of edgekit bench: its schema is {schema!a}")
    for name in ("rows", "sessions"):
        rows = body.get(name)
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict):
                row.pop("summary", None)
    if schema == 1:
        _from_schema_1(body)
    try:
        return typed_json.read(BenchReport, body, "the report")
    except typed_json.Mismatch as error:
        raise UsageError(f"{origin}: {error}") from None


def _from_schema_1(body: dict[str, Any]) -> None:
    """What reports without a device and its telemetry lack."""
    body |= {"device": None, "moments": [], "profile": None}
    if isinstance(body.get("machine"), dict):
        body["machine"]["emulated"] = False
    rows = body.get("rows")
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict):
            row |= {"throttled_s": [], "predicted_tok_s": []}


def standard_deviation(values: Sequence[float]) -> float:
    """Of a sample (n - 1); 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` % lie, with straight lines between the sorted values."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def outliers(values: Sequence[float]) -> list[int]:
    """Indices of values beyond the median ± 3 median absolute deviations (of normal noise)."""
    if len(values) < _FEWEST_FOR_OUTLIERS:
        return []
    middle = statistics.median(values)
    spread = _NORMAL_MAD * statistics.median([abs(value - middle) for value in values])
    return [i for i, value in enumerate(values) if abs(value - middle) > _OUTLIER_MADS * spread]
