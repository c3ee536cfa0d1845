"""Recipe: a vision transformer that learns to compute with weights and activations of 4 bits.

A float network is trained first, and is the teacher of what follows. From its weights training
goes on for as many steps as each: a control, which stays float, and one network for each format,
whose products see values on grids of a few levels with learned steps (``learned_steps``). "w4a4"
are weights of 4 bits and activations of 4. What training is worth shows beside the control's
weights rounded without any (``post_training``), to the same formats.

The model of the run is that of the first format. Its weights lie in the folder as they are used,
on their grids: ``edgekit export --type weight_only_wi4_afp32`` stores them in 4 bits, exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgekit import _fs, network_folder, runtime
from edgekit.errors import RecipeError
from edgekit.network_folder import Network
from edgekit.training import (
    checkpoint,
    classify,
    confusion,
    deploy,
    folded_vit,
    post_training,
    vit,
)
from edgekit.training.images import Images, Labelled
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run
from edgekit.training.settings import setting
from edgekit.training.trainer import Batch, Loss, Task

_FORMAT = re.compile(r"w[2-4]a[2-8]", re.ASCII)
_TYPE = "weight_only_wi4_afp32"
_BATCH = 500  # test images that the exported file is asked at once


@dataclass(frozen=True)
class VitQatSettings(classify.ClassifierSettings):
    """The network's size, the data and the formats; the defaults are for Fashion-MNIST."""

    formats: tuple[str, ...] = setting(
        ("w4a4", "w3a3", "w2a4"), "bits of weights and activations; the first is the run's model"
    )
    ends: bool = setting(False, "quantize the patch embedding and the head too")
    patch: int = setting(7, "side of a patch, in pixels")
    width: int = setting(96, "of a token")
    depth: int = setting(4, "blocks")
    heads: int = setting(4, "of attention")
    hidden: int = setting(192, "width between the two layers of a block's MLP")
    tune_steps: int = setting(900, "steps of the control and of each format")
    tune_lr: float = setting(5e-4, "their highest learning rate")
    distill: float = setting(0.5, "part of their loss that is the teacher's answer")
    calibration: int = setting(512, "training images that ranges are first fitted to")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.depth, self.calibration, self.tune_steps) < 1:
            raise RecipeError("depth, calibration and tune_steps are at least 1")
        wrong = [each for each in self.formats if not _FORMAT.fullmatch(each)]
        if wrong or not self.formats or len(set(self.formats)) < len(self.formats):
            raise RecipeError(
                f"formats cannot be {','.join(self.formats)!r:.60}",
                hint="such as w4a4,w3a3: weights of 2 to 4 bits, activations of 2 to 8",
            )
        if min(self.patch, self.width, self.heads, self.hidden, self.tune_steps) < 1:
            raise RecipeError("patch, width, heads, hidden and tune_steps are at least 1")
        if self.width % self.heads:
            raise RecipeError(f"a width of {self.width} cannot be cut into {self.heads} heads")
        if not 0 <= self.distill <= 1:
            raise RecipeError("distill is a share from 0 to 1")


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of a folder's config (registry.NETWORKS)."""
    return vit.build(config)


def run(run: Run, settings: VitQatSettings) -> TrainingReport:
    """Train the float network, the control and each format; write the first format's network with
    the report of all.
    """
    data = classify.load(settings, run.say)
    train = data.train.share(settings.train_images)
    test = data.test.share(settings.test_images)
    if any(side % settings.patch for side in data.shape[1:]):
        raise RecipeError(f"{data.shape[1:]} pixels cannot be cut into patches of {settings.patch}")
    plain: dict[str, Any] = {
        "shape": list(data.shape),
        "classes": len(data.labels),
        **{name: getattr(settings, name) for name in ("patch", "width", "depth", "heads")},
        "hidden": settings.hidden,
    }
    evaluate = classify.evaluation(data, test)
    labels = classify.loss_of(
        data, smoothing=settings.smoothing, shift=settings.shift, flip=settings.flip
    )
    torch.manual_seed(settings.seed)
    fitted = {"float": run.fit(Task("float", vit.build(plain), train, labels, evaluate), settings)}
    # Through a file, for of a sharded run only the main process has the whole state.
    first = run.once(
        "float.safetensors", lambda path: checkpoint.write(path, fitted["float"].state)
    )
    start = checkpoint.read(first)[0]
    taught = taught_by(_network(plain, start), data, settings)
    more = replace(settings, steps=settings.tune_steps, lr=settings.tune_lr)
    any_order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
    inputs = data.normalized(train.pixels[any_order[: settings.calibration]])
    configs: dict[str, dict[str, Any]] = {"control": plain}
    for name in settings.formats:
        bits = {"weight_bits": int(name[1]), "activation_bits": int(name[3])}
        configs[name] = plain | bits | {"ends": settings.ends}
    for name, config in configs.items():
        student = _network(plain, start)
        if name != "control":
            student = post_training.quantized(config, start, inputs, post_training.LEAST_ERROR)
        fitted[name] = run.fit(Task(name, student, train, taught, evaluate), more)

    def fill(name: str, folder: Path) -> None:
        """The folder of a network; of a format's with its weights on their grids."""
        config, made = configs[name], _network(configs[name], fitted[name].state)
        if name != "control":
            config, made = folded_vit.folded(config, made)
        state = {key: each.contiguous() for key, each in made.state_dict().items()}
        network = Network("vit-qat", config, (1, *data.shape), data.preprocess())
        _fs.write_atomic(folder / network_folder.FILE, network.to_bytes())
        checkpoint.write(folder / network_folder.WEIGHTS, state)

    if not run.main:
        return run.finish(partial(fill, settings.formats[0]), [])
    figures = {name: dict(each.figures) for name, each in fitted.items()}
    hits = {
        name: classify.right(_network(configs[name], fitted[name].state), data, test)
        for name in configs
    }
    rivals = _rivals(configs, fitted["control"].state, inputs, data, test)
    hits |= rivals
    if settings.latency:
        fills = {name: partial(fill, name) for name in configs}
        types = dict.fromkeys(settings.formats, _TYPE)
        for name, timed in deploy.figures(run, fills, types=types).items():
            answers = _exported(run.work / f"deploy-{name}-onnx", data, test)
            figures[name] |= timed | {"onnx_accuracy": sum(answers) / len(answers)}
    parameters = float(sum(each.numel() for each in vit.build(plain).parameters()))
    rows = [*settings.formats, "control", "float"]
    results = [Result(name, {"parameters": parameters} | figures[name]) for name in rows]
    results += [Result(name, {"accuracy": sum(h) / len(h)}) for name, h in rivals.items()]
    ours = settings.formats[0]
    network = _network(configs[ours], fitted[ours].state)
    taken = confusion.of(network, data, train, test)
    remarks = _remarks(settings, hits, list(rivals))
    return run.finish(partial(fill, ours), results, remarks, taken)


def taught_by(teacher: nn.Module, data: Labelled, settings: VitQatSettings) -> Loss:
    """(1 - a) cross-entropy with the labels + a KL(teacher || student), summed over the images of a
    batch (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2; LSQ, too,
    has it, with a temperature of 1 and equal parts).
    """
    part = settings.distill

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        pixels, classes = batch
        inputs = classify.augmented(
            data.normalized(pixels), shift=settings.shift, flip=settings.flip, turn=0.0
        )
        logits = model(inputs).float()
        found = F.cross_entropy(
            logits, classes, reduction="sum", label_smoothing=settings.smoothing
        )
        if not part:
            return found
        with torch.no_grad():
            answer = teacher.to(inputs.device)(inputs).float().log_softmax(1)
        apart = F.kl_div(logits.log_softmax(1), answer, reduction="sum", log_target=True)
        return (1 - part) * found + part * apart

    return loss


def _network(config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> vit.VisionTransformer:
    network = vit.build(config)
    network.load_state_dict(dict(state))
    network.eval()
    return network


def _rivals(
    configs: Mapping[str, Mapping[str, Any]],
    control: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    data: Labelled,
    test: Images,
) -> dict[str, list[bool]]:
    """Whether the control, rounded to each format by each method, is right on each image."""
    return {
        f"{name} of the control, {method.name}": classify.right(
            post_training.quantized(config, control, inputs, method), data, test
        )
        for name, config in configs.items()
        if name != "control"
        for method in post_training.METHODS
    }


def _exported(folder: Path, data: Labelled, test: Images) -> list[bool]:
    """Whether the exported file is right on each image."""
    found: list[bool] = []
    with runtime.load(folder) as model:
        for start in range(0, len(test), _BATCH):
            pixels = test.pixels[start : start + _BATCH]
            (logits,) = model.run({"image": data.normalized(pixels).numpy()}).values()
            found += (logits.argmax(1) == test.classes[start : start + _BATCH].numpy()).tolist()
    return found


def _remarks(
    settings: VitQatSettings, hits: Mapping[str, list[bool]], rivals: list[str]
) -> list[str]:
    found = [
        f"tested on {len(hits['control']):,} images of {settings.data} that no training saw; the"
        f" control and each format went on from float for {settings.tune_steps:,} steps each"
    ]
    for name in settings.formats:
        lead = classify.bootstrap(hits[name], hits["control"])
        found.append(f"accuracy of {name} less that of the control: {classify.points(lead)}")
        of_format = [each for each in rivals if each.startswith(f"{name} ")]
        best = max(of_format, key=lambda each: sum(hits[each]))
        lead = classify.bootstrap(hits[name], hits[best])
        found.append(f"accuracy of {name} less that of {best}: {classify.points(lead)}")
    return found


RECIPE = Recipe(
    "vit-qat",
    VitQatSettings(
        side=28,  # as Fashion-MNIST's, and a multiple of the patches
        steps=5600,
        batch=128,
        lr=2e-3,
        ema=0.998,
        eval_every=700,
        checkpoint_every=200,
        weight_decay=0.05,
        precision="bf16",
    ),
    run,
)
