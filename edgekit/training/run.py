"""A run from its settings to its folder: where its work lies, what is kept, how it goes on.

Knows folders, processes and the report; never what a recipe trains. The work lies in
``<out>.training`` until the folder ``<out>`` appears, whole, in one step.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from edgekit import __version__, _fs, machine
from edgekit.errors import EdgekitError, MissingExtraError, RecipeError, UsageError
from edgekit.formats import json_file
from edgekit.report import machine_facts
from edgekit.training import curves, report, trainer
from edgekit.training.catalogue import CATALOGUE
from edgekit.training.confusion import Confusion
from edgekit.training.report import ClassFigures, Phase, Result, TrainingReport
from edgekit.training.settings import Settings, difference
from edgekit.training.trainer import Fitted, Say, Status, Task

_SETTINGS, _RECIPE = "settings.json", "recipe"
_PACKAGES = ("torch", "accelerate", "safetensors", "numpy")


@dataclass
class Run:
    """An open run. ``work`` is its scratch folder, which lives until the run is finished;
    ``accelerator`` knows the device and the processes.
    """

    recipe: str
    out: Path
    work: Path
    accelerator: Accelerator
    say: Say
    _settings: dict[str, Any]
    _fitted: list[tuple[Fitted, Settings]] = field(default_factory=list)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def shards(self) -> bool:
        """Whether a model that was trained has only a shard of its weights here."""
        return bool(self.accelerator.num_processes > 1 and self._settings["parallel"] == "fsdp")

    def fit(self, task: Task, settings: Settings) -> Fitted:
        """Train ``task``, or take what an earlier start came to. Raises as trainer.fit."""
        fitted = trainer.fit(task, settings, self.work / task.name, self.accelerator, self.say)
        self._fitted.append((fitted, settings))
        return fitted

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """A file or folder of the work that the main process makes once: ``make(partial)``."""
        path = self.work / name
        if self.main and not path.exists():
            with _fs.scratch(path) as folder:
                made = folder / name
                make(made)
                _fs.publish(made, path)
        self.accelerator.wait_for_everyone()
        return path

    def finish(
        self,
        fill: Callable[[Path], None],
        results: Sequence[Result],
        remarks: Sequence[str] = (),
        confusion: Confusion | None = None,
    ) -> TrainingReport:
        """Make the folder of the run: ``fill(folder)`` writes the model, the rest is the report,
        the curves as CSV and, where matplotlib is there, as PNG, and of a classifier what it takes
        for what.
        """
        classes = confusion.classes() if confusion else ()
        remarks = (*remarks, *(confusion.remarks() if confusion else ()))
        made = self._report(results, remarks, classes)
        if self.main:
            with _fs.staged(self.out, owns=report.is_run) as folder:
                fill(folder)
                _fs.write_atomic(folder / report.FILE, made.to_bytes())
                _fs.write_atomic(folder / report.PAGE, report.markdown(made).encode())
                if confusion:
                    confusion.write(folder)
                self._draw(folder)
        self.accelerator.wait_for_everyone()
        return made

    def _draw(self, folder: Path) -> None:
        fitted = [each for each, _ in self._fitted]
        for each in fitted:
            curves.write(folder / curves.name(each.name), each.curve)
        if not fitted:
            return  # nothing was trained
        try:
            curves.draw(
                folder / "curves.png",
                {each.name: each.curve for each in fitted},
                {each.name: each.evaluations for each in fitted},
            )
        except MissingExtraError:
            return  # the CSV files hold the same

    def _report(
        self, results: Sequence[Result], remarks: Sequence[str], classes: tuple[ClassFigures, ...]
    ) -> TrainingReport:
        return TrainingReport(
            recipe=self.recipe,
            about=CATALOGUE[self.recipe].about if self.recipe in CATALOGUE else "",
            settings=self._settings,
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            edgekit=__version__,
            versions={"python": platform.python_version()} | {n: version(n) for n in _PACKAGES},
            machine=machine_facts(machine.root()),
            processes=self.accelerator.num_processes,
            device=_device_name(self.accelerator.device),
            phases=tuple(
                Phase(
                    each.name,
                    each.steps,
                    each.steps * settings.batch,
                    each.seconds,
                    each.per_s,
                    each.unit,
                    each.figures,
                    each.needed_bytes,
                    each.taken_bytes,
                )
                for each, settings in self._fitted
            ),
            results=tuple(results),
            remarks=(*remarks, *self._stopped_early()),
            classes=classes,
        )

    def _stopped_early(self) -> list[str]:
        return [
            f"{each.name} ended after {each.steps:,} of {settings.steps:,} steps:"
            f" {settings.patience} evaluations without a better loss; it has the best one's weights"
            for each, settings in self._fitted
            if each.steps < settings.steps
        ]


@contextmanager
def strictly_repeatable() -> Iterator[None]:
    """Inside, torch refuses what has no deterministic form on the device, where it otherwise warns.
    For attention on CUDA this decides more: torch has both forms of its backward pass there, and
    takes the deterministic one only when it may refuse.
    """
    was = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=was)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    count = torch.get_num_threads()
    return f"{count} {'thread' if count == 1 else 'threads'} of the CPU"


@contextmanager
def opened(recipe: str, settings: Settings, out: Path, *, resume: bool, say: Say) -> Iterator[Run]:
    """A run into the folder ``out``. With ``resume`` it goes on where an earlier one was stopped,
    or starts where there is none; without it, what an unfinished one left is in the way.

    When the block ends well, the scratch folder goes. When it raises, the checkpoints stay; where
    nothing was done yet, as with a model that does not exist, nothing stays.
    Raises UsageError, RecipeError where the settings are not those of the run that is to go on.
    """
    work = out.with_name(out.name + ".training")
    accelerator = _accelerator(settings)
    if out.exists() and not report.is_run(out):
        raise UsageError(
            f"{out} exists and is no training run", hint="choose another --out, or move it away"
        )
    hears = say if accelerator.is_main_process else _nobody
    with ExitStack() as held:
        if accelerator.is_main_process:
            with _fs.disk_errors(work):
                work.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(_fs.locked(work))
            _begin(work, recipe, settings, resume)
        accelerator.wait_for_everyone()
        hears(_note(f"trains on {_device_name(accelerator.device)}"))
        if out.exists():
            hears(_note(f"{out} holds a finished run: this one takes its place when it ends"))
        try:
            yield Run(recipe, out, work, accelerator, hears, settings.to_dict())
        except EdgekitError:
            if accelerator.is_main_process and os.listdir(work) == [_SETTINGS]:
                _fs.remove_tree(work)
            raise
        if accelerator.is_main_process:
            _fs.remove_tree(work)


def _nobody(status: Status) -> None:
    """Hears what is said."""


def _note(words: str) -> Status:
    return Status("run", 0, 0, math.nan, math.nan, 0.0, "", 0.0, note=words)


def stored(recipe: str, out: Path) -> dict[str, Any] | None:
    """The settings of the unfinished run for ``out``, None where there is none.

    Raises UsageError where it is one of another recipe.
    """
    path = out.with_name(out.name + ".training") / _SETTINGS
    return _stored(recipe, path) if path.is_file() else None


def _stored(recipe: str, path: Path) -> dict[str, Any]:
    body = dict(json_file.read(path))
    _check_recipe(body.pop(_RECIPE, recipe), recipe, path.parent)
    return body


def _check_recipe(its: str, recipe: str, place: Path) -> None:
    if its != recipe:
        raise UsageError(
            f"{place} holds a run of the recipe {its}, not of {recipe}",
            hint=f"another --out, or: edgekit train {its} --resume",
        )


def finished(recipe: str, out: Path) -> dict[str, Any] | None:
    """The report of the finished run in ``out``, None where there is none. Raises as ``stored``."""
    if not report.is_run(out):
        return None
    body = report.read(out)
    _check_recipe(body.get("recipe", recipe), recipe, out)
    return body


def _begin(work: Path, recipe: str, settings: Settings, resume: bool) -> None:
    path = work / _SETTINGS
    if path.is_file() and (resume or os.listdir(work) != [_SETTINGS]):  # else nothing was done yet
        if not resume:
            raise UsageError(
                f"{work} holds an unfinished run", hint="--resume goes on with it, or remove it"
            )
        if other := difference(_stored(recipe, path), settings.to_dict()):
            raise RecipeError(
                f"the run in {work} has other settings: {other}",
                hint="--resume without --set takes those of the run",
            )
        return
    body = {_RECIPE: recipe, **settings.to_dict()}
    _fs.write_atomic(path, (json.dumps(body, indent=1) + "\n").encode())


def _accelerator(settings: Settings) -> Accelerator:
    """One for each run; the same numbers each time, on the CPU and on a GPU."""
    if settings.device == "gpu" and not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        raise RecipeError(
            "torch sees no GPU here" if built else "torch is installed here without its GPU part",
            hint="device=cpu trains on the CPU" if built else "a torch with CUDA or ROCm in it",
        )
    # What makes matrix products on a GPU repeatable (torch's notes on reproducibility).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Or torch fills whatever it allocates, for those who read what nobody wrote: 5% of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if settings.threads:
        torch.set_num_threads(settings.threads)
    made = Accelerator(cpu=settings.device == "cpu" or not torch.cuda.is_available())
    # accelerate's launcher sets both where it was asked for several processes on CPUs, which it
    # leaves to MPI: without, it starts one, and says nothing.
    asked = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if asked and made.num_processes == 1:
        raise UsageError(
            "the launcher was asked for several processes and has started one",
            hint="on CPUs: torchrun --nproc_per_node 2 -m edgekit train ...",
        )
    return made
