"""Recipe: a language model cut down to fewer layers and narrower ones, taught by the whole one.

The student is cut out of its teacher, by what a text does in it (``layer_drop``, ``narrow_layers``)
or by size: layers that lie evenly, feed-forward channels with the largest weights. It learns from
the teacher's distribution over the next token (Hinton et al. 2015, section 2), its hidden states
(Jiao et al. 2020, TinyBERT, section 3.1, equation 8; widths are equal, so nothing is projected) and
its last layer's attention (Wang et al. 2020, MiniLM, section 3.1). The baseline is the same student
at equal steps without a teacher.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from edgekit import _fs, model_folder
from edgekit.errors import RecipeError
from edgekit.formats import json_file
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
    texts,
)
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run, strictly_repeatable
from edgekit.training.settings import setting
from edgekit.training.tinyllama import judge_of, losses_of
from edgekit.training.trainer import Batch, Fitted, Loss, Task

_CLASS = "AutoModelForCausalLM"
_CUT = "cut.json"
_ALONE = "untaught.safetensors"
_EVEN = 32  # channels: what GGUF's 8-bit blocks and the engines' kernels like


@dataclass(frozen=True)
class DistillLmSettings(model_texts.ModelTextSettings):
    """How much of the teacher is left, and what the student learns from."""

    layers: float = setting(0.8, "share of the layers that stay")
    inner: float = setting(0.75, "share of the feed-forward channels that stay")
    cut_by: Literal["text", "size"] = setting(
        "text",
        "text: a Llama's layers that turn it most, channels that the rest cannot stand in for;"
        " size: layers evenly, and the largest weights",
    )
    calibration: int = setting(32, "pieces of text that the cut is made by")
    temperature: float = setting(1.0, "of both distributions")
    soft: float = setting(1.0, "weight of the teacher's distribution")
    hard: float = setting(0.5, "weight of the text itself")
    hidden: float = setting(1.0, "weight of the hidden states")
    attention: float = setting(0.0, "weight of the last layer's attention")
    baseline: bool = setting(True, "train the same student without a teacher too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.layers <= 1 and 0 < self.inner <= 1):
            raise RecipeError("layers and inner are shares above 0, and 1 at most")
        if self.calibration < 1:
            raise RecipeError("calibration is 1 or more")
        if self.temperature <= 0:
            raise RecipeError("temperature must be above 0")
        if min(self.soft, self.hard, self.hidden, self.attention) < 0:
            raise RecipeError("weights must not be negative")


def run(run: Run, settings: DistillLmSettings) -> TrainingReport:
    """Cut, teach, and teach without a teacher; write the student's folder."""
    found = pretrained.opened(run, settings.model)
    text = model_texts.tokens(run, found, settings)
    judge = judge_of(text.held, text.held_bytes, settings.length)
    losses = losses_of(text.held, settings.length)
    teacher = pretrained.model(found, _CLASS, eager=settings.attention > 0)
    teacher = teacher.to(run.accelerator.device).eval()
    teacher.requires_grad_(False)
    if settings.cut_by == "text":
        check(teacher)
    data = texts.Packed(text.train, settings.length)

    def untrained(folder: Path) -> None:
        folder.mkdir()
        student, kept = begun(teacher, data, settings)
        checkpoint.write(folder / model_folder.WEIGHTS, pretrained.state_of(student))
        body = {"layers": kept, "inner": student.config.intermediate_size}
        _fs.write_atomic(folder / _CUT, json.dumps(body).encode())

    folder = run.once("untrained", untrained)
    shape = json_file.read(folder / _CUT)
    kept, inner = list(shape["layers"]), int(shape["inner"])
    changes = {"num_hidden_layers": len(kept), "intermediate_size": inner}

    def untaught() -> Any:
        state, _ = checkpoint.read(folder / model_folder.WEIGHTS)
        if teacher.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return layer_pass.made_anew(teacher, changes, state)

    def judged(name: str, model: Any) -> list[float]:
        """Nats of each held-out piece, once in a run."""

        def make(path: Path) -> None:
            _fs.write_atomic(path, json.dumps(losses(model.eval()).tolist()).encode())

        return list(json_file.read(run.once(f"{name}.json", make)))

    def fitted(name: str, loss: Loss) -> Fitted:
        evaluate = judge if settings.eval_every else None  # in the end it is judged below
        task = Task(name, untaught(), data, loss, evaluate, texts.terms, "tok", settings.length)
        with strictly_repeatable():
            return run.fit(task, settings)

    pieces = {"teacher": judged("teacher", teacher), "cut": judged("cut", untaught())}
    taught = fitted("taught", loss_of(teacher, kept, settings))
    student = untaught()
    if settings.baseline:
        student.load_state_dict(fitted("untaught", language.loss).state)
        pieces["untaught"] = judged("untaught", student)
        # In a file, so that no two students are held at a time.
        run.once(_ALONE, lambda path: checkpoint.write(path, pretrained.state_of(student)))
    student.load_state_dict(taught.state)
    pieces["taught"] = judged("taught", student)
    results = [
        Result(name, _figures(teacher if name == "teacher" else student, pieces[name], text))
        for name in ("taught", "untaught", "cut", "teacher")
        if name in pieces
    ]
    remarks = [
        f"{len(kept)} of {teacher.config.num_hidden_layers} layers stay ({kept}), and"
        f" {inner} of their {teacher.config.intermediate_size} feed-forward channels, by"
        f" {settings.cut_by}; cut: before any training; untaught: as many steps without a teacher",
    ]
    if settings.baseline:
        remarks.append(_given_back(pieces, len(text.held) - 1))

    def fill(folder: Path) -> None:
        pretrained.write(folder, found, pretrained.state_of(student), changes)

    def fill_alone(folder: Path) -> None:
        pretrained.write(folder, found, checkpoint.read(run.work / _ALONE)[0], changes)

    def fill_teacher(folder: Path) -> None:
        pretrained.write(folder, found, pretrained.state_of(teacher))

    if settings.latency and run.main:
        fills = {"taught": fill, "untaught": fill_alone, "teacher": fill_teacher}
        exported = {name: each for name, each in fills.items() if name in pieces}
        timed = deploy.gguf_figures_of(run, exported)
        for row in results:
            row.figures.update(timed.get(row.name, {}))
    return run.finish(fill, results, remarks)


def _figures(
    model: torch.nn.Module, pieces: list[float], text: model_texts.ModelText
) -> dict[str, float]:
    loss = sum(pieces) / (len(text.held) - 1)
    return {
        "parameters": float(sum(each.numel() for each in model.parameters())),
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": sum(pieces) / math.log(2) / text.held_bytes,
    }


def _given_back(pieces: Mapping[str, list[float]], tokens: int) -> str:
    """How much of what the student lacks without a teacher it has with one."""
    gap = (sum(pieces["untaught"]) - sum(pieces["teacher"])) / tokens
    each = len(pieces["taught"]) / tokens  # so that the mean of the pieces is a loss
    gain = bootstrap.paired(
        *([each * nats for nats in pieces[name]] for name in ("untaught", "taught"))
    )
    return (
        f"of the {gap:.3f} nats a token between teacher and untaught student, the teacher gives"
        f" back {gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}] (95%, paired bootstrap over"
        f" {len(pieces['taught'])} held-out pieces): {100 * gain.value / gap:.0f}%"
    )


def check(teacher: Any) -> None:
    """Raises RecipeError for what cannot be cut by a text, with what to do."""
    try:
        layer_pass.check(teacher)
    except RecipeError as error:
        raise RecipeError(str(error), hint="--set cut_by=size") from None


def begun(teacher: Any, data: texts.Packed, settings: DistillLmSettings) -> tuple[Any, list[int]]:
    """The student before it is trained, and the numbers of its layers in the teacher."""
    count, inner = teacher.config.num_hidden_layers, teacher.config.intermediate_size
    kept = kept_layers(count, settings.layers)
    if settings.cut_by == "size":
        return cut(teacher, kept, settings.inner), kept
    numbers = torch.linspace(0, len(data) - 1, min(settings.calibration, len(data))).long()
    ids = data.batch(numbers)[0].to(teacher.device)
    kept = layer_drop.by_influence(teacher, ids, count - len(kept))
    short = layer_pass.with_layers(teacher, kept)
    even = math.gcd(_EVEN, inner)
    inner = even * max(1, round(settings.inner * inner / even))
    groups = teacher.config.num_key_value_heads
    return narrow_layers.by_activation(short, ids, inner, groups), kept


def kept_layers(count: int, share: float) -> list[int]:
    """Numbers of the layers that stay, evenly, the first and the last among them."""
    stay = max(1, round(share * count))
    return [round(place) for place in np.linspace(0, count - 1, stay).tolist()]


@torch.no_grad()
def cut(teacher: Any, kept: list[int], inner: float) -> Any:
    """A student with the layers ``kept``, and of their feed-forward parts the share ``inner`` of
    channels: those with the largest product of the norms of what leads in and out.
    """
    wide = max(1, round(inner * teacher.config.intermediate_size))
    short = layer_pass.with_layers(teacher, kept)
    state = short.state_dict()
    for number in range(len(kept)):
        names = [f"model.layers.{number}.mlp.{part}.weight" for part in ("gate_proj", "up_proj")]
        down = f"model.layers.{number}.mlp.down_proj.weight"
        gate_in, up_in = (state[name].norm(dim=1) for name in names)
        best = (gate_in * up_in * state[down].norm(dim=0)).topk(wide).indices.sort().values
        state |= {name: state[name][best] for name in names} | {down: state[down][:, best]}
    return layer_pass.made_anew(short, {"intermediate_size": wide}, state)


def loss_of(teacher: Any, kept: list[int], settings: DistillLmSettings) -> Loss:
    """The weighted sum of what the student learns from, for each target. What leaves a layer shall
    be what enters the teacher's layer that the next one was, or what leaves its last: so layers
    make up for those that are gone behind them.
    """
    places = [*kept[1:], teacher.config.num_hidden_layers]

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        ids, targets = batch
        wants = {
            "output_hidden_states": settings.hidden > 0,
            "output_attentions": settings.attention > 0,
        }
        with torch.no_grad():
            theirs = teacher(ids, **wants)
        mine = model(ids, **wants)
        total = settings.hard * F.cross_entropy(
            mine.logits.float().flatten(0, 1), targets.flatten(), reduction="sum"
        )
        count = targets.numel()
        total = total + settings.soft * soft_loss(mine.logits, theirs.logits, settings.temperature)
        if settings.hidden:
            pairs = zip(mine.hidden_states[1:], places, strict=True)
            found = [_distance(one, theirs.hidden_states[at]) for one, at in pairs]
            total = total + settings.hidden * count * torch.stack(found).mean()
        if settings.attention:
            one, other = mine.attentions[-1].float(), theirs.attentions[-1].float()
            total = total + settings.attention * count * attention_loss(one, other)
        return total

    return loss


def soft_loss(mine: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher, student) of distributions at temperature T, summed over the tokens (Hinton et
    al. 2015, section 2, equation 1, and the factor that its last paragraph asks for).
    """
    found: torch.Tensor = F.kl_div(
        (mine.float() / temperature).log_softmax(-1).flatten(0, 1),
        (theirs.float() / temperature).log_softmax(-1).flatten(0, 1),
        reduction="sum",
        log_target=True,
    )
    return temperature**2 * found


def attention_loss(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(teacher, student) of attention's distributions [batch, heads, from, to], the mean of all
    (Wang et al. 2020, MiniLM, equation 6).
    """
    tiny = math.ulp(1.0)
    each = theirs * ((theirs + tiny).log() - (mine + tiny).log())
    return each.sum(-1).mean()


def _distance(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The mean square of the difference, for each token against that of the teacher's own values:
    layers differ by orders of magnitude, and so do tokens (Sun et al. 2024, "Massive activations in
    large language models", section 2): the first of a text would drown all others.
    """
    size = theirs.float().square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((mine.float() - theirs.float()).square().mean(-1) / size).mean()


RECIPE = Recipe(
    "distill-lm",
    DistillLmSettings(
        steps=60,
        batch=4,
        lr=3e-4,
        warmup=0.1,
        weight_decay=0.01,
        checkpoint_every=20,
        log_every=5,
        precision="bf16",
        length=128,
        held_tokens=4000,
        train_chars=4_000_000,
    ),
    run,
)
