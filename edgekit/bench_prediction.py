"""What `edgekit plan` would have said of a benchmark's rows, beside what was measured.

Knows reports and predictions; never how either is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgekit import model_cost, predictor
from edgekit.device import DeviceProfile, load_profile, of_board, profiles
from edgekit.device_config import LOCAL, devices
from edgekit.errors import EdgekitError
from edgekit.formats.gguf import GgufHeader
from edgekit.model_cost import ModelCost
from edgekit.predictor import Work
from edgekit.report import BenchReport, BenchRow


def predicted(
    report: BenchReport, headers: Mapping[str, GgufHeader], profile: DeviceProfile | None
) -> BenchReport:
    """The report with each row's prediction; ``headers`` are those of its models, by name.

    Without a profile, or for a model that the predictor does not know, rows stay as they are.
    """
    if profile is None:
        return report
    costs: dict[str, ModelCost] = {}
    for name, header in headers.items():
        try:
            costs[name] = model_cost.cost(header)
        except EdgekitError:
            continue
    rows = tuple(
        replace(row, predicted_tok_s=_band(row, costs[row.model], profile))
        if row.model in costs
        else row
        for row in report.rows
    )
    return replace(report, rows=rows, profile=profile.name)


def _band(row: BenchRow, cost: ModelCost, profile: DeviceProfile) -> tuple[float, ...]:
    """Low, mid and high: what the predictor says of a row's setting."""
    work = Work(
        n_threads=row.n_threads,
        n_prompt=row.n_prompt or 1,
        depth=row.n_depth + row.n_gen // 2,  # the middle of an answer stands for it
        n_seqs=row.n_seqs,
        n_batch=row.n_batch,
        kv_type=row.kv_type,
    )
    found = predictor.predict(cost, profile, work)
    band = found.prefill if row.n_prompt else found.decode
    return (band.low, band.mid, band.high)


def profile_of(name: str, board: str | None, total_bytes: int | None) -> DeviceProfile | None:
    """The profile that was measured or named for a device, or else that of its board's model."""
    own = None if name == LOCAL else devices().get(name)
    for known in (name, own and own.profile):
        if known is not None and known in profiles():
            return load_profile(known)
    return None if board is None else of_board(board, total_bytes)
