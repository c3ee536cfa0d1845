"""What a report means: the verdict on each model, and where its time goes.

Knows which figures the verdict is made of; never the arithmetic, that is ``roofline``'s.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekit import model_cost, probe, profile, roofline
from edgekit.artifact import Artifact
from edgekit.bench_models import Model, file_of
from edgekit.errors import EdgekitError
from edgekit.exporter import Progress, no_progress
from edgekit.model_cost import ModelCost
from edgekit.profile import Profile
from edgekit.registry import RUNTIME_OF_FORMAT
from edgekit.report import BenchReport, VerdictRow

_LLAMA = RUNTIME_OF_FORMAT["gguf"]
_PROFILED_PROMPT = 512


def judged(report: BenchReport, models: Sequence[Model], progress: Progress) -> BenchReport:
    """The report with a verdict on each model, or a remark why there is none."""
    threads = sorted({row.n_threads for row in report.rows})
    verdicts: list[VerdictRow] = []
    for model in models:
        name = model.facts.name
        rows = report.rows_of(name)
        kin = [
            other.facts.name
            for other in models
            if other is not model and other.facts.parameters == model.facts.parameters
        ]
        cost = model_cost.cost(model.header)
        try:
            limits = probe.limits(threads, types=_probed(model, cost), progress=progress)
            verdict = roofline.verdict(
                rows,
                cost,
                limits,
                others=[row for row in report.rows if row.model in kin],
                n_operators=_operators(model),
                host_ms=_host_ms(report, name),
            )
        except EdgekitError as error:
            remark = f"no verdict on {name}: {error.message}"
            report = replace(report, remarks=(*report.remarks, remark))
            continue
        verdicts.append(
            VerdictRow(
                model=name,
                kind=verdict.kind,
                share=verdict.share,
                sentence=verdict.sentence,
                rows=tuple(
                    f"{row.test} -t {row.n_threads} kv {row.kv_type}: {judged.sentence}"
                    for row, judged in zip(rows, verdict.rows, strict=True)
                ),
                evidence=verdict.evidence,
                advice=tuple(advice.text for advice in verdict.advice),
            )
        )
    return replace(report, verdicts=tuple(verdicts))


def _probed(model: Model, cost: ModelCost) -> tuple[str, ...]:
    """The types whose products are measured: llama.cpp's own. Where another engine computes, its
    arithmetic is held against the float32 peak.
    """
    return cost.types if model.runtime == _LLAMA else ()


def _operators(model: Model) -> int | None:
    """Of a decoded token; None for an engine whose empty operators were not measured."""
    return profile.count_operators(model.path) if model.runtime == _LLAMA else None


def profiles(
    models: Sequence[Artifact | str | Path], report: BenchReport, progress: Progress = no_progress
) -> list[Profile]:
    """Where each model's time goes, with the threads and the prompt of its fastest row.

    ``models`` are those that ``report`` was made of, in their order. Raises what
    ``profile.profile`` raises.
    """
    found = []
    for given, facts in zip(models, report.models, strict=True):
        rows = [row for row in report.rows_of(facts.name) if row.n_seqs == 1]
        rows = rows or report.rows_of(facts.name)
        best = max([row for row in rows if row.n_gen] or rows, key=lambda row: row.tok_s)
        n_prompt = max((row.n_prompt for row in rows), default=0) or _PROFILED_PROMPT
        part = profile.profile(
            file_of(given), n_prompt=n_prompt, threads=best.n_threads, progress=progress
        )
        found.append(replace(part, model=facts.name))
    return found


def _host_ms(report: BenchReport, name: str) -> float | None:
    """What a session's token costs beyond the engine's own loop, in ms; None if unknown."""
    session = next((row for row in report.sessions if row.model == name), None)
    if session is None or not session.decode_tok_s:
        return None
    for row in report.rows_of(name):
        same = row.n_threads == session.n_threads and row.kv_type == session.kv_type
        if row.n_gen and row.n_depth == session.n_depth and row.n_seqs == 1 and same:
            mine = 1e3 / statistics.fmean(session.decode_tok_s)
            return max(0.0, mine - 1e3 / row.tok_s)
    return None
