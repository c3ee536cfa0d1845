"""Which passes of kernel fusion a graph gets: those that are not slower on this machine.

Knows how to race two forms of a graph; never a pattern, those are the passes', and writes no file
that lasts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import onnxruntime

from edgekit import _fs, machine, telemetry
from edgekit.errors import ExportError, RecipeError
from edgekit.exporter import Progress
from edgekit.exporters import passes
from edgekit.registry import did_you_mean
from edgekit.report import BUSY_SHARE, BUSY_STEAL
from edgekit.tensor_figures import PassTrial

Feed = Mapping[str, Any]
AUTO, NONE = "auto", "none"
_RACE_S = 1.5
_LEAST_ROUNDS, _MOST_ROUNDS, _WARM_UP = 7, 60, 3
# A pass is dropped when its graph takes this much more at the median, and more in three rounds of
# four: what stays within the noise stays in, so that equal exports have equal bytes.
_SLOWER = 1.02
# Where others kept the machine working, chance takes more: then a pass must be this much slower.
_SLOWER_BUSY = 1.10
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Chosen:
    """``recipe`` is the choice in the words of Recipe.fusion; ``fired`` says of each graph how
    often each pass fired; ``trials`` what was measured.
    """

    recipe: str
    fired: list[dict[str, int]]
    trials: tuple[PassTrial, ...]


def choose(models: Sequence[Any], feeds: Sequence[Feed], wanted: str, progress: Progress) -> Chosen:
    """Rewrite the ModelProtos of one product in place.

    ``wanted`` is "none", "auto" (each pass is raced against the graph without it, on ``feeds``, one
    input for each graph) or names of passes with commas between, which are taken as they are.
    Raises RecipeError for a name that is no pass's.
    """
    if wanted == NONE:
        return Chosen(NONE, [{} for _ in models], ())
    names = list(passes.PASSES) if wanted == AUTO else _known(wanted)
    race = _Race(feeds) if wanted == AUTO and _fit_in_memory(models) else None
    fired: list[dict[str, int]] = [{} for _ in models]
    trials, kept = [], []
    for number, name in enumerate(names):
        progress("fuse", number, len(names))
        before = [model.SerializeToString() for model in models] if race else []
        counts = [passes.apply(name, model) for model in models]
        if race and sum(counts) and name not in passes.UNMEASURED:
            ratio, slower = race.run(before, [model.SerializeToString() for model in models])
            trials.append(PassTrial(name, sum(counts), ratio, not slower))
            if slower:
                for model, raw in zip(models, before, strict=True):
                    model.ParseFromString(raw)
                continue
        kept.append(name)
        for each, count in zip(fired, counts, strict=True):
            each[name] = count
    progress("fuse", len(names), len(names))
    return Chosen(",".join(kept) or NONE, fired, tuple(trials))


def _known(wanted: str) -> list[str]:
    names = wanted.split(",")
    for name in names:
        if name not in passes.PASSES:
            raise RecipeError(
                f"no pass is called '{name}'", hint=did_you_mean(name, list(passes.PASSES))
            )
    return names


def _fit_in_memory(models: Sequence[Any]) -> bool:
    """Whether the graphs can be held three times, which a race needs."""
    return sum(int(model.ByteSize()) for model in models) < _MOST_BYTES


class _Race:
    """Two forms of the same graphs in turn, on one input each. What came of it is remembered for
    this machine and engine, so that the same export gives the same bytes again; but not where
    others kept the machine working meanwhile.
    """

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        cpu = machine.cpu(machine.root())
        where = f"{cpu.model or cpu.architecture} {onnxruntime.__version__}"
        self._where = f"{where} {len(os.sched_getaffinity(0))}"

    def run(self, before: Sequence[bytes], after: Sequence[bytes]) -> tuple[float | None, bool]:
        """The median of the ratio after / before, and whether that is slower; None where the engine
        cannot run one of them: then the receipt will say why.
        """
        digest = hashlib.sha256(self._where.encode())
        for raw in (*before, *after):
            digest.update(hashlib.sha256(raw).digest())
        file = _fs.home("state") / "fusion" / f"{digest.hexdigest()[:32]}.json"
        try:
            known = json.loads(file.read_bytes())
            return float(known["ratio"]), bool(known["slower"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        try:
            sides = [[_session(raw) for raw in side] for side in (before, after)]
            counters, own_s = telemetry.counters(machine.root()), time.process_time()
            ratios = self._ratios(sides)
        except Exception:  # the engine's own kinds, which have no common base
            return None, False
        own_s = time.process_time() - own_s
        busy = _busy(telemetry.strain(counters, telemetry.counters(machine.root()), own_s))
        ratio = float(f"{median(ratios):.4g}")
        slower = is_slower(ratios, busy)
        if not busy:
            with contextlib.suppress(ExportError):  # a full disk: it is measured again next time
                _fs.write_atomic(file, json.dumps({"ratio": ratio, "slower": slower}).encode())
        return ratio, slower

    def _ratios(self, sides: Sequence[Sequence[Any]]) -> list[float]:
        ratios: list[float] = []
        ends = time.perf_counter() + _RACE_S
        for turn in range(-_WARM_UP, _MOST_ROUNDS):
            seconds = [0.0, 0.0]
            for side in (0, 1) if turn % 2 else (1, 0):
                started = time.perf_counter()
                for session, feed in zip(sides[side], self._feeds, strict=True):
                    session.run(None, dict(feed))
                seconds[side] = time.perf_counter() - started
            if turn >= 0:
                ratios.append(seconds[1] / seconds[0])
            if len(ratios) >= _LEAST_ROUNDS and time.perf_counter() > ends:
                break
        return ratios


def is_slower(ratios: Sequence[float], busy: bool) -> bool:
    """Whether after / before of all rounds speak against a pass."""
    limit = _SLOWER_BUSY if busy else _SLOWER
    return median(ratios) > limit and quantiles(ratios, n=4)[0] > 1


def _busy(strain: telemetry.Strain) -> bool:
    """Whether other processes, or the host, took so much that the next race may end otherwise."""
    return (strain.others_share or 0) > BUSY_SHARE or (strain.steal_share or 0) > BUSY_STEAL


def _session(raw: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # The threads of one graph must not spin while the other runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # As edgekit's own runtime loads it.
    return onnxruntime.InferenceSession(
        raw,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion"],
        enable_fallback=0,  # which prints to stdout, and tries the same again with all optimizers
    )
