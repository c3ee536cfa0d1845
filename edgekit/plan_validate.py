"""How far off the predictions are: each published speed beside the predicted one.

Knows the published rows (``devices/published.json``) and how the predictor's constants are fitted
to them; never a formula, those are the predictor's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

from edgekit import model_cost, typed_json, vision_cost
from edgekit.device import DeviceProfile, every_profile
from edgekit.model_cost import ModelCost
from edgekit.model_shape import header_of
from edgekit.predictor import CALIBRATION, Calibration, Work, impossible, predict
from edgekit.tensor_types import retyped
from edgekit.vision_predictor import predict_vision

_ROUNDS = 4
_STEPS = (0.25, 0.1, 0.04, 0.015)


@dataclass(frozen=True)
class Speed:
    """A published speed of a language model; on a device with a GPU, all of it there."""

    device: str
    model: str
    type: str
    phase: Literal["decode", "prefill"]
    tok_s: float
    source: str


@dataclass(frozen=True)
class Latency:
    """A published time for one image."""

    device: str
    model: str
    engine: str
    int8: bool
    threads: int
    ms: float
    source: str


@dataclass(frozen=True)
class Row:
    """A published figure, what is predicted for it, and the error: 0.1 for 10% too much.

    ``blind_error`` is that of constants which were fitted without any row of this board.
    """

    device: str
    what: str
    unit: str
    published: float
    predicted: float
    error: float
    blind_error: float
    source: str


@dataclass(frozen=True)
class Validation:
    """All rows, and what is said of claims that cannot be true."""

    rows: tuple[Row, ...]
    impossible: tuple[str, ...]

    def summary(self, *, blind: bool = False) -> dict[str, float]:
        """Median and maximum of the errors' sizes."""
        errors = [abs(row.blind_error if blind else row.error) for row in self.rows]
        return {"median": statistics.median(errors), "max": max(errors)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "rows": [typed_json.write(row) for row in self.rows],
            "error": self.summary(),
            "error_of_unseen_boards": self.summary(blind=True),
            "impossible": list(self.impossible),
        }


def validate() -> Validation:
    """Every published row against its prediction, and against one that never saw its board."""
    speeds, latencies, claims = _published()
    measured: list[Speed | Latency] = [*speeds, *latencies]
    boards = sorted({_board(row.device) for row in measured})
    blind = {board: fit(without=board) for board in boards}
    rows = [
        _row(each, _predicted(each, CALIBRATION), _predicted(each, blind[_board(each.device)]))
        for each in measured
    ]
    words = [
        impossible(claim.tok_s, _cost(claim.model, claim.type), _profile(claim.device))
        for claim in (*speeds, *claims)
        if claim.phase == "decode"
    ]
    return Validation(tuple(rows), tuple(filter(None, words)))


def fit(*, without: str | None = None) -> Calibration:
    """The constants for which the median published row is met; ``without`` one board's rows.

    A constant that no row is left for keeps its value.
    """
    speeds, latencies, _ = _published()
    speeds = [row for row in speeds if _board(row.device) != without]
    latencies = [row for row in latencies if _board(row.device) != without]
    found = CALIBRATION
    for name, phase, gpu in (
        ("memory", "decode", False),
        ("prefill", "prefill", False),
        ("gpu_memory", "decode", True),
        ("gpu_prefill", "prefill", True),
    ):
        rows = [
            row
            for row in speeds
            if row.phase == phase and (_profile(row.device).gpu is not None) == gpu
        ]
        found = _to_the_median(found, name, rows)
    return _fit_vision(found, [row for row in latencies if row.engine == "ncnn"])


def _to_the_median(found: Calibration, name: str, rows: Sequence[Speed]) -> Calibration:
    """Speeds grow with each constant, if less than in proportion: some rounds suffice."""
    for _ in range(_ROUNDS if rows else 0):
        ratio = statistics.median(row.tok_s / _predicted(row, found) for row in rows)
        found = replace(found, **{name: getattr(found, name) * ratio})
    return found


def _fit_vision(found: Calibration, rows: Sequence[Latency]) -> Calibration:
    """Both constants by ever smaller steps down the sum of the relative errors."""

    def miss(calibration: Calibration) -> float:
        return sum(abs(_predicted(row, calibration) / row.ms - 1) for row in rows)

    for step in _STEPS if rows else ():
        better = True
        while better:
            better = False
            for name in ("vision", "traffic"):
                for factor in (1 + step, 1 / (1 + step)):
                    tried = replace(found, **{name: getattr(found, name) * factor})
                    if miss(tried) < miss(found) - 1e-9:
                        found, better = tried, True
    return found


def _predicted(row: Speed | Latency, calibration: Calibration) -> float:
    profile = _profile(row.device)
    if isinstance(row, Latency):
        return predict_vision(
            _image_cost(row.model),
            profile,
            int8=row.int8,
            engine=row.engine,
            n_threads=row.threads,
            calibration=calibration,
        ).mid
    work = Work(gpu_part=0.0 if profile.gpu is None else 1.0)
    found = predict(_cost(row.model, row.type), profile, work, calibration=calibration)
    return (found.decode if row.phase == "decode" else found.prefill).mid


def _row(row: Speed | Latency, predicted: float, blind: float) -> Row:
    if isinstance(row, Latency):
        kind = "int8" if row.int8 else "float"
        what = f"{row.model} {kind}, {row.engine}, {row.threads} threads"
        published, unit = row.ms, "ms"
    else:
        what, published, unit = f"{row.model} {row.type} {row.phase}", row.tok_s, "tok/s"
    return Row(
        device=row.device,
        what=what,
        unit=unit,
        published=published,
        predicted=predicted,
        error=predicted / published - 1,
        blind_error=blind / published - 1,
        source=row.source,
    )


@cache
def _body() -> dict[str, Any]:
    text = (resources.files("edgekit.devices") / "published.json").read_text("utf-8")
    body: dict[str, Any] = json.loads(text)
    return body


@cache
def _published() -> tuple[list[Speed], list[Latency], list[Speed]]:
    body = _body()

    def read(kind: Any, name: str) -> list[Any]:
        return [typed_json.read(kind, row, f"{name}[{i}]") for i, row in enumerate(body[name])]

    return read(Speed, "speeds"), read(Latency, "latencies"), read(Speed, "claims")


@cache
def _cost(model: str, file_type: str) -> ModelCost:
    return model_cost.cost(retyped(header_of(_body()["models"][model]), file_type))


@cache
def _image_cost(model: str) -> vision_cost.VisionCost:
    body = _body()["models"][model]
    if "flops" in body:  # of a family without a config.json: its publisher's figures
        return typed_json.read(vision_cost.VisionCost, body, model)
    return vision_cost.required(body)


@cache
def _built_in() -> dict[str, DeviceProfile]:
    """Rows are about boards as they are sold, whatever the user measured on theirs."""
    return {each.name: each for each in every_profile(own=False)}


def _profile(name: str) -> DeviceProfile:
    return _built_in()[name]


def _board(device: str) -> str:
    """The board of a variant: its profile's own name."""
    return min((name for name in _built_in() if device.startswith(name)), key=len)
