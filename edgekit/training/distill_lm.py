"""Recipe: a language model cut down to fewer layers and narrower ones, taught by the whole one.

The student is cut out of its teacher: layers that lie evenly, and of their feed-forward parts the
channels with the largest weights. It learns from the teacher's distribution over the next token
(Hinton et al. 2015, section 2), its hidden states (Jiao et al. 2020, TinyBERT, section 3.1,
equation 8; widths are equal, so nothing is projected) and its last layer's attention (Wang et al.
2020, MiniLM, section 3.1). The baseline is the same student at equal steps without a teacher.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgekit import _fs
from edgekit.errors import RecipeError
from edgekit.formats import json_file
from edgekit.training import deploy, language, model_texts, pretrained, texts
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run, strictly_repeatable
from edgekit.training.settings import setting
from edgekit.training.tinyllama import judge_of
from edgekit.training.trainer import Batch, Fitted, Loss, Task

_CLASS = "AutoModelForCausalLM"


@dataclass(frozen=True)
class DistillLmSettings(model_texts.ModelTextSettings):
    """How much of the teacher is left, and what the student learns from."""

    layers: float = setting(0.7, "share of the layers that stay")
    inner: float = setting(0.75, "share of the feed-forward channels that stay")
    temperature: float = setting(1.0, "of both distributions")
    soft: float = setting(1.0, "weight of the teacher's distribution")
    hard: float = setting(0.5, "weight of the text itself")
    hidden: float = setting(0.1, "weight of the hidden states")
    attention: float = setting(0.1, "weight of the last layer's attention")
    baseline: bool = setting(True, "train the same student without a teacher too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.layers <= 1 and 0 < self.inner <= 1):
            raise RecipeError("layers and inner are shares above 0, and 1 at most")
        if self.temperature <= 0:
            raise RecipeError("temperature must be above 0")
        if min(self.soft, self.hard, self.hidden, self.attention) < 0:
            raise RecipeError("weights must not be negative")


def run(run: Run, settings: DistillLmSettings) -> TrainingReport:
    """Cut, teach, and teach without a teacher; write the student's folder."""
    found = pretrained.opened(run, settings.model)
    text = model_texts.tokens(run, found, settings)
    judge = judge_of(text.held, text.held_bytes, settings.length)
    teacher = pretrained.model(found, _CLASS, eager=settings.attention > 0)
    teacher = teacher.to(run.accelerator.device).eval()
    teacher.requires_grad_(False)
    kept = kept_layers(teacher.config.num_hidden_layers, settings.layers)
    data = texts.Packed(text.train, settings.length)

    def fitted(name: str, loss: Loss) -> Fitted:
        student = cut(teacher, kept, settings.inner)
        task = Task(name, student, data, loss, judge, texts.terms, "tok", settings.length)
        with strictly_repeatable():
            return run.fit(task, settings)

    def untrained(path: Path) -> None:
        with torch.no_grad():
            found = {"teacher": judge(teacher), "cut": judge(cut(teacher, kept, settings.inner))}
        _fs.write_atomic(path, json.dumps(found).encode())

    scores = dict(json_file.read(run.once("untrained.json", untrained)))
    taught = fitted("taught", loss_of(teacher, kept, settings))
    scores["taught"] = taught.figures
    if settings.baseline:
        scores["untaught"] = fitted("untaught", language.loss).figures
    student = cut(teacher, kept, settings.inner)
    counts = {name: _count(student) for name in ("taught", "untaught", "cut")}
    counts["teacher"] = _count(teacher)
    results = [
        Result(name, {"parameters": float(counts[name]), **scores[name]})
        for name in ("taught", "untaught", "cut", "teacher")
        if name in scores
    ]
    remarks = [
        f"{len(kept)} of {teacher.config.num_hidden_layers} layers stay ({kept}), and"
        f" {100 * settings.inner:.0f}% of their feed-forward channels; cut: before any training;"
        " untaught: as many steps without a teacher",
    ]
    if settings.baseline:
        gap = scores["untaught"]["loss"] - scores["teacher"]["loss"]
        gain = scores["untaught"]["loss"] - scores["taught"]["loss"]
        remarks.append(
            f"of the {gap:.3f} nats a token between teacher and untaught student, the teacher"
            f" gives back {gain:.3f}: {100 * gain / gap:.0f}%"
        )
    student.load_state_dict(taught.state)
    changes = {
        "num_hidden_layers": len(kept),
        "intermediate_size": student.config.intermediate_size,
    }

    def fill(folder: Path) -> None:
        pretrained.write(folder, found, pretrained.state_of(student), changes)

    if settings.latency and run.main:
        results[0].figures.update(deploy.gguf_figures(run, fill))
    return run.finish(fill, results, remarks)


def _count(model: torch.nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def kept_layers(count: int, share: float) -> list[int]:
    """Numbers of the layers that stay, evenly, the first and the last among them."""
    stay = max(1, round(share * count))
    return [round(place) for place in np.linspace(0, count - 1, stay).tolist()]


@torch.no_grad()
def cut(teacher: Any, kept: list[int], inner: float) -> Any:
    """A student with the layers ``kept``, and of their feed-forward parts the share ``inner`` of
    channels: those with the largest product of the norms of what leads in and out.
    """
    config = teacher.config.to_dict()
    wide = max(1, round(inner * teacher.config.intermediate_size))
    config |= {"num_hidden_layers": len(kept), "intermediate_size": wide}
    config.pop("layer_types", None)
    config = type(teacher.config).from_dict(config)
    attention = teacher.config._attn_implementation
    student = type(teacher)._from_config(config, attn_implementation=attention).to(teacher.device)
    student.config.use_cache = False
    whole = teacher.state_dict()
    state = {}
    for name in student.state_dict():
        parts = name.split(".")
        source = name
        if parts[:2] == ["model", "layers"]:
            source = ".".join(["model", "layers", str(kept[int(parts[2])]), *parts[3:]])
        state[name] = whole[source]
    for number in range(len(kept)):
        names = [f"model.layers.{number}.mlp.{part}.weight" for part in ("gate_proj", "up_proj")]
        down = f"model.layers.{number}.mlp.down_proj.weight"
        gate_in, up_in = (state[name].norm(dim=1) for name in names)
        best = (gate_in * up_in * state[down].norm(dim=0)).topk(wide).indices.sort().values
        state |= {name: state[name][best] for name in names} | {down: state[down][:, best]}
    student.load_state_dict(state)
    return student.train()


def loss_of(teacher: Any, kept: list[int], settings: DistillLmSettings) -> Loss:
    """The weighted sum of what the student learns from, for each target."""

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
            pairs = zip(mine.hidden_states[1:], kept, strict=True)
            found = [_distance(one, theirs.hidden_states[at + 1]) for one, at in pairs]
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
        steps=120,
        batch=4,
        lr=3e-4,
        warmup=0.1,
        weight_decay=0.01,
        checkpoint_every=20,
        log_every=5,
        precision="bf16",
        length=128,
        train_chars=4_000_000,
    ),
    run,
)
