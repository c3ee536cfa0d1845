"""A search for networks: a study in SQLite, its trials, and which of them are worth going on.

Knows trials, objectives and clocks; never how a network is trained or timed. Objectives are
held-out accuracy (more is better), milliseconds and bytes (less is).
"""

from __future__ import annotations

import csv
import io
import json
import math
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from edgekit import _fs, plot
from edgekit.errors import CorruptArtifactError, ExportError, OutOfSpaceError

_STUDY = "search"
_SPENT, _RUNGS, _MS, _BYTES = "spent_s", "rungs", "latency_ms", "memory_bytes"
_AGAIN = "again"
_DIRECTIONS = ("maximize", "minimize", "minimize")
_FIRST = 8  # trials at random, before what was found decides where to look


@dataclass(frozen=True)
class Standing:
    """What a network is judged by."""

    accuracy: float
    ms: float
    memory_bytes: float

    def beats(self, other: Standing) -> bool:
        """At least as good in everything, and better in something (Pareto dominance)."""
        mine, its = ((each.accuracy, -each.ms, -each.memory_bytes) for each in (self, other))
        return mine != its and all(a >= b for a, b in zip(mine, its, strict=True))


@dataclass(frozen=True)
class Tried:
    """A trial. ``rungs`` are its held-out accuracies so far; ``end`` is "complete", "pruned" (it
    was not worth going on) or "fail" (it was cut off).
    """

    number: int
    params: dict[str, Any]
    standing: Standing
    rungs: tuple[float, ...]
    end: str


def ranks(standings: Sequence[Standing]) -> list[int]:
    """The front that each is on: 0 is beaten by none, 1 by those of front 0 alone, and so on (Deb
    et al. 2002, "NSGA-II", section III A).
    """
    left, found = set(range(len(standings))), [0] * len(standings)
    front = 0
    while left:
        best = {
            one for one in left if not any(standings[other].beats(standings[one]) for other in left)
        }
        for one in best:
            found[one] = front
        left -= best
        front += 1
    return found


def goes_on(own: Standing, rivals: Sequence[Standing], keep: float) -> bool:
    """Whether a trial at a rung is among the share ``keep`` of those that came so far, by their
    fronts (Schmucker et al. 2021, "Multi-objective Asynchronous Successive Halving",
    https://arxiv.org/abs/2106.12639).
    """
    found = ranks([*rivals, own])
    better = sum(rank < found[-1] for rank in found)
    return better < math.ceil(keep * len(found))


class Search:
    """A study in the file ``path``, opened or begun. Many threads may work on it.

    ``describe(params)`` gives milliseconds and bytes of the network that ``params`` stand for.
    All of it raises OutOfSpaceError, ExportError where the disk takes no more, and
    CorruptArtifactError for a file that is no study; trials that had ended by then are kept.
    """

    def __init__(
        self, path: Path, *, seed: int, describe: Callable[[Any], tuple[float, float]]
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._path = path
        self._describe = describe
        self._lock = threading.RLock()
        self._open: dict[int, Any] = {}
        self._begun_s: float | None = None
        with self._stored():
            self._study = _study(path, seed)
            # Another start must not repeat the random numbers of the first.
            self._study.sampler.reseed_rng()
            self._spent_s = float(self._study.user_attrs.get(_SPENT, 0.0))
            self._revive()

    @contextmanager
    def _stored(self) -> Iterator[None]:
        """One thread at a time; what SQLite says of the disk becomes an error of ours."""
        with self._lock:
            try:
                yield
            except Exception as error:  # Optuna wraps what SQLAlchemy wrapped
                if found := _of_sqlite(error):
                    raise _typed(self._path, found) from error
                raise

    def _revive(self) -> None:
        """Trials that a killed run left in the middle are begun again; once, for one of them may
        have been what killed it.
        """
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            if not trial.user_attrs.get(_AGAIN):
                self._study.enqueue_trial(trial.params, user_attrs={_AGAIN: True})

    @property
    def spent_s(self) -> float:
        """Seconds of search, those of earlier starts too."""
        own_s = 0.0 if self._begun_s is None else time.monotonic() - self._begun_s
        return self._spent_s + own_s

    def begin(self) -> None:
        """Start the clock, when the first worker is ready."""
        with self._lock:
            self._begun_s = self._begun_s or time.monotonic()

    def end(self) -> None:
        """Keep the time that was spent: what is chosen now must be chosen after a kill too."""
        with self._stored():
            self._study.set_user_attr(_SPENT, self.spent_s)

    def ask(self, suggest: Callable[[Any], Any]) -> tuple[int, Any, Standing]:
        """A new trial: its number, what ``suggest`` makes of it, and what is known before it is
        trained; its accuracy is 0.
        """
        with self._stored():
            trial = self._study.ask()
            made = suggest(trial)
            ms, size_bytes = self._describe(made)
            trial.set_user_attr(_MS, ms)
            trial.set_user_attr(_BYTES, size_bytes)
            self._open[trial.number] = trial
            return trial.number, made, Standing(0.0, ms, size_bytes)

    def rivals(self, rung: int) -> list[Standing]:
        """How those stand that came to ``rung``, from 0."""
        return [
            Standing(each.rungs[rung], each.standing.ms, each.standing.memory_bytes)
            for each in self.trials()
            if len(each.rungs) > rung
        ]

    def tell(self, number: int, rungs: Sequence[float], end: str) -> None:
        """How a trial went: "complete" takes the last of ``rungs`` as its accuracy."""
        with self._stored():
            trial = self._open.pop(number)
            trial.set_user_attr(_RUNGS, list(rungs))
            values = None
            if end == "complete":
                values = [rungs[-1], trial.user_attrs[_MS], trial.user_attrs[_BYTES]]
            self._study.tell(trial, values, state=TrialState[end.upper()])
            self._study.set_user_attr(_SPENT, self.spent_s)

    def trials(self) -> list[Tried]:
        """All that have ended, in order."""
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        with self._stored():
            ended = self._study.get_trials(deepcopy=False, states=states)
        return [
            Tried(
                trial.number,
                dict(trial.params),
                Standing(
                    ([0.0, *trial.user_attrs.get(_RUNGS, ())])[-1],
                    trial.user_attrs[_MS],
                    trial.user_attrs[_BYTES],
                ),
                tuple(trial.user_attrs.get(_RUNGS, ())),
                trial.state.name.lower(),
            )
            for trial in ended
            if _MS in trial.user_attrs
        ]


def _study(path: Path, seed: int) -> Any:
    """The study in ``path``, which appears whole: of a table whose index a kill kept from being
    made, Optuna would take a second study of the same name, and the first one's trials were lost.
    """
    if not path.exists():
        with _fs.scratch(path) as folder:
            storage = optuna.storages.RDBStorage(f"sqlite:///{folder / path.name}")
            optuna.create_study(storage=storage, study_name=_STUDY, directions=_DIRECTIONS)
            storage.remove_session()
            storage.engine.dispose()
            _fs.publish(folder / path.name, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=_FIRST,
            multivariate=True,
            constant_liar=True,  # several at a time look in different places
        )
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    return optuna.load_study(study_name=_STUDY, storage=storage, sampler=sampler)


def _of_sqlite(error: BaseException) -> sqlite3.Error | None:
    """What SQLite itself said, however libraries wrapped it."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, sqlite3.Error):
        found = found.__cause__ or found.__context__
    return found


def _typed(path: Path, error: sqlite3.Error) -> CorruptArtifactError | ExportError:
    code = getattr(error, "sqlite_errorname", "")  # errors of the module itself have none
    if code == "SQLITE_FULL":
        return OutOfSpaceError(
            f"the disk filled up while writing {path}",
            hint="free some space and run it again with --resume",
        )
    if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return CorruptArtifactError(
            f"{path} is no study of a search: {error}", hint="remove it: the search starts again"
        )
    return ExportError(
        f"cannot write {path}: {error}",
        hint="make the place writable and run it again with --resume, or choose another --out",
    )


def front(trials: Sequence[Tried]) -> list[Tried]:
    """Of those that were trained to the end, the ones that none beats; the fastest first."""
    whole = [each for each in trials if each.end == "complete"]
    places = ranks([each.standing for each in whole])
    best = [each for each, place in zip(whole, places, strict=True) if not place]
    return sorted(best, key=lambda each: each.standing.ms)


def winner(trials: Sequence[Tried], give: float) -> Tried:
    """The fastest whose accuracy is within ``give`` of the best; there must be a complete one."""
    whole = front(trials)
    best = max(each.standing.accuracy for each in whole)
    return next(each for each in whole if each.standing.accuracy >= best - give)


def write(path: Path, trials: Sequence[Tried]) -> None:
    """A CSV file, one line a trial."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("number", "end", "accuracy", _MS, _BYTES, _RUNGS, "params"))
    for each in trials:
        standing = (each.standing.accuracy, each.standing.ms, each.standing.memory_bytes)
        table.writerow((each.number, each.end, *standing, len(each.rungs), _plain(each.params)))
    _fs.write_atomic(path, text.getvalue().encode())


def _plain(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(params), sort_keys=True)


def draw(path: Path, trials: Sequence[Tried], chosen: Tried, *, where: str) -> None:
    """Accuracy over latency: all trials, the front, and the chosen one; ``where`` names the clock.

    Raises MissingExtraError without matplotlib.
    """
    with plot.figure(path, height_in=4.5) as figure:
        axes = figure.add_subplot()
        groups = {
            "stopped early": [t for t in trials if t.end == "pruned" and t.rungs],
            "trained to the end": [t for t in trials if t.end == "complete"],
        }
        for (label, some), (marker, colour) in zip(
            groups.items(), (("x", plot.COLOURS[5]), ("o", plot.COLOURS[0])), strict=True
        ):
            axes.scatter(
                [t.standing.ms for t in some],
                [100 * t.standing.accuracy for t in some],
                s=[12 + t.standing.memory_bytes / 20e3 for t in some] if marker == "o" else 16,
                marker=marker,
                color=colour,
                linewidths=1,
                alpha=0.8,
                label=label,
            )
        # In the plane of the picture, where memory does not count.
        flat = [
            Tried(
                t.number,
                t.params,
                Standing(t.standing.accuracy, t.standing.ms, 0.0),
                t.rungs,
                t.end,
            )
            for t in trials
        ]
        best = front(flat)
        axes.plot(
            [t.standing.ms for t in best],
            [100 * t.standing.accuracy for t in best],
            color=plot.COLOURS[0],
            linewidth=1,
            label="front",
        )
        axes.plot(
            chosen.standing.ms,
            100 * chosen.standing.accuracy,
            "*",
            markersize=16,
            color=plot.COLOURS[3],
            label=f"chosen (trial {chosen.number})",
        )
        axes.set_xscale("log")
        ticks = plot.round_numbers(*axes.get_xlim())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(f"latency, ms, {where}; larger points take more memory")
        axes.set_ylabel("held-out accuracy, %")
        axes.legend()
