"""Recipe: what is learned from a thousand images: a vision transformer, taught anew in seven ways.

The protocol is that of Zhai et al. 2019, "A Large-scale Study of Representation Learning with the
Visual Task Adaptation Benchmark" (VTAB): 1,000 labelled examples, 800 of them to train
on while the rate is chosen on the other 200, and then all to train on, judged on the whole test
set. The methods, side by side at equal steps: "linear" trains the classifier alone; "lora" adapters
in every linear layer (Hu et al. 2022); "dora" their directions and lengths apart (Liu et al. 2024);
"qlora" as "lora", on layers of four bits (``four_bit``), merged into the floats in the end;
"adapter" two small networks a block (Houlsby et al. 2019); "full" everything; "scratch" everything,
from random weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from edgekit import _fs, intervals, network_folder
from edgekit.errors import DataError, RecipeError
from edgekit.network_folder import Network
from edgekit.source import source
from edgekit.training import (
    adapters,
    checkpoint,
    classify,
    confusion,
    deploy,
    four_bit,
    images,
    pretrained,
    trainer,
)
from edgekit.training.images import Images, Labelled
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run
from edgekit.training.settings import Settings, setting
from edgekit.training.trainer import Fitted, Task

METHODS = ("lora", "adapter", "linear", "full", "scratch", "dora", "qlora")
_BY_DEFAULT = METHODS[:5]  # those of VTAB's question
_LOW_RANK = ("lora", "dora", "qlora")
_VALIDATED = 5  # each fifth example judges the rates
_CLASS = "ViTForImageClassification"


@dataclass(frozen=True)
class FinetuneVitSettings(Settings):
    """The model, the examples, the methods. Every method has the same steps and batches."""

    model: str = setting("", "a Hugging Face folder of a ViT; empty: one is trained on start_data")
    start_data: str = setting("fashion-mnist", "what the first model is trained on")
    start_steps: int = setting(800, "steps of that, at start_lr")
    start_lr: float = setting(1e-3, "highest learning rate of that")
    width: int = setting(96, "of that model")
    layers: int = setting(4, "of that model")
    heads: int = setting(4, "of that model")
    patch: int = setting(7, "pixels that a token is wide, in that model")
    data: str = setting("mnist", "fashion-mnist, mnist, or a folder with one folder a class")
    examples: int = setting(1000, "images that may be learned from; 0: all")
    test_images: int = setting(0, "images to test on; 0: all")
    methods: tuple[str, ...] = setting(
        _BY_DEFAULT, f"some of {', '.join(METHODS)}; the folder has the first one's model"
    )
    rates: tuple[float, ...] = setting((1e-3, 3e-3, 1e-2), "learning rates that are tried")
    seeds: int = setting(3, "runs of each method")
    rank: int = setting(8, "of lora, dora and qlora; alpha is twice that")
    inner: int = setting(12, "width of an adapter's middle")
    shift: int = setting(1, "pixels by which examples are moved at random")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or set(self.methods) - set(METHODS):
            raise RecipeError(f"methods are some of {', '.join(METHODS)}")
        if not self.rates or min(self.rates) <= 0:
            raise RecipeError("rates are numbers above 0")
        for name in ("seeds", "rank", "inner", "width", "layers", "heads", "patch", "start_steps"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be 1 or more")
        if self.width % self.heads:
            raise RecipeError("width must be a multiple of heads")


class Bottleneck(nn.Module):
    """h + up(gelu(down(h))) behind a layer, before its result joins the stream (Houlsby et al.
    2019, section 2.1). ``up`` starts at 0: at first the adapter changes nothing.
    """

    def __init__(self, layer: nn.Module, width: int, inner: int) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.layer(x)
        added: torch.Tensor = found + self.up(nn.functional.gelu(self.down(found)))
        return added


class Logits(nn.Module):
    """A ViT of transformers as a function of pixels alone: [batch, classes]."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.vit(pixel_values=pixels).logits
        return found


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network with adapters of a folder's config (registry.NETWORKS)."""
    vit = transformers.ViTForImageClassification(transformers.ViTConfig.from_dict(config["vit"]))
    return Logits(_with_bottlenecks(vit, int(config["inner"])))


def _with_bottlenecks(vit: Any, inner: int) -> Any:
    """An adapter behind the last layer of each block's attention, and behind that of the block."""
    blocks = next(part for part in vit.modules() if isinstance(part, nn.ModuleList))
    for block in blocks:
        linear = [name for name, part in block.named_modules() if isinstance(part, nn.Linear)]
        for name in ([n for n in linear if n.startswith("attention")][-1], linear[-1]):
            parent, _, last = name.rpartition(".")
            layer = block.get_submodule(name)
            adapted = Bottleneck(layer, vit.config.hidden_size, inner)
            setattr(block.get_submodule(parent), last, adapted)
    return vit


def run(run: Run, settings: FinetuneVitSettings) -> TrainingReport:
    """Train a first model or open one, teach it by each method, compare."""
    config, started = _start(settings)
    channels, side = config["num_channels"], config["image_size"]
    data = images.load(settings.data, side=side, channels=channels, say=run.say)
    if data.shape != (channels, side, side):
        raise DataError(f"{settings.data} has images of {data.shape}, the first model sees {side}")
    train, tried, validation = _examples(data.train, settings.examples)
    start = started(run)  # minutes: what is wrong with the data has been told before
    test = data.test.share(settings.test_images)
    hits: dict[str, list[list[bool]]] = {}
    best: dict[str, tuple[float, Fitted]] = {}
    taken: confusion.Confusion | None = None
    for method in settings.methods:
        teach = partial(_taught, run, settings, start, data, method)
        scores = {
            rate: teach(f"{method}-{rate:g}", rate, 0, tried, validation)[0].figures
            for rate in settings.rates
        }
        rate = max(scores, key=lambda each: (scores[each]["accuracy"], -scores[each]["loss"]))
        for seed in range(settings.seeds):
            name = f"{method}-seed-{seed}" if seed else method
            fitted, network = teach(name, rate, seed, train, test)
            hits.setdefault(method, []).append(classify.right(network, data, test))
            if seed == 0:
                best[method] = (rate, fitted)
                taken = taken or confusion.of(network, data, train, test)  # the first method's

    first = settings.methods[0]

    def fill(folder: Path) -> None:
        write_folder(folder, start, data, settings, first, best[first][1].state)

    results = [_result(start, settings, data, name, hits[name], best[name][0]) for name in best]
    if settings.latency and run.main:
        results[0].figures.update(deploy.figures(run, {first: fill})[first])
    remarks = [
        f"{len(train):,} images of {settings.data} to learn from, {len(test):,} to test on;"
        f" {settings.seeds} seeds; accuracy: their mean, low and high: the worst and the best of"
        f" them; the rate of each method is that of {', '.join(map(str, settings.rates))} which is"
        f" best on {len(validation)} of the examples when the others are learned from",
        f"start: {start.name}",
    ]
    if "qlora" in best:
        trained = best["qlora"][1].figures["accuracy"]
        merged = sum(hits["qlora"][0]) / len(test)
        remarks.append(
            f"qlora: accuracy {100 * trained:.2f}% on the layers of four bits, {100 * merged:.2f}%"
            " merged into the floats, which is what the table and the folder have (first seed)"
        )
    remarks += [_compared(first, other, hits) for other in list(hits)[1:]]
    return run.finish(fill, results, remarks, taken)


def _compared(one: str, other: str, hits: Mapping[str, list[list[bool]]]) -> str:
    def means(name: str) -> list[float]:
        return [sum(each) / len(each) for each in zip(*hits[name], strict=True)]

    gain = intervals.paired(means(one), means(other))
    return (
        f"accuracy of {one} less that of {other}, image by image: {100 * gain.value:+.2f}"
        f" [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}] points"
    )


@dataclass(frozen=True)
class _Start:
    """The model that all methods start from: its name, its config, and its weights."""

    name: str
    config: dict[str, Any]
    state: dict[str, torch.Tensor]


def _start(settings: FinetuneVitSettings) -> tuple[dict[str, Any], Callable[[Run], _Start]]:
    """The config of the first model, and what opens or trains it."""
    if settings.model:
        found = source(settings.model)
        if found.kind != "hf" or found.family != "vit":
            raise DataError(f"{settings.model} is no ViT", hint="a Hugging Face folder of a ViT")
        vit = pretrained.model(found, _CLASS)
        opened = _Start(settings.model, vit.config.to_dict(), vit.state_dict())
        return opened.config, lambda run: opened
    data = images.load(settings.start_data)
    channels, side, _ = data.shape
    if side % settings.patch:
        raise RecipeError(f"{side} pixels are no multiple of patch={settings.patch}")
    config = {
        "hidden_size": settings.width,
        "intermediate_size": 4 * settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "image_size": side,
        "patch_size": settings.patch,
        "num_channels": channels,
        "num_labels": len(data.labels),
    }
    return config, lambda run: _trained(run, settings, data, config)


def _trained(
    run: Run, settings: FinetuneVitSettings, data: Labelled, config: Mapping[str, Any]
) -> _Start:
    torch.manual_seed(settings.seed)
    network = Logits(transformers.ViTForImageClassification(transformers.ViTConfig(**config)))
    loss = classify.loss_of(data, smoothing=0.1, shift=2, flip=True)
    task = Task("start", network, data.train, loss, classify.evaluation(data, data.test))
    fitted = run.fit(task, replace(settings, steps=settings.start_steps, lr=settings.start_lr))
    accuracy = f"{100 * fitted.figures['accuracy']:.2f}%"
    name = f"a ViT trained here on {settings.start_data}, right on {accuracy} of its test set"
    state = {key.removeprefix("vit."): each for key, each in fitted.state.items()}
    return _Start(name, network.vit.config.to_dict(), state)


def _examples(train: Images, count: int) -> tuple[Images, Images, Images]:
    """``count`` examples at random, and these in two parts: to try rates on, and to judge them."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    chosen = order[: count or None]
    held = torch.arange(len(chosen)) % _VALIDATED == 0

    def of(numbers: torch.Tensor) -> Images:
        return train.taken(numbers)

    if len(chosen) <= _VALIDATED:
        raise DataError(
            f"{len(chosen)} examples are too few: each {_VALIDATED}th judges the learning rates",
            hint="more images, or a larger examples",
        )
    return of(chosen), of(chosen[~held]), of(chosen[held])


def _network(
    start: _Start, settings: FinetuneVitSettings, labels: int, method: str, *, floats: bool = False
) -> nn.Module:
    """What ``method`` trains: of its weights those alone that require a gradient. With ``floats``
    qlora's adapters are round the matrices that its codes are of.
    """
    vit = transformers.ViTForImageClassification(_config(start, labels))
    if method != "scratch":
        state = {n: each for n, each in start.state.items() if not n.startswith("classifier.")}
        vit.load_state_dict(state, strict=False)
    if method in ("linear", "adapter", *_LOW_RANK):
        for weight in vit.parameters():
            weight.requires_grad_(False)
    if method == "adapter":
        vit = _with_bottlenecks(vit, settings.inner)
        for part in vit.modules():
            if isinstance(part, nn.LayerNorm):  # trained too, as in the paper
                part.requires_grad_(True)
            if isinstance(part, Bottleneck):
                part.down.requires_grad_(True)
                part.up.requires_grad_(True)
    if method in ("linear", "adapter"):
        vit.classifier.requires_grad_(True)
    if method == "qlora" and not floats:
        four_bit.quantize_linears(vit, keep={"classifier"})
    if method in _LOW_RANK:
        alpha, dora = 2.0 * settings.rank, method == "dora"
        vit = adapters.put_in(vit, rank=settings.rank, alpha=alpha, dora=dora, heads=["classifier"])
    return Logits(vit)


def _config(start: _Start, labels: int) -> Any:
    config = transformers.ViTConfig.from_dict(start.config)
    config.num_labels = labels
    return config


def _taught(
    run: Run,
    settings: FinetuneVitSettings,
    start: _Start,
    data: Labelled,
    method: str,
    name: str,
    rate: float,
    seed: int,
    train: Images,
    test: Images,
) -> tuple[Fitted, nn.Module]:
    """``method`` at one rate, with one seed; the network with what it came to."""
    torch.manual_seed(settings.seed + seed)
    network = _network(start, settings, len(data.labels), method)
    loss = classify.loss_of(data, smoothing=0.0, shift=settings.shift, flip=False)
    task = Task(name, network, train, loss, classify.evaluation(data, test))
    changed = replace(settings, lr=rate, seed=settings.seed + seed)
    if name == method:
        fitted = run.fit(task, changed)
    else:  # too many for the report's table and picture
        fitted = trainer.fit(task, changed, run.work / name, run.accelerator, run.say)
    return fitted, _made(start, settings, len(data.labels), method, fitted.state)


def _made(
    start: _Start,
    settings: FinetuneVitSettings,
    labels: int,
    method: str,
    state: Mapping[str, torch.Tensor],
) -> nn.Module:
    """The network that ``method`` came to, in floats."""
    network = _network(start, settings, labels, method, floats=True)
    # The matrices of a layer of four bits are no part of its state: they are the first model's.
    network.load_state_dict(dict(state), strict=method != "qlora")
    return network


def _result(
    start: _Start,
    settings: FinetuneVitSettings,
    data: Labelled,
    method: str,
    hits: list[list[bool]],
    rate: float,
) -> Result:
    network = _network(start, settings, len(data.labels), method)
    whole = _network(start, settings, len(data.labels), method, floats=True)
    shares = [sum(each) / len(each) for each in hits]
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    return Result(
        method,
        {
            "parameters": float(sum(each.numel() for each in whole.parameters())),
            "trained_parameters": float(trained),
            "weights_bytes": float(_held_bytes(network)),
            "rate": rate,
            "accuracy": sum(shares) / len(shares),
            "accuracy_low": min(shares),
            "accuracy_high": max(shares),
        },
    )


def _held_bytes(network: nn.Module) -> int:
    """Of weights and codes, as they are trained."""
    held = (*network.parameters(), *network.buffers())
    return sum(each.numel() * each.element_size() for each in held)


def write_folder(
    folder: Path,
    start: _Start,
    data: Labelled,
    settings: FinetuneVitSettings,
    method: str,
    state: Mapping[str, torch.Tensor],
) -> None:
    """A Hugging Face folder; with ``adapter``, which is not a model of theirs, a network.json."""
    network: Any = _made(start, settings, len(data.labels), method, state)
    config = _config(start, len(data.labels))
    if method == "adapter":
        body = {"vit": config.to_diff_dict(), "inner": settings.inner}
        found = Network("vit-adapters", body, (1, *data.shape), data.preprocess())
        _fs.write_atomic(folder / network_folder.FILE, found.to_bytes())
        checkpoint.write(folder / network_folder.WEIGHTS, dict(state))
        return
    vit = network.vit
    if method in _LOW_RANK:
        if settings.model:
            adapters.taken_from(vit, settings.model).write(folder / "adapter")
        vit = vit.merge_and_unload()
    config.id2label = dict(enumerate(data.labels))
    config.label2id = {label: number for number, label in enumerate(data.labels)}
    config.architectures = [_CLASS]
    preprocess = {name: each for name, each in data.preprocess().items() if name != "labels"}
    preprocess |= {"image_processor_type": "ViTImageProcessor", "do_resize": True}
    preprocess |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    for name, made in (("config.json", config.to_dict()), ("preprocessor_config.json", preprocess)):
        _fs.write_atomic(folder / name, (json.dumps(made, indent=1) + "\n").encode())
    checkpoint.write(folder / network_folder.WEIGHTS, pretrained.state_of(vit))


RECIPE = Recipe(
    "finetune-vit",
    FinetuneVitSettings(
        steps=100,
        batch=64,
        warmup=0.1,
        weight_decay=0.01,
        precision="bf16",
        checkpoint_every=200,
        log_every=10,
    ),
    run,
)
