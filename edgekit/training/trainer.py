"""The loop that all recipes share: batches, gradients, schedule, averages, checkpoints, early stop.

Knows nothing of what is trained: a Task brings the model, the data and the loss. Everything random
is a function of the seed and the step, so that a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from edgekit.errors import DataError, DivergedError, DoesNotFitError
from edgekit.training import checkpoint, curves, memory, optimizer, schedule
from edgekit.training.average import Average
from edgekit.training.curves import Point
from edgekit.training.settings import Settings

Batch = tuple[torch.Tensor, ...]
Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]


class Data(Protocol):
    """Samples that can be had by number."""

    def __len__(self) -> int: ...

    def batch(self, numbers: torch.Tensor) -> Batch:
        """The samples of ``numbers`` (int64), on the CPU, each tensor with them as its first axis.
        The same numbers give the same batch.
        """
        ...


def _one_a_sample(batch: Batch) -> torch.Tensor:
    return torch.tensor(len(batch[0]))


@dataclass(frozen=True)
class Task:
    """What a recipe gives to ``fit``.

    ``loss(model, batch)`` is the SUM over the batch's terms, in training mode, and ``terms(batch)``
    is how many they are (by default one a sample): so the mean is right however a batch is cut
    into pieces and spread over processes. Augmentation belongs into ``loss``; torch's generator is
    seeded for each step. ``evaluate(model)`` returns figures of held-out data, in evaluation mode,
    "loss" among them. A sample counts as ``units`` of ``unit`` in progress ("images", "tok").
    ``optimizers`` shares the weights among optimizers.
    """

    name: str
    model: torch.nn.Module
    data: Data
    loss: Loss
    evaluate: Callable[[torch.nn.Module], Mapping[str, float]] | None = None
    terms: Callable[[Batch], torch.Tensor] = _one_a_sample
    unit: str = "images"
    units: int = 1
    optimizers: optimizer.Choose = optimizer.adamw


@dataclass(frozen=True)
class Status:
    """What progress shows: where the work stands, and how fast it goes. Before the very first step
    ``memory`` says what a step needs, and there is no loss yet: it is no number then, as while data
    are read. A ``note`` is a sentence on what was found, and no step.
    """

    phase: str
    step: int
    steps: int
    loss: float
    lr: float
    per_s: float
    unit: str
    left_s: float
    memory: str = ""
    note: str = ""


Say = Callable[[Status], None]


@dataclass(frozen=True)
class Fitted:
    """What a task came to. ``state`` is the whole state dict on the CPU, of every process: the
    averaged weights where the settings ask for them, those of the best evaluation where they ask
    for patience. It belongs into a model that is built anew: the task's own may have shards alone.
    ``evaluations`` each have "step" and what Task.evaluate returned; the last one is of ``state``.
    ``needed_bytes`` and ``taken_bytes`` are as in checkpoint.Progress.
    """

    name: str
    state: dict[str, torch.Tensor] = field(repr=False)
    curve: tuple[Point, ...] = field(repr=False)
    evaluations: tuple[dict[str, float], ...]
    steps: int
    seconds: float
    per_s: float
    unit: str
    needed_bytes: int
    taken_bytes: int | None

    @property
    def figures(self) -> dict[str, float]:
        """The last evaluation's."""
        last = self.evaluations[-1] if self.evaluations else {}
        return {name: value for name, value in last.items() if name != "step"}


def fit(task: Task, settings: Settings, place: Path, accelerator: Accelerator, say: Say) -> Fitted:
    """Train ``task``, from the checkpoint in the folder ``place`` where there is one.

    Raises DataError, DoesNotFitError (before the first step where it can be told), DivergedError
    for a loss, an evaluation or weights that are no numbers, OutOfSpaceError for a checkpoint that
    finds no room: the last good checkpoint then still lies in ``place``, and beside it the curve as
    CSV.
    """
    loop = _Loop(task, settings, place, accelerator, say)
    try:
        with _out_of_memory(task, settings):
            return loop.run()
    finally:
        loop.close()


@contextmanager
def _out_of_memory(task: Task, settings: Settings) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        # The allocator of the CPU has no type of its own.
        kinds = (torch.OutOfMemoryError, MemoryError)
        if not isinstance(error, kinds) and "DefaultCPUAllocator" not in str(error):
            raise
        words = str(error).partition("DefaultCPUAllocator: ")[2] or str(error)
        raise DoesNotFitError(
            f"{task.name}: the device ran out of memory: {words[:160].partition(chr(10))[0]}",
            hint=f"--set accumulate={2 * settings.accumulate}; the last checkpoint is kept",
        ) from error


class _Loop:
    def __init__(
        self, task: Task, settings: Settings, place: Path, accelerator: Accelerator, say: Say
    ) -> None:
        self.task, self.settings, self.accelerator, self.say = task, settings, accelerator, say
        self.share, self.rank = accelerator.num_processes, accelerator.process_index
        _check_data(task, settings, self.share)
        self.path, self.best_path = place / "checkpoint.safetensors", place / "best.safetensors"
        self.curve_path = place / curves.name(task.name)
        self.model = _distributed(task.model, settings, accelerator)
        self.optimizers = task.optimizers(self.model, settings)
        self.progress = checkpoint.Progress()
        self.curve: list[Point] = []
        self._begun_s = 0.0
        # Since the last point: sum of the losses, their terms, and the last norm.
        self._sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._terms = torch.zeros_like(self._sum)
        self._norm = torch.zeros_like(self._sum)

    def run(self) -> Fitted:
        resumes = self.path.exists()
        watch = None
        if not resumes:
            self._check_memory()
            watch = memory.Watch(self.accelerator.device)
        self.average = Average(self.model, self.settings.ema)
        if resumes:
            self.progress, curve = checkpoint.load(
                self.path, self.model, self.optimizers, self.average
            )
            self.curve = [tuple(row) for row in curve.tolist()]
        self._begun_s = time.monotonic() - self.progress.seconds
        settings, progress = self.settings, self.progress
        while not progress.done:
            step = progress.step
            self._step(step)
            progress.step = step + 1
            last = progress.step == settings.steps
            if watch and (last or progress.step == 2):  # the optimizer's values come in the first
                progress.taken_bytes, watch = watch.most_bytes(), None
            saves = last or progress.step % settings.checkpoint_every == 0
            evaluates = last or bool(
                settings.eval_every and progress.step % settings.eval_every == 0
            )
            if saves or evaluates or progress.step % settings.log_every == 0:
                self._log()
            if evaluates and self.task.evaluate:
                self._evaluate()
                stops = settings.patience and progress.waited >= settings.patience
                progress.done = bool(stops)
            progress.done |= last
            if saves or progress.done:
                self._save()
        return self._fitted()

    def close(self) -> None:
        """Let go of the optimizers' memory, and of what surrounds the model."""
        self.accelerator.free_memory()

    # A step

    def _step(self, step: int) -> None:
        settings, model = self.settings, self.model
        model.train()
        rate = settings.lr * schedule.factor(settings, step)
        for each in self.optimizers:
            for group in each.param_groups:
                group["lr"] = rate
        _seed(settings.seed, step, self.rank)
        pieces = [self._on_device(each) for each in self._pieces(step)]
        terms = torch.stack([self.task.terms(piece).to(self._sum.device) for piece in pieces]).sum()
        everywhere = self.accelerator.reduce(terms.double(), "sum")
        for each in self.optimizers:
            each.zero_grad(set_to_none=True)
        for number, piece in enumerate(pieces):
            with _gradients_stay_here(model, number < len(pieces) - 1):
                with self._precision():
                    total = self.task.loss(model, piece)
                # The processes' gradients are averaged, and each has the sum of its own terms.
                (total * (self.share / everywhere.clamp(min=1)).to(total.dtype)).backward()
            self._sum += total.detach().double()
        self._terms += terms.double()
        limit = settings.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(_trained(model), limit)
        self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        for each in self.optimizers:
            each.step()
        if self.average:
            self.average.update(step)

    def _pieces(self, step: int) -> Iterator[Batch]:
        """This process's share of the step's samples, in ``accumulate`` pieces.

        The data are gone through in another order each time: sample ``position`` of the run is
        entry ``position % n`` of the order of pass ``position // n``.
        """
        settings, data = self.settings, self.task.data
        count = len(data)
        positions = torch.arange(step * settings.batch, (step + 1) * settings.batch)
        turns, places = positions // count, positions % count
        numbers = torch.cat(
            [
                _order(settings.seed, turn, count)[places[turns == turn]]
                for turn in turns.unique().tolist()
            ]
        )
        for piece in numbers[self.rank :: self.share].tensor_split(settings.accumulate):
            yield data.batch(piece)

    def _precision(self) -> AbstractContextManager[None]:
        """Matrix products in bf16 where the settings say so; weights and sums stay float32."""
        enabled = self.settings.precision == "bf16"
        kind = self.accelerator.device.type
        autocast: AbstractContextManager[None] = torch.autocast(
            kind, dtype=torch.bfloat16, enabled=enabled
        )
        return autocast

    def _on_device(self, batch: Batch) -> Batch:
        return tuple(each.to(self.accelerator.device, non_blocking=True) for each in batch)

    # What surrounds the steps

    def _log(self) -> None:
        """A point of the curve. Raises DivergedError where it is no number."""
        both = self.accelerator.reduce(torch.stack([self._sum, self._terms]), "sum")
        loss, norm = float(both[0] / both[1].clamp(min=1)), float(self._norm)
        progress, settings = self.progress, self.settings
        for what, value in (("loss", loss), ("norm of the gradients", norm)):
            if not math.isfinite(value):
                raise self._diverged(what, value)
        progress.seconds = time.monotonic() - self._begun_s
        rate = self.optimizers[0].param_groups[0]["lr"]
        self.curve.append((progress.step, loss, rate, norm, progress.seconds))
        self._sum.zero_()
        self._terms.zero_()
        if self.accelerator.is_main_process:
            left = settings.steps - progress.step
            each_s = progress.seconds / progress.step
            self.say(
                Status(
                    self.task.name,
                    progress.step,
                    settings.steps,
                    loss,
                    rate,
                    self._per_s(),
                    self.task.unit,
                    left * each_s,
                )
            )

    def _diverged(self, what: str, value: object) -> DivergedError:
        self._show_curve()
        return DivergedError(
            f"{self.task.name}: the {what} is {value} at step {self.progress.step}",
            hint="a lower lr, a longer warmup, or precision=fp32; the last good checkpoint is kept",
        )

    def _per_s(self) -> float:
        done = self.progress.step * self.settings.batch * self.task.units
        return done / max(1e-9, self.progress.seconds)

    def _evaluate(self) -> None:
        """Raises DivergedError where a figure is no number: such a model is never the best one."""
        assert self.task.evaluate is not None
        progress = self.progress
        with self._as_judged():
            found = self.task.evaluate(self.model)
        for name, value in found.items():
            if not math.isfinite(value):
                raise self._diverged(f"held-out {name}", value)
        progress.evaluations.append({"step": progress.step, **found})
        if progress.best is None or found["loss"] < progress.best:
            progress.best, progress.waited = found["loss"], 0
            if self.settings.patience:
                with self._as_judged():
                    state = checkpoint.model_state(self.model)
                if self.accelerator.is_main_process:
                    checkpoint.write(self.best_path, state)
        else:
            progress.waited += 1

    @contextmanager
    def _as_judged(self) -> Iterator[None]:
        """Evaluation mode, with the averaged weights where there are any."""
        self.model.eval()
        with torch.no_grad(), self.average.applied():
            yield
        self.model.train()

    def _save(self) -> None:
        """Raises DivergedError for weights that the last step made no numbers, which no loss has
        told yet.
        """
        # A process may have a shard alone, and all of them must end.
        bad = sum(int((~_own(each).isfinite()).sum()) for each in _trained(self.model))
        wrong = self.accelerator.reduce(torch.tensor(bad, device=self.accelerator.device), "sum")
        if int(wrong):
            raise self._diverged("value of some weights", "not finite")
        checkpoint.save(
            self.path,
            self.progress,
            self.model,
            self.optimizers,
            self.average,
            torch.tensor(self.curve, dtype=torch.float64),
            main=self.accelerator.is_main_process,
        )
        self._show_curve()
        self.accelerator.wait_for_everyone()

    def _show_curve(self) -> None:
        """For eyes alone: what goes on reads the points in the checkpoint."""
        if self.accelerator.is_main_process and self.curve:
            curves.write(self.curve_path, self.curve)

    def _fitted(self) -> Fitted:
        progress = self.progress
        evaluations = list(progress.evaluations)
        if self.settings.patience and self.best_path.exists():
            state = checkpoint.read(self.best_path)[0]
            # The last one is always of what is returned.
            evaluations.append(min(evaluations, key=lambda each: each["loss"]))
        else:
            with self.average.applied():
                state = checkpoint.model_state(self.model, everywhere=True)
        return Fitted(
            name=self.task.name,
            state=state,
            curve=tuple(self.curve),
            evaluations=tuple(evaluations),
            steps=progress.step,
            seconds=progress.seconds,
            per_s=self._per_s(),
            unit=self.task.unit,
            needed_bytes=progress.needed_bytes,
            taken_bytes=progress.taken_bytes,
        )

    def _check_memory(self) -> None:
        batch = self.task.data.batch

        def forward(count: int) -> torch.Tensor:
            numbers = torch.arange(count) % len(self.task.data)
            with _gradients_stay_here(self.model, True), self._precision():
                return self.task.loss(self.model, self._on_device(batch(numbers)))

        self.model.train()
        settings = self.settings
        found = memory.measure(
            self.model,
            forward,
            samples=-(-settings.batch // (self.share * settings.accumulate)),
            averages=bool(settings.ema),
            device=self.accelerator.device,
        )
        found.check(settings.accumulate)
        self.progress.needed_bytes = found.needed
        if self.accelerator.is_main_process:
            none = (math.nan, 0.0, 0.0)
            self.say(
                Status(self.task.name, 0, settings.steps, *none, self.task.unit, 0.0, str(found))
            )


def _check_data(task: Task, settings: Settings, share: int) -> None:
    if len(task.data) == 0:
        raise DataError(f"{task.name}: there is not one sample to train on")
    least = share * settings.accumulate
    if settings.batch < least:
        raise DataError(
            f"a batch of {settings.batch} cannot be cut into {least} pieces"
            f" ({share} processes, accumulate={settings.accumulate})",
            hint=f"--set batch={least}",
        )


def _seed(*parts: int) -> None:
    """Torch's generators, on every device, from numbers alone."""
    torch.manual_seed(_mixed(*parts))


def _mixed(*parts: int) -> int:
    """One 63-bit seed of several numbers, near ones far apart (the finalizer of MurmurHash3)."""
    mixed = 0x9E3779B97F4A7C15
    for part in parts:
        mixed = (mixed ^ part) & 0xFFFFFFFFFFFFFFFF
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            mixed = ((mixed ^ (mixed >> 33)) * factor) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 33
    return mixed >> 1


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> torch.Tensor:
    """The order in which pass ``turn`` goes through the data."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(_mixed(seed, ~turn)))


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


def _own(weight: torch.Tensor) -> torch.Tensor:
    """What of ``weight`` lies in this process."""
    own: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return own.detach()


def _distributed(
    model: torch.nn.Module, settings: Settings, accelerator: Accelerator
) -> torch.nn.Module:
    """On its device; with several processes a copy each, or a shard each."""
    if settings.parallel == "data" or accelerator.num_processes == 1:
        prepared: torch.nn.Module = accelerator.prepare(model)
        return prepared
    # Torch's own, for accelerate's has no shards on CPUs. Blocks of a list first, then the rest.
    from torch.distributed.fsdp import fully_shard

    model = model.to(accelerator.device)
    for weight in model.parameters():  # shards are cut along rows: none may lie channels last
        weight.data = weight.data.contiguous()
    for part in list(model.modules()):
        if isinstance(part, torch.nn.ModuleList):
            for block in part:
                if not isinstance(block, torch.nn.ModuleList):  # a list is never called itself
                    fully_shard(block, reshard_after_forward=True)
    # The root too: whole weights left over from an evaluation would be those of the average.
    return fully_shard(model, reshard_after_forward=True)


@contextmanager
def _gradients_stay_here(model: torch.nn.Module, stay: bool) -> Iterator[None]:
    """All pieces of a batch but the last add up their gradients without asking the others."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not stay)
        yield
    else:
        ddp = isinstance(model, DistributedDataParallel)
        with model.no_sync() if stay and ddp else nullcontext():
            yield
