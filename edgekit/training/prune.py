"""Recipe: a convolutional network cut down to a latency, channel by channel, and tuned again.

Knows the order of the work: train, look which channels matter, cut, tune, cut again. The baseline
is the same network uncut, tuned for as many steps; the cut one learns from its answers too. Weights
set to zero one by one, and two of every four, are tuned alike: to show what a sparsity is worth
that no engine here makes use of.

Never knows how channels hang together (``channel_groups``), which to give up (``channel_choice``),
or how long a convolution takes (``convolution_time``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from edgekit.errors import MissingExtraError, RecipeError
from edgekit.plan import profile_of
from edgekit.training import (
    channel_choice,
    channel_groups,
    classify,
    confusion,
    deploy,
    distillation,
    residual,
    sensitivity_scan,
    sparsity,
    trained_residual,
)
from edgekit.training.channel_choice import Choice
from edgekit.training.channel_groups import ChannelGroup, Criterion
from edgekit.training.convolution_time import Measured, Predicted, Times, total_ms
from edgekit.training.images import Images, Labelled
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run
from edgekit.training.settings import Settings, setting
from edgekit.training.trained_residual import State, Trained, loaded, weights
from edgekit.training.trainer import Batch, Fitted, Loss, Task

HEAD = "head"  # the layer whose outputs are the classes
UNCUT = "unpruned"
_CRITERIA: tuple[Criterion, ...] = ("l1", "taylor", "bn", "activation")
_SCORE_BATCH = 128
_TRIES, _SPEED_TURNS = 5, 3
_NEAR, _ENOUGH = 0.98, 1.05  # of the speed that is asked for


@dataclass(frozen=True)
class PruneSettings(classify.ClassifierSettings):
    """The network, the data, and how far to cut; the defaults are for Fashion-MNIST."""

    base: str = setting("", "folder of a network that prune or distill left; empty: trained here")
    kind: Literal["basic", "inverted"] = setting("basic", "blocks of ResNet, or of MobileNetV2")
    widths: tuple[int, ...] = setting((32, 64, 128), "channels of each stage")
    blocks: tuple[int, ...] = setting((1, 1, 1), "blocks of each stage")
    expand: float = setting(1.0, "how many times as wide a block is inside")
    held_images: int = setting(
        0, "of these, that choices are made by, and none trains on; 0: a fifth, 2,000 at most"
    )
    speedup: float = setting(2.1, "times as fast as the uncut network")
    board: str = setting("", "a device profile that tells the latency; empty: measured here")
    criterion: Literal["l1", "taylor", "bn", "activation"] = setting(
        "taylor", "what makes a channel matter"
    )
    rounds: int = setting(3, "cut and tuned so many times, each an equal factor faster")
    tune_steps: int = setting(1800, "steps of tuning, in all rounds together")
    round_share: float = setting(
        0.1, "share of these in each round but the last, that has the rest"
    )
    tune_lr: float = setting(3e-3, "highest learning rate of the tuning")
    answers: float = setting(0.7, "weight of the uncut network's answers; labels have the rest")
    temperature: float = setting(2.0, "that softens these answers")
    chunk: int = setting(8, "channels that are cut at once")
    least: float = setting(0.25, "share of its channels that every layer keeps")
    score_batches: int = setting(8, "batches of 128 that channels are scored by")
    sparse: bool = setting(True, "tune with zeros too: unstructured, and 2 of every 4")
    sparsity: float = setting(0.8, "share of zeros, where they may stand anywhere")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.speedup <= 1 or self.rounds < 1 or self.chunk < 1 or self.score_batches < 1:
            raise RecipeError("speedup is more than 1; rounds, chunk and score_batches at least 1")
        if not 0 < self.sparsity < 1:
            raise RecipeError("sparsity is a share between 0 and 1")
        if not (0 <= self.answers <= 1 and self.temperature > 0 and 0 <= self.least < 1):
            raise RecipeError("answers and least are shares, temperature is more than 0")
        if not 0 < self.round_share * (self.rounds - 1) < 1 and self.rounds > 1:
            raise RecipeError("the rounds but the last take no share, or all of the steps")
        if self.sparse and self.parallel == "fsdp":
            raise RecipeError("zeros are not kept in shards", hint="--set sparse=no")
        if min(self.steps_of(number) for number in range(self.rounds)) < 1:
            raise RecipeError("a round has no steps", hint="more tune_steps, or fewer rounds")

    def steps_of(self, number: int) -> int:
        """Of a round, from 0; all rounds together take ``tune_steps``."""
        early = round(self.round_share * self.tune_steps)
        return early if number < self.rounds - 1 else self.tune_steps - early * (self.rounds - 1)


def run(run: Run, settings: PruneSettings) -> TrainingReport:
    """Train, cut and tune; the folder has the cut network, and the uncut one in ``unpruned``."""
    data = classify.load(settings, run.say)
    train, held = data.train.share(settings.train_images).parted(settings.held_images)
    test = data.test.share(settings.test_images)
    given = trained_residual.read(Path(settings.base).expanduser(), data) if settings.base else None
    config = dict(given.config) if given else _drawn(settings, data)
    work = _Work(run, settings, data, train, held, test, config)
    base = given.state if given else weights(run, work.fit("base", config, None, settings))
    start = work.start(base)
    tuning = replace(settings, lr=settings.tune_lr, eval_every=0, patience=0)
    whole = replace(tuning, steps=settings.tune_steps)

    fitted = work.fit(UNCUT, config, base, whole)
    uncut = Trained(config, weights(run, fitted), fitted.figures)
    teacher = uncut.network().to(memory_format=torch.channels_last)
    taught = taught_by(teacher.to(run.accelerator.device), data, settings)
    state = base
    for number in range(settings.rounds):
        config, state = work.cut(number, config, state, start)
        steps = replace(tuning, steps=settings.steps_of(number))
        fitted = work.fit(f"round-{number + 1}", config, state, steps, taught)
        state = weights(run, fitted)
    models = {"pruned": Trained(config, state, fitted.figures), UNCUT: uncut}
    if settings.sparse:
        for name, masks in work.masks(base).items():
            fitted = work.fit_masked(name, base, masks, whole, taught)
            state = sparsity.applied(weights(run, fitted), masks)
            models[name] = Trained(work.config, state, fitted.figures)

    fills = {name: partial(model.fill, data) for name, model in models.items()}
    timed = deploy.figures(run, fills) if settings.latency else {}
    results = []
    for name, model in models.items():
        own = {"parameters": float(model.parameters), "zeros_share": _zeros(model)}
        results.append(Result(name, {**own, **model.figures, **timed.get(name, {})}))

    def fill(folder: Path) -> None:
        models["pruned"].fill(data, folder)
        (folder / UNCUT).mkdir()
        models[UNCUT].fill(data, folder / UNCUT)
        sensitivity_scan.write(folder / "sensitivity.csv", start.scan)
        with suppress(MissingExtraError):  # the table holds the same
            sensitivity_scan.draw(folder / "sensitivity.png", start.scan)

    if not run.main:
        return run.finish(fill, results)
    taken = confusion.of(models["pruned"].network(), data, train, test)
    return run.finish(fill, results, work.remarks(models, timed, start), taken)


def taught_by(teacher: torch.nn.Module, data: Labelled, settings: PruneSettings) -> Loss:
    """A loss of labels, and of the teacher's answers to the same augmented images."""
    teacher.eval().requires_grad_(False)

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        pixels, classes = batch
        images = classify.augmented(
            data.normalized(pixels), shift=settings.shift, flip=settings.flip, turn=0.0
        )
        with torch.no_grad():
            its = teacher(images)
        mine = model(images)
        labels = F.cross_entropy(
            mine.float(), classes, reduction="sum", label_smoothing=settings.smoothing
        )
        answers = distillation.of_answers(mine, its, settings.temperature)
        return settings.answers * answers + (1 - settings.answers) * labels

    return loss


@dataclass(frozen=True)
class Start:
    """What was found out before the first cut. ``factor`` is by how much more than asked for the
    sum of convolutions must shrink, for the whole graph to become as fast as asked for.
    """

    times: Times
    groups: tuple[ChannelGroup, ...]
    factor: float
    scan: list[sensitivity_scan.Row]
    criteria: dict[str, float]


@dataclass(frozen=True)
class _Work:
    run: Run
    settings: PruneSettings
    data: Labelled
    train: Images
    held: Images
    test: Images
    config: dict[str, Any]  # of the uncut network

    # Training

    def fit(
        self,
        name: str,
        config: dict[str, Any],
        state: State | None,
        settings: Settings,
        loss: Loss | None = None,
    ) -> Fitted:
        torch.manual_seed(settings.seed)
        network = residual.build(config)
        if state is not None:
            network.load_state_dict(state)
        return self.run.fit(self._task(name, network, loss), settings)

    def fit_masked(
        self, name: str, base: State, masks: sparsity.Masks, settings: Settings, loss: Loss
    ) -> Fitted:
        network = loaded(self.config, base)
        return self.run.fit(self._task(name, sparsity.Masked(network, masks), loss), settings)

    def _task(self, name: str, network: torch.nn.Module, loss: Loss | None) -> Task:
        settings = self.settings
        loss = loss or classify.loss_of(
            self.data, smoothing=settings.smoothing, shift=settings.shift, flip=settings.flip
        )
        network = network.to(memory_format=torch.channels_last)
        evaluate = classify.evaluation(self.data, self.test)
        return Task(name, network, self.train, loss, evaluate)

    def masks(self, base: State) -> dict[str, sparsity.Masks]:
        network = loaded(self.config, base)
        return {
            "2-of-4": sparsity.n_of_m(network, 2, 4),
            "unstructured": sparsity.unstructured(network, self.settings.sparsity),
        }

    # Choices: on the CPU, alike everywhere, and kept, for measured times differ

    def start(self, base: State) -> Start:
        """The scan, and what each criterion would do if all was cut at once."""
        network = loaded(self.config, base)
        groups = channel_groups.find(network, self.data.shape, HEAD)
        times: Times = Measured()
        if self.settings.board:
            times = Predicted(profile_of(self.settings.board))
        held = classify.evaluation(self.data, self.held)
        every = {
            criterion: channel_groups.scores(criterion, network, groups, self._losses())
            for criterion in _CRITERIA
        }

        def scan(path: Path) -> None:
            found = sensitivity_scan.scan(network, groups, every[self.settings.criterion], held)
            sensitivity_scan.write(path, found)

        def criteria(path: Path) -> None:
            scores = every[self.settings.criterion]
            _, factor = self._fast_enough(self.config, groups, scores, times, 1.0)
            found: dict[str, Any] = {"factor": factor, "accuracy": {}}
            for criterion, scores in every.items():
                choice = self._choice(self.config, groups, scores, times, factor, 1.0)
                with torch.no_grad(), ExitStack() as silent:
                    for group in groups:
                        numbers = choice.removed.get(group.name, [])
                        silent.enter_context(channel_groups.without(network, group, numbers))
                    found["accuracy"][criterion] = held(network.eval())["accuracy"]
            sensitivity_scan.write_json(path, found)

        rows = sensitivity_scan.read(self.run.once("sensitivity.csv", scan))
        kept = sensitivity_scan.read_json(self.run.once("criteria.json", criteria))
        return Start(times, groups, kept["factor"], rows, kept["accuracy"])

    def cut(
        self, number: int, config: dict[str, Any], state: State, start: Start
    ) -> tuple[dict[str, Any], State]:
        """Config and weights after the cut of round ``number``, from 0."""
        network = loaded(config, state)

        def choose(path: Path) -> None:
            groups = channel_groups.find(network, self.data.shape, HEAD)
            found = channel_groups.scores(self.settings.criterion, network, groups, self._losses())
            part = (number + 1) / self.settings.rounds
            given = (config, groups, found, start.times, start.factor)
            last = number + 1 == self.settings.rounds
            choice = self._fast_enough(*given)[0] if last else self._choice(*given, part)
            choice.write(path)

        choice = channel_choice.read(self.run.once(f"round-{number + 1}.json", choose))
        channel_groups.cut(network, self.data.shape, HEAD, choice.removed)
        return residual.config_of(network, config), network.state_dict()

    def _choice(
        self,
        config: dict[str, Any],
        groups: Sequence[ChannelGroup],
        scores: channel_groups.Scores,
        times: Times,
        factor: float,
        part: float,
    ) -> Choice:
        """For ``speedup ** part`` times the speed of the uncut network."""
        uncut_ms = total_ms(times, residual.convolutions(self.config, self.data.shape))
        least = {
            group.name: math.ceil(self.settings.least * residual.width(self.config, group.name))
            for group in groups
        }
        return channel_choice.choose(
            config,
            self.data.shape,
            groups,
            scores,
            times,
            target_ms=uncut_ms / (self.settings.speedup * factor) ** part,
            chunk=self.settings.chunk,
            least=least,
        )

    def _fast_enough(
        self,
        config: dict[str, Any],
        groups: Sequence[ChannelGroup],
        scores: channel_groups.Scores,
        times: Times,
        factor: float,
    ) -> tuple[Choice, float]:
        """The choice that reaches the whole speed-up, and its factor. Whole graphs are measured,
        with the widths that a choice would leave, until one is as fast as asked for and hardly
        faster: what an engine does around convolutions does not shrink with them.
        """
        found: list[tuple[float, Choice, float]] = []
        for _ in range(_TRIES):
            choice = self._choice(config, groups, scores, times, factor, 1.0)
            if self.settings.board or not self.settings.latency:
                return choice, factor
            reached = self._reached(config, choice) / self.settings.speedup
            found.append((reached, choice, factor))
            if _NEAR <= reached <= _ENOUGH:
                break
            factor /= reached
        fast = [each for each in found if each[0] >= _NEAR]
        speed = itemgetter(0)
        _, choice, factor = min(fast, key=speed) if fast else max(found, key=speed)
        return choice, factor

    def _reached(self, config: dict[str, Any], choice: Choice) -> float:
        """How many times as fast as the uncut network the one that ``choice`` leaves is here."""
        network = residual.build(config)
        channel_groups.cut(network, self.data.shape, HEAD, choice.removed)
        smaller = residual.config_of(network, config)
        both = {
            name: partial(_untrained(each).fill, self.data)
            for name, each in (("uncut", self.config), ("cut", smaller))
        }
        found = deploy.figures(self.run, both, turns=_SPEED_TURNS)
        return found["uncut"]["latency_ms"] / found["cut"]["latency_ms"]

    def _losses(self) -> list[Callable[[torch.nn.Module], torch.Tensor]]:
        """Of batches that are spread over the training images, not augmented."""
        count = min(len(self.train), _SCORE_BATCH * self.settings.score_batches)
        numbers = torch.linspace(0, len(self.train) - 1, count).long()

        def loss(part: torch.Tensor, network: torch.nn.Module) -> torch.Tensor:
            pixels, classes = self.train.batch(part)
            return F.cross_entropy(network(self.data.normalized(pixels)), classes)

        return [partial(loss, part) for part in numbers.split(_SCORE_BATCH)]

    def remarks(
        self, models: dict[str, Trained], timed: dict[str, dict[str, float]], start: Start
    ) -> list[str]:
        """What the table does not say."""
        settings = self.settings
        found = [f"tested on {len(self.test):,} images of {settings.data} that no training saw"]
        pairs = [("pruned", name) for name in models if name != "pruned"]
        found += trained_residual.compared(models, pairs, self.data, self.test)
        if settings.answers:
            found.append(f"all but {UNCUT} learned in tuning from its answers too")
        before, after = (
            total_ms(start.times, residual.convolutions(models[name].config, self.data.shape))
            for name in (UNCUT, "pruned")
        )
        where = f"predicted for {settings.board}" if settings.board else "measured one by one"
        found.append(
            f"convolutions {where}: {before:.3g} -> {after:.3g} ms, {before / after:.2f} times"
        )
        if timed:
            ms = {name: each["latency_ms"] for name, each in timed.items()}
            found.append(
                f"in ONNX Runtime here pruned is {ms[UNCUT] / ms['pruned']:.2f} times as fast as"
                f" {UNCUT}"
            )
            found += [
                f"its kernels skip no zeros: {name} runs at {ms[UNCUT] / ms[name]:.2f} times the"
                f" speed of {UNCUT}"
                for name in ms
                if name not in ("pruned", UNCUT)
            ]
        found.append(f"widths: {_widths(models[UNCUT])} -> {_widths(models['pruned'])}")
        told = ", ".join(f"{name} {100 * value:.1f}%" for name, value in start.criteria.items())
        found.append(
            f"cut to that latency at once, before any tuning, on {len(self.held):,} images held"
            f" back: {told}"
        )
        return found


def _drawn(settings: PruneSettings, data: Labelled) -> dict[str, Any]:
    """The config of the network that the settings describe."""
    return residual.config(
        data.shape,
        len(data.labels),
        kind=settings.kind,
        widths=settings.widths,
        blocks=settings.blocks,
        expand=settings.expand,
    )


def _untrained(config: dict[str, Any]) -> Trained:
    return Trained(config, residual.build(config).state_dict(), {})


def _zeros(model: Trained) -> float:
    """The share of zeros in kernels and matrices."""
    kernels = [w for name, w in model.state.items() if name.endswith("weight") and w.dim() > 1]
    zeros = math.fsum(int((each == 0).sum()) for each in kernels)
    return zeros / math.fsum(each.numel() for each in kernels)


def _widths(model: Trained) -> str:
    """``32 (32 32), 64 (64 64)``: of each stage, and inside of its blocks."""
    return ", ".join(
        f"{stage['width']} ({' '.join(map(str, stage['inner']))})"
        for stage in model.config["stages"]
    )


RECIPE = Recipe(
    "prune",
    PruneSettings(
        steps=3600,
        batch=128,
        lr=4e-3,
        ema=0.998,
        eval_every=1200,
        checkpoint_every=100,
        weight_decay=0.05,
        precision="bf16",
    ),
    run,
)
