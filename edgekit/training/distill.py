"""Recipe: a small image classifier that learns from a large one: answers, features, attention.

The student is the teacher with a part of its channels, cut by what each does for the loss, or a
narrow network of its own. It is trained twice from the same weights, for as many steps, on the same
images: alone, and with the teacher. The report says how much of the loss that the student lacks
against the teacher the teacher gave back. A teacher's answers are calibrated first, on images held
back: a student learns its sureness too, and is judged by it.

Knows the order of the work; never a formula (``distillation``), nor how channels hang together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from edgekit.errors import RecipeError
from edgekit.training import (
    bootstrap,
    channel_groups,
    classify,
    confusion,
    deploy,
    distillation,
    residual,
    trained_residual,
)
from edgekit.training.images import Images, Labelled
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run
from edgekit.training.settings import Settings, setting
from edgekit.training.trained_residual import State, Trained, weights
from edgekit.training.trainer import Batch, Task

TEACHER, ALONE, TAUGHT = "teacher", "alone", "distilled"
_HEAD = "head"  # the layer whose outputs are the classes
_SCORED = 1024  # images that the teacher's channels are scored by


@dataclass(frozen=True)
class DistillSettings(classify.ClassifierSettings):
    """Teacher, student and what is taught; the defaults are for Fashion-MNIST. ``steps`` are those
    of each student.
    """

    teacher: str = setting("", "folder of a network that prune left; empty: trained here")
    teacher_steps: int = setting(3600, "steps of a teacher that is trained here")
    kind: Literal["basic", "inverted"] = setting("basic", "blocks of ResNet, or of MobileNetV2")
    widths: tuple[int, ...] = setting((32, 64, 128), "channels of each stage of such a teacher")
    blocks: tuple[int, ...] = setting((1, 1, 1), "its blocks of each stage")
    held_images: int = setting(
        0, "of these, that a teacher is calibrated on, and none trains; 0: a fifth, 2,000 at most"
    )
    student_images: int = setting(
        0, "images that the students learn from, of every class its share; 0: the teacher's"
    )
    student: Literal["cut", "narrow"] = setting(
        "cut", "the teacher with a part of its channels, or as narrow from new weights"
    )
    keep: float = setting(0.5, "share of the teacher's channels that the student has")
    temperature: float = setting(2.0, "that softens the answers")
    answers: float = setting(0.9, "weight of the teacher's answers; the labels have the rest")
    features: float = setting(0.0, "weight of the teacher's features; 0 leaves them out")
    attention: float = setting(0.0, "weight of where the teacher looks; 0 leaves it out")
    smoothing: float = setting(0.0, "label smoothing, of all three alike")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.keep < 1 and 0 <= self.answers <= 1):
            raise RecipeError("keep and answers are shares")
        if min(self.features, self.attention) < 0:
            raise RecipeError("features and attention must not be negative")
        if self.student_images < 0:
            raise RecipeError("student_images must not be negative")
        if self.temperature <= 0 or self.teacher_steps < 1:
            raise RecipeError("temperature and teacher_steps must be more than 0")


def run(run: Run, settings: DistillSettings) -> TrainingReport:
    """Train the teacher if there is none, the student alone, and the student with it."""
    data = classify.load(settings, run.say)
    train, held = data.train.share(settings.train_images).parted(settings.held_images)
    work = _Work(run, settings, data, train, held, data.test.share(settings.test_images))
    teacher, scale = work.calibrated(work.teacher())
    config, start = work.student(teacher)
    models = {
        TAUGHT: work.taught(teacher, config, start),
        ALONE: work.trained(ALONE, config, start, settings, work.fewer),
        TEACHER: teacher,
    }
    fills = {name: partial(model.fill, data) for name, model in models.items()}
    timed = deploy.figures(run, fills) if settings.latency else {}
    results = [
        Result(
            name,
            {"parameters": float(model.parameters), **model.figures, **timed.get(name, {})},
        )
        for name, model in models.items()
    ]

    def fill(folder: Path) -> None:
        models[TAUGHT].fill(data, folder)
        for name in (ALONE, TEACHER):
            (folder / name).mkdir()
            models[name].fill(data, folder / name)

    if not run.main:
        return run.finish(fill, results)
    taken = confusion.of(models[TAUGHT].network(), data, work.fewer, work.test)
    return run.finish(fill, results, work.remarks(models, scale), taken)


@dataclass(frozen=True)
class _Work:
    run: Run
    settings: DistillSettings
    data: Labelled
    train: Images
    held: Images
    test: Images

    @property
    def fewer(self) -> Images:
        """What the students learn from."""
        return self.train.share(self.settings.student_images)

    def teacher(self) -> Trained:
        """The one of the folder, or one that is trained here."""
        settings, data = self.settings, self.data
        if settings.teacher:
            return trained_residual.read(Path(settings.teacher).expanduser(), data)
        config = residual.config(
            data.shape,
            len(data.labels),
            kind=settings.kind,
            widths=settings.widths,
            blocks=settings.blocks,
        )
        steps = replace(settings, steps=settings.teacher_steps)
        return self.trained(TEACHER, config, None, steps, self.train)

    def calibrated(self, teacher: Trained) -> tuple[Trained, float]:
        """The teacher with a last layer whose answers are as sure as they are right on the images
        held back, its figures, and what that layer was multiplied by.
        """
        network = teacher.network().eval()
        with torch.no_grad():
            pairs = list(classify.answers(network, self.data, self.held))
        logits, classes = (torch.cat(each) for each in zip(*pairs, strict=True))
        scale = distillation.calibrating_scale(logits, classes)
        last = [each for name, each in network.named_parameters() if name.startswith(f"{_HEAD}.")]
        with torch.no_grad():
            for each in last:
                each *= scale
            figures = classify.evaluation(self.data, self.test)(network)
        return Trained(teacher.config, network.state_dict(), figures), scale

    def student(self, teacher: Trained) -> tuple[dict[str, Any], State | None]:
        """Its config, and the weights that both trainings start from; None: new ones.

        From every group of channels those stay that matter most by the Taylor criterion.
        """
        network, shape, last = teacher.network(), self.data.shape, _HEAD
        groups = channel_groups.find(network, shape, last)
        few = self.fewer.share(_SCORED)

        def loss(network: torch.nn.Module) -> torch.Tensor:
            return F.cross_entropy(network(self.data.normalized(few.pixels)), few.classes)

        scores = channel_groups.scores("taylor", network, groups, [loss])
        removed = {}
        for group in groups:
            stays = max(1, round(self.settings.keep * group.width))
            order = scores[group.name].argsort(stable=True).tolist()
            removed[group.name] = order[: group.width - stays]
        channel_groups.cut(network, shape, last, removed)
        config = residual.config_of(network, teacher.config)
        return config, network.state_dict() if self.settings.student == "cut" else None

    def trained(
        self,
        name: str,
        config: dict[str, Any],
        start: State | None,
        settings: Settings,
        images: Images,
    ) -> Trained:
        """A network that learns from the labels of ``images`` alone."""
        loss = classify.loss_of(
            self.data,
            smoothing=self.settings.smoothing,
            shift=self.settings.shift,
            flip=self.settings.flip,
        )
        network = self._started(config, start).to(memory_format=torch.channels_last)
        evaluate = classify.evaluation(self.data, self.test)
        fitted = self.run.fit(Task(name, network, images, loss, evaluate), settings)
        return Trained(config, weights(self.run, fitted), fitted.figures)

    def taught(self, teacher: Trained, config: dict[str, Any], start: State | None) -> Trained:
        """The same network, that learns from labels, answers, features and attention."""
        settings, data = self.settings, self.data
        master = teacher.network().eval().requires_grad_(False)
        master = master.to(self.run.accelerator.device, memory_format=torch.channels_last)

        def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
            pixels, classes = batch
            inputs = classify.augmented(
                data.normalized(pixels), shift=settings.shift, flip=settings.flip, turn=0.0
            )
            with torch.no_grad():
                its = master.features(inputs)
                answer = master.classify(its[-1])
            logits, made, mine = model(inputs)
            labels = F.cross_entropy(
                logits.float(), classes, reduction="sum", label_smoothing=settings.smoothing
            )
            soft = distillation.of_answers(logits, answer, settings.temperature)
            total = (1 - settings.answers) * labels + settings.answers * soft
            if settings.features:
                total = total + settings.features * distillation.of_features(made, its)
            if settings.attention:
                total = total + settings.attention * distillation.of_attention(mine, its)
            return total

        student = self._started(config, start)
        widths = zip(_widths(config), _widths(teacher.config), strict=True)
        # Weights that no loss reaches would keep several processes waiting for their gradients.
        pupil = distillation.Pupil(student, tuple(widths) if settings.features else ())
        pupil = pupil.to(memory_format=torch.channels_last)
        evaluate = classify.evaluation(data, self.test)
        fitted = self.run.fit(Task(TAUGHT, pupil, self.fewer, loss, evaluate), settings)
        state = distillation.of_student(weights(self.run, fitted))
        return Trained(config, state, fitted.figures)

    def _started(self, config: dict[str, Any], start: State | None) -> torch.nn.Module:
        torch.manual_seed(self.settings.seed)
        network = residual.build(config)
        if start is not None:
            network.load_state_dict(start)
        return network

    def remarks(self, models: dict[str, Trained], scale: float) -> list[str]:
        """How much of the gap was closed, in loss and in accuracy."""
        loss = {
            name: torch.tensor(classify.losses(model.network(), self.data, self.test))
            for name, model in models.items()
        }
        gap, gained = loss[ALONE] - loss[TEACHER], loss[ALONE] - loss[TAUGHT]
        found = [
            f"the teacher's logits were multiplied by {scale:.2f}, which calibrates them on"
            f" {len(self.held):,} images held back",
            f"tested on {len(self.test):,} images of {self.settings.data} that no training saw",
        ]
        if gap.mean() > 0:
            share = bootstrap.ratio(gained.tolist(), gap.tolist())
            found.append(
                f"of the gap of {gap.mean():.4f} in loss the teacher gave back {share.value:.0%}"
                f" [{share.low:.0%}, {share.high:.0%}], bootstrap over the test images"
            )
        else:
            found.append("there is no gap: the student alone is as good as the teacher")
        pairs = [(TAUGHT, ALONE)]
        return [*found, *trained_residual.compared(models, pairs, self.data, self.test)]


def _widths(config: Any) -> list[int]:
    return [stage["width"] for stage in config["stages"]]


RECIPE = Recipe(
    "distill",
    DistillSettings(
        steps=1600,
        batch=128,
        lr=4e-3,
        ema=0.998,
        eval_every=0,
        checkpoint_every=100,
        weight_decay=0.05,
        precision="bf16",
    ),
    run,
)
