"""Recipe: a network found by a search: accuracy against latency on a board, and memory.

Optuna proposes networks, workers train them in short, those that fall behind at a rung are stopped,
and after so many hours the fastest of the best is trained in full, beside a network that was drawn
by hand. Latency is known before a trial is trained: the sum of its convolutions, measured here once
each, or predicted for a board.

Knows the space of networks and the order of the work; never the study (``search``) or how a trial
is trained (``search_worker``).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edgekit import _fs, _proc, plan_memory
from edgekit.errors import EngineCrashedError, MissingExtraError, RecipeError, TrainError
from edgekit.plan import profile_of
from edgekit.training import (
    classify,
    confusion,
    deploy,
    residual,
    search,
    trained_residual,
)
from edgekit.training.convolution_time import Measured, Predicted, Times, total_ms
from edgekit.training.images import Images, Labelled
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run
from edgekit.training.search import Search, Tried
from edgekit.training.settings import setting
from edgekit.training.trained_residual import Trained, weights
from edgekit.training.trainer import Status, Task
from edgekit.vision_cost import VisionCost

_START_S, _OPEN_S, _GRACE_S = 120, 300, 600
_CHECKED = 5  # networks of the front whose whole graphs are measured


@dataclass(frozen=True)
class NasSettings(classify.ClassifierSettings):
    """The space, the clock and the data; the defaults are for Fashion-MNIST. ``steps`` are those of
    the network that is chosen, and of the one drawn by hand.
    """

    hours: float = setting(0.4, "of search, over all starts together")
    workers: int = setting(1, "trials at a time, each on a thread of its own")
    board: str = setting("", "a device profile that tells the latency; empty: measured here")
    stages: int = setting(3, "of a network; each but the first halves the sides")
    widest: int = setting(96, "most channels of a stage")
    most_blocks: int = setting(2, "most blocks of a stage")
    trial_steps: int = setting(150, "steps of a trial that is not stopped")
    trial_batch: int = setting(64, "samples of a trial's step")
    trial_lr: float = setting(4e-3, "highest learning rate of a trial")
    rungs: int = setting(3, "times that a trial is looked at")
    keep: float = setting(0.5, "share of the trials at a rung that go on")
    give: float = setting(0.005, "accuracy that is given up for speed when one is chosen")
    slowest: float = setting(
        3.0, "proposals that take so many times what the one drawn by hand takes are not trained"
    )
    max_ms: float = setting(0.0, "slowest network that may be chosen; 0: any")
    baseline: bool = setting(True, "train a network that was drawn by hand too")
    held_images: int = setting(
        0, "of these, that the search judges by, and none trains on; 0: a fifth, 2,000 at most"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.hours > 0 and self.workers > 0 and self.stages > 0 and self.most_blocks > 0):
            raise RecipeError("hours, workers, stages and most_blocks must be more than 0")
        if self.widest < 16 or self.widest % 8:
            raise RecipeError("widest is a multiple of 8, and 16 at least")
        if not 0 < self.rungs <= self.trial_steps or not 0 < self.keep <= 1:
            raise RecipeError("rungs are 1 to trial_steps, keep is a share")
        if min(self.trial_batch, self.slowest) <= 0:
            raise RecipeError("trial_batch and slowest must be more than 0")
        if self.give < 0 or self.max_ms < 0:
            raise RecipeError("give and max_ms must not be negative")


def run(run: Run, settings: NasSettings) -> TrainingReport:
    """Search, choose, train what was chosen; the study lies beside it in the folder."""
    if run.accelerator.num_processes > 1:
        raise RecipeError("nas has workers of its own", hint="start it as one process")
    data = classify.load(settings, run.say)
    train, _ = data.train.share(settings.train_images).parted(settings.held_images)
    work = _Work(run, settings, data, train, data.test.share(settings.test_images))
    times: Times = Predicted(profile_of(settings.board)) if settings.board else Measured()
    found = Search(
        run.work / "study.db", seed=settings.seed, describe=partial(work.describe, times)
    )
    most_ms = settings.slowest * work.describe(times, work.by_hand())[0]
    work.search(found, most_ms)
    trials, spent_s = found.trials(), found.spent_s
    chosen = work.choose(trials)
    configs = {"found": work.config(chosen.params)}
    if settings.baseline:
        configs["by-hand"] = work.by_hand()
    models = {name: work.trained(name, config) for name, config in configs.items()}

    timed: dict[str, dict[str, float]] = {}
    if settings.latency:
        timed = deploy.figures(run, {name: partial(m.fill, data) for name, m in models.items()})
    results = []
    for name, model in models.items():
        ms, size_bytes = work.describe(times, model.config)
        own = {
            "parameters": float(model.parameters),
            "memory_bytes": size_bytes,
            "convolutions_ms": ms,
        }
        results.append(Result(name, {**own, **model.figures, **timed.get(name, {})}))

    def fill(folder: Path) -> None:
        models["found"].fill(data, folder)
        _fs.write_atomic(folder / "study.db", (run.work / "study.db").read_bytes())
        search.write(folder / "trials.csv", trials)
        with suppress(MissingExtraError):  # the table holds the same
            search.draw(folder / "front.png", trials, chosen, where=work.clock)

    taken = confusion.of(models["found"].network(), data, work.train, work.test)
    remarks = work.remarks(trials, chosen, models, times, spent_s)
    return run.finish(fill, results, remarks, taken)


@dataclass(frozen=True)
class _Work:
    run: Run
    settings: NasSettings
    data: Labelled
    train: Images
    test: Images

    # The space

    def suggest(self, trial: Any) -> dict[str, Any]:
        """A network of the space, drawn by Optuna's ``trial``."""
        settings = self.settings
        params: dict[str, Any] = {}
        for stage in range(settings.stages):
            params |= {
                f"kind{stage}": trial.suggest_categorical(f"kind{stage}", ["basic", "inverted"]),
                f"kernel{stage}": trial.suggest_categorical(f"kernel{stage}", [3, 5]),
                f"width{stage}": trial.suggest_int(f"width{stage}", 8, settings.widest, step=8),
                f"blocks{stage}": trial.suggest_int(f"blocks{stage}", 1, settings.most_blocks),
                f"expand{stage}": trial.suggest_int(f"expand{stage}", 1, 3),
            }
        return self.config(params)

    def config(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The network's config that a trial's parameters stand for."""
        stages = range(self.settings.stages)
        parts = [
            residual.config(
                self.data.shape,
                len(self.data.labels),
                kind=params[f"kind{n}"],
                widths=[params[f"width{n}"]] * self.settings.stages,
                blocks=[params[f"blocks{n}"]] * self.settings.stages,
                expand=params[f"expand{n}"],
                kernel=params[f"kernel{n}"],
            )
            for n in stages
        ]
        return parts[0] | {"stages": [part["stages"][n] for n, part in enumerate(parts)]}

    def by_hand(self) -> dict[str, Any]:
        """ResNet's way: each stage twice as wide as the one before, two blocks each."""
        settings = self.settings
        widths = [max(8, settings.widest >> n) for n in reversed(range(settings.stages))]
        blocks = [min(2, settings.most_blocks)] * settings.stages
        return residual.config(
            self.data.shape, len(self.data.labels), kind="basic", widths=widths, blocks=blocks
        )

    @property
    def clock(self) -> str:
        board = self.settings.board
        return f"predicted for {board}" if board else "sum of convolutions measured here"

    def describe(self, times: Times, config: Mapping[str, Any]) -> tuple[float, float]:
        """Milliseconds, and bytes of weights and of activations that live at one time."""
        layers = list(residual.convolutions(config, self.data.shape))
        costs = [layer.cost for layer in layers]
        whole = VisionCost(
            flops=math.fsum(each.flops for each in costs),
            activations=math.fsum(each.activations for each in costs),
            weights=math.fsum(each.weights for each in costs),
            peak=max(each.peak for each in costs),
            operators=len(costs),
        )
        memory = plan_memory.of_vision(whole, int8=False, available=0)
        return total_ms(times, layers), float(memory.weights + memory.compute)

    # The search

    def search(self, found: Search, most_ms: float) -> None:
        """Trials until the hours are over; slower ones than ``most_ms`` are not trained. Raises
        TrainError where none came to its end.
        """
        until_s = 3600 * self.settings.hours
        if found.spent_s < until_s:
            workers = [
                _proc.Worker(
                    "edgekit.training.search_worker:serve", timeout_s=_START_S, what="a worker"
                )
                for _ in range(self.settings.workers)
            ]
            try:
                limits = until_s, most_ms
                with ThreadPoolExecutor(len(workers)) as threads:
                    ends = [threads.submit(self._work, each, found, *limits) for each in workers]
                    try:
                        for end in as_completed(ends):
                            end.result()
                    except BaseException:  # the others must not go on for hours
                        for each in workers:
                            each.close()
                        raise
                found.end()
            finally:
                for each in workers:
                    each.close()
        if not any(each.end == "complete" for each in found.trials()):
            raise TrainError(
                f"not one trial came to its end in {self.settings.hours:g} hours",
                hint="fewer trial_steps, a higher slowest or more hours, with another --out",
            )

    def _work(self, worker: _proc.Worker, found: Search, until_s: float, most_ms: float) -> None:
        """What keeps one worker busy: trial after trial."""
        settings = self.settings
        asked = partial(_asked, worker)
        asked(
            "open",
            _OPEN_S,
            data={"data": settings.data, "side": settings.side, "channels": settings.channels},
            parts={"train": settings.train_images, "held": settings.held_images},
            loss={
                "smoothing": settings.smoothing,
                "shift": settings.shift,
                "flip": settings.flip,
            },
        )
        found.begin()
        while (left_s := until_s - found.spent_s) > 0:
            number, config, standing = found.ask(self.suggest)
            if standing.ms > most_ms:
                found.tell(number, [], "pruned")  # training costs in proportion
                continue
            begun_s = time.monotonic()
            ended = asked(
                "train",
                left_s + _GRACE_S,
                config=config,
                settings=self._of_trial(),
                rungs=self._rungs(found),
                standing=list(asdict(standing).values()),
                keep=settings.keep,
                left_s=left_s,
            )
            found.tell(number, ended["rungs"], ended["end"])
            self._say(found, number, ended, time.monotonic() - begun_s)

    def _of_trial(self) -> dict[str, Any]:
        """The settings of a trial's training that are not the shared defaults."""
        settings = self.settings
        return {
            "seed": settings.seed,
            "steps": settings.trial_steps,
            "batch": settings.trial_batch,
            "lr": settings.trial_lr,
            "weight_decay": settings.weight_decay,
            "precision": settings.precision,
            "eval_every": max(1, settings.trial_steps // settings.rungs),
            "checkpoint_every": settings.trial_steps,
            "threads": 1,
            "device": settings.device,
        }

    def _rungs(self, found: Search) -> list[dict[str, Any]]:
        every = max(1, self.settings.trial_steps // self.settings.rungs)
        count = -(-self.settings.trial_steps // every)
        return [
            {
                "step": min((rung + 1) * every, self.settings.trial_steps),
                "rivals": [list(asdict(each).values()) for each in found.rivals(rung)],
            }
            for rung in range(count)
        ]

    def _say(self, found: Search, number: int, ended: dict[str, Any], took_s: float) -> None:
        """Progress: trials for steps, and the share of wrong answers for a loss."""
        last = ended["rungs"][-1] if ended["rungs"] else 0.0
        left_s = max(0.0, 3600 * self.settings.hours - found.spent_s)
        more = round(left_s / max(0.1, took_s)) * self.settings.workers
        status = Status(
            "search", number + 1, number + 1 + more, 1 - last, 0.0, 1 / took_s, "trials", left_s
        )
        self.run.say(status)

    def choose(self, trials: Sequence[Tried]) -> Tried:
        """Raises TrainError where none is as fast as asked for."""
        most = self.settings.max_ms or math.inf
        fast = [each for each in trials if each.standing.ms <= most]
        if not any(each.end == "complete" for each in fast):
            raise TrainError(
                f"no trial takes at most {most:g} ms", hint="a higher max_ms, with another --out"
            )
        return search.winner(fast, self.settings.give)

    # What was found

    def trained(self, name: str, config: dict[str, Any]) -> Trained:
        settings = self.settings
        torch.manual_seed(settings.seed)
        network = residual.build(config).to(memory_format=torch.channels_last)
        loss = classify.loss_of(
            self.data, smoothing=settings.smoothing, shift=settings.shift, flip=settings.flip
        )
        evaluate = classify.evaluation(self.data, self.test)
        fitted = self.run.fit(Task(name, network, self.train, loss, evaluate), settings)
        return Trained(config, weights(self.run, fitted), fitted.figures)

    def remarks(
        self,
        trials: Sequence[Tried],
        chosen: Tried,
        models: Mapping[str, Trained],
        times: Times,
        spent_s: float,
    ) -> list[str]:
        """What the table does not say."""
        ends = [each.end for each in trials if each.rungs or each.end == "fail"]
        found = [
            f"{len(trials)} trials in {spent_s / 3600:.2f} hours: {ends.count('complete')} to the"
            f" end, {ends.count('pruned')} stopped at a rung, {ends.count('fail')} cut off,"
            f" {len(trials) - len(ends)} too slow to be worth training",
            f"chosen: trial {chosen.number}, the fastest within {100 * self.settings.give:g} points"
            f" of the best, {self.clock}",
            "found: " + "; ".join(map(_stage, models["found"].config["stages"])),
        ]
        if "by-hand" in models:
            pairs = [("found", "by-hand")]
            found += trained_residual.compared(models, pairs, self.data, self.test)
        if self.settings.latency and not self.settings.board:
            found.append(self._checked(trials, times))
        return found

    def _checked(self, trials: Sequence[Tried], times: Times) -> str:
        """Whole graphs of the front beside the sums that the search went by."""
        front = search.front(trials)
        some = front[:: max(1, len(front) // _CHECKED)][:_CHECKED]
        configs = {f"trial-{each.number}": self.config(each.params) for each in some}
        fills = {
            name: partial(Trained(c, residual.build(c).state_dict(), {}).fill, self.data)
            for name, c in configs.items()
        }
        timed = deploy.figures(self.run, fills, turns=2)
        ratios = [
            timed[name]["latency_ms"] / self.describe(times, config)[0]
            for name, config in configs.items()
        ]
        return (
            f"whole graphs of {len(ratios)} networks of the front take"
            f" {min(ratios):.2f} to {max(ratios):.2f} times the sum of their convolutions"
            f" (median {statistics.median(ratios):.2f})"
        )


def _asked(worker: _proc.Worker, call: str, timeout_s: float, **arguments: Any) -> Any:
    answer = worker.ask({"call": call, "arguments": arguments}, timeout_s=timeout_s)
    if answer is None:
        raise EngineCrashedError(
            f"a worker of the search died or hung while it did '{call}'",
            hint="a process that dies at once is often out of memory; --resume goes on",
        )
    return _proc.value_of(answer)


def _stage(stage: Mapping[str, Any]) -> str:
    inner = " ".join(map(str, stage["inner"]))
    return f"{stage['kind']} {stage['kernel']}x{stage['kernel']}, {stage['width']} ({inner})"


RECIPE = Recipe(
    "nas",
    NasSettings(
        steps=600,
        batch=128,
        lr=4e-3,
        ema=0.998,
        checkpoint_every=100,
        weight_decay=0.05,
        precision="bf16",
    ),
    run,
)
