"""Recipe: a language model made smaller at once, without training: layers, channels, weights.

Three ways, each by what a text does inside of the model, and each beside the same size chosen
without looking at one: whole layers go (``layer_drop``), feed-forward channels and heads go and the
others stand in for them (``narrow_layers``), single weights become zeros (``wanda``). Layers and
channels make a smaller and faster model; zeros do not in any engine here, which is measured too.

With ``tune`` the first model and the one beside it are then trained, for as many steps.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from edgekit import _fs, model_folder
from edgekit.errors import RecipeError
from edgekit.formats import json_file
from edgekit.source import ModelSource
from edgekit.training import (
    bootstrap,
    checkpoint,
    deploy,
    language,
    layer_drop,
    layer_pass,
    model_texts,
    narrow_layers,
    pretrained,
    sparsity,
    texts,
    wanda,
)
from edgekit.training.distill_lm import kept_layers
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run, strictly_repeatable
from edgekit.training.settings import setting
from edgekit.training.tinyllama import figures_of, judge_of, losses_of
from edgekit.training.trainer import Status, Task

Method = Literal["depth", "width", "wanda", "wanda-2-of-4"]
# What stands beside each: as large, chosen without looking at a text.
BESIDE: Mapping[str, str] = {
    "depth": "depth-evenly",
    "width": "width-by-size",
    "wanda": "magnitude",
    "wanda-2-of-4": "magnitude-2-of-4",
}
# Whose weights became zeros; a model of four bits has a few of its own.
_OF_ZEROS = ("wanda", "magnitude", "wanda-2-of-4", "magnitude-2-of-4")
UNPRUNED = "unpruned"
_CLASS = "AutoModelForCausalLM"
_FIGURES = "figures.json"
_SHAPE = (
    *("num_hidden_layers", "intermediate_size", "head_dim"),
    *("num_attention_heads", "num_key_value_heads"),
)
_EVEN = 32  # channels: what GGUF's 8-bit blocks and the engines' kernels like


@dataclass(frozen=True)
class PruneLmSettings(model_texts.ModelTextSettings):
    """How much of the model (a Llama) is left, and how that is chosen."""

    methods: tuple[str, ...] = setting(
        ("depth", "width", "wanda", "wanda-2-of-4"), "ways to prune; the folder has the first"
    )
    layers: float = setting(0.8, "depth: share of the layers that stay")
    depth_by: Literal["influence", "loss"] = setting(
        "influence", "depth: how little a layer turns what enters it, or the loss without it"
    )
    inner: float = setting(0.75, "width: share of the feed-forward channels that stay")
    groups: float = setting(1.0, "width: share of the groups of heads that stay")
    sparsity: float = setting(0.5, "wanda: share of zeros in each output's weights")
    calibration: int = setting(32, "pieces of text that choices are made by")
    loss_pieces: int = setting(4, "of these, how many the loss without a layer is measured on")
    tune: bool = setting(False, "train the first model, and the one beside it, for steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = get_args(Method)
        if not self.methods or any(each not in known for each in self.methods):
            raise RecipeError(f"methods are some of {', '.join(known)}")
        if not all(0 < share <= 1 for share in (self.layers, self.inner, self.groups)):
            raise RecipeError("layers, inner and groups are shares above 0, and 1 at most")
        if not 0 < self.sparsity < 1:
            raise RecipeError("sparsity is a share between 0 and 1")
        if min(self.calibration, self.loss_pieces) < 1:
            raise RecipeError("calibration and loss_pieces are 1 or more")
        if self.tune and self.parallel == "fsdp" and self.methods[0].startswith("wanda"):
            raise RecipeError("zeros are not kept in shards", hint="--set parallel=data")


def run(run: Run, settings: PruneLmSettings) -> TrainingReport:
    """Prune in each way, judge, tune if asked for; write the folder of the first."""
    found = pretrained.opened(run, settings.model)
    text = model_texts.tokens(run, found, settings)
    data = texts.Packed(text.train, settings.length)
    whole = pretrained.model(found, _CLASS).to(run.accelerator.device).eval()
    layer_pass.check(whole)
    work = _Work(run, settings, found, whole, text, data)

    first, *others = dict.fromkeys(settings.methods)
    names = [name for method in (first, *others) for name in (method, BESIDE[method])] + [UNPRUNED]
    rows = {name: work.judged(name, at, len(names)) for at, name in enumerate(names)}
    if settings.tune:
        tuned = {f"{name}-tuned": work.tuned(name) for name in (first, BESIDE[first])}
        rows = tuned | rows

    fills = {name: rows[name].fill for name in (first, *others, UNPRUNED)}
    if settings.latency and run.main:
        for name, figures in deploy.gguf_figures_of(run, fills).items():
            rows[name].figures.update(figures)
    results = [Result(name, row.figures) for name, row in rows.items()]
    return run.finish(next(iter(rows.values())).fill, results, work.remarks(rows))


@dataclass(frozen=True)
class Pruned:
    """A row of the table; ``nats`` are its losses on each piece of the held-out text, ``layers``
    the numbers of those left; ``fill`` writes its folder.
    """

    figures: dict[str, float]
    nats: tuple[float, ...]
    layers: tuple[int, ...]
    fill: Callable[[Path], None]


@dataclass(frozen=True)
class _Work:
    run: Run
    settings: PruneLmSettings
    found: ModelSource
    whole: Any
    text: model_texts.ModelText
    data: texts.Packed

    def judged(self, name: str, number: int, count: int) -> Pruned:
        """The model ``name``: made and judged once in a run, by one process."""

        def make(folder: Path) -> None:
            begun_s = time.monotonic()
            folder.mkdir()
            model, layers = self._made(name)
            nats = self._losses(model)
            figures = self._figures(model, nats)
            body = {"figures": figures, "nats": nats.tolist(), "layers": layers}
            body["changes"] = _changes(model)
            if name in self._kept:
                checkpoint.write(folder / model_folder.WEIGHTS, pretrained.state_of(model))
            _fs.write_atomic(folder / _FIGURES, json.dumps(body).encode())
            took_s = time.monotonic() - begun_s
            left_s = (count - number - 1) * took_s
            loss = figures["loss"]
            self.run.say(Status(name, number + 1, count, loss, 0.0, 1 / took_s, "models", left_s))

        folder = self.run.once(name, make)
        body = json_file.read(folder / _FIGURES)

        def fill(out: Path) -> None:
            state, _ = checkpoint.read(folder / model_folder.WEIGHTS)
            pretrained.write(out, self.found, state, body["changes"])

        return Pruned(body["figures"], tuple(body["nats"]), tuple(body["layers"]), fill)

    @property
    def _kept(self) -> tuple[str, ...]:
        """What is exported or trained later, and so is written down."""
        beside = BESIDE[self.settings.methods[0]]
        return (UNPRUNED, *self.settings.methods, *([beside] if self.settings.tune else []))

    def _losses(self, model: torch.nn.Module) -> torch.Tensor:
        return losses_of(self.text.held, self.settings.length)(model)

    def _figures(self, model: torch.nn.Module, nats: torch.Tensor) -> dict[str, float]:
        found = figures_of(nats, self._held_tokens, self.text.held_bytes)
        return {
            "parameters": float(sum(each.numel() for each in model.parameters())),
            "zeros_share": wanda.zeros_share(model),
            "perplexity": math.exp(found["loss"]),
            **found,
        }

    @property
    def _held_tokens(self) -> int:
        return len(self.text.held) - 1

    def _made(self, name: str) -> tuple[Any, list[int]]:
        """The model ``name``, and the numbers of its layers in the whole one."""
        settings, whole = self.settings, self.whole
        every = list(range(whole.config.num_hidden_layers))
        share = settings.sparsity
        match name:
            case "depth" | "depth-evenly":
                kept = kept_layers(len(every), settings.layers)
                if name == "depth":
                    kept = self._chosen_layers(len(every) - len(kept))
                return layer_pass.with_layers(whole, kept), kept
            case "width":
                return narrow_layers.by_activation(whole, self._ids(), *self._sizes()), every
            case "width-by-size":
                return narrow_layers.by_size(whole, *self._sizes()), every
            case "wanda":
                rule = wanda.of_each_output(share)
                return wanda.by_activation(whole, self._ids(), rule), every
            case "magnitude":
                return wanda.by_size(whole, wanda.of_the_matrix(share)), every
            case "wanda-2-of-4":
                return wanda.by_activation(whole, self._ids(), wanda.n_of_m(2, 4)), every
            case "magnitude-2-of-4":
                return wanda.by_size(whole, wanda.n_of_m(2, 4)), every
        return whole, every

    def _chosen_layers(self, count: int) -> list[int]:
        if self.settings.depth_by == "influence":
            return layer_drop.by_influence(self.whole, self._ids(), count)
        return layer_drop.by_loss(self.whole, self._ids()[: self.settings.loss_pieces], count)

    def _sizes(self) -> tuple[int, int]:
        """Feed-forward channels and groups of heads that stay."""
        config = self.whole.config
        even = math.gcd(_EVEN, config.intermediate_size)
        inner = even * max(1, round(self.settings.inner * config.intermediate_size / even))
        return inner, max(1, round(self.settings.groups * config.num_key_value_heads))

    def _ids(self) -> torch.Tensor:
        """The pieces that choices are made by, spread over the text that is learned from."""
        count = min(self.settings.calibration, len(self.data))
        numbers = torch.linspace(0, len(self.data) - 1, count).long()
        return self.data.batch(numbers)[0].to(self.whole.device)

    def tuned(self, name: str) -> Pruned:
        """The model ``name`` trained for the run's steps; what is zero stays zero."""
        folder = self.run.work / name
        body = json_file.read(folder / _FIGURES)
        state, _ = checkpoint.read(folder / model_folder.WEIGHTS)
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # one, where tied
        model: Any = layer_pass.made_anew(self.whole, body["changes"], state)
        masks = {}
        if name in _OF_ZEROS:
            masks = {
                f"model.layers.{number}.{each}.weight": mask
                for number, layer in enumerate(model.model.layers)
                for each in layer_pass.MATRICES
                if not (mask := (layer.get_submodule(each).weight != 0).float()).all()
            }
        network = sparsity.Masked(model, masks) if masks else model
        task = Task(
            f"{name}-tuned",
            network,
            self.data,
            language.loss,
            judge_of(self.text.held, self.text.held_bytes, self.settings.length),
            texts.terms,
            "tok",
            self.settings.length,
        )
        with strictly_repeatable():
            fitted = self.run.fit(task, self.settings)
        model.load_state_dict(sparsity.applied(fitted.state, masks))

        def fill(out: Path) -> None:
            pretrained.write(out, self.found, pretrained.state_of(model), body["changes"])

        own = {key: body["figures"][key] for key in ("parameters", "zeros_share")}
        figures = own | {"perplexity": math.exp(fitted.figures["loss"])} | dict(fitted.figures)
        nats = self._losses(model.eval())
        return Pruned(figures, tuple(nats.tolist()), tuple(body["layers"]), fill)

    def remarks(self, rows: Mapping[str, Pruned]) -> list[str]:
        """What the table does not say."""
        settings = self.settings
        found = [
            f"nothing is trained but what is called tuned; choices were made by"
            f" {min(settings.calibration, len(self.data))} pieces of {settings.length} tokens, and"
            f" judged by other text of {settings.text}; intervals are of 95%, from a paired"
            f" bootstrap over its {len(rows[UNPRUNED].nats)} pieces",
        ]
        for method in dict.fromkeys(settings.methods):
            lost = self._apart(rows[method], rows[UNPRUNED])
            other = self._apart(rows[BESIDE[method]], rows[method])
            found.append(
                f"{method} loses {lost} nats a token, {BESIDE[method]} (as large, chosen without"
                f" a text) {other} more"
            )
        if settings.tune:
            first = f"{settings.methods[0]}-tuned"
            beside = f"{BESIDE[settings.methods[0]]}-tuned"
            lost = self._apart(rows[first], rows[UNPRUNED])
            other = self._apart(rows[beside], rows[first])
            found.append(f"{first} loses {lost} nats a token, {beside} {other} more")
        if "depth" in rows:
            by = f"by {settings.depth_by}"
            if settings.depth_by == "loss":
                by += f" on {settings.loss_pieces} of the pieces"
            found.append(f"layers that stay, chosen {by}: {list(rows['depth'].layers)}")
        whole = rows[UNPRUNED].figures
        for name, row in rows.items():
            if "decode_tok_s" in row.figures and name != UNPRUNED:
                speed = row.figures["decode_tok_s"] / whole["decode_tok_s"]
                size = row.figures["gguf_bytes"] / whole["gguf_bytes"]
                told = f"in llama.cpp {name} decodes at {speed:.2f} times the speed of {UNPRUNED},"
                told += f" in a file {size:.2f} times as large"
                of_zeros = name.removesuffix("-tuned") in _OF_ZEROS
                zeros = "; its kernels skip no zeros" if of_zeros else ""
                found.append(told + zeros)
        return found

    def _apart(self, one: Pruned, other: Pruned) -> str:
        """Nats a token of ``one`` less those of ``other``, with the interval."""
        each = len(one.nats) / self._held_tokens  # so that the mean of the pieces is a loss
        found = bootstrap.paired(*([each * nats for nats in side.nats] for side in (one, other)))
        return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _changes(model: Any) -> dict[str, int]:
    """What of the config is another than that of the model that was pruned."""
    return {name: int(getattr(model.config, name)) for name in _SHAPE}


RECIPE = Recipe(
    "prune-lm",
    PruneLmSettings(
        steps=120,
        batch=4,
        lr=1e-4,
        warmup=0.1,
        weight_decay=0.01,
        checkpoint_every=20,
        log_every=5,
        precision="bf16",
    ),
    run,
)
