"""Recipe: two encoders, one for pictures and one for sentences, that meet in one space (CLIP).

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
https://arxiv.org/abs/2103.00020, section 2.3 and figure 3: of a batch of pairs each picture is
to find its sentence, and each sentence its picture. Likenesses are multiplied by a scale that is
learned, 1 / 0.07 at first and 100 at most (section 2.5). The baseline never reads a word: the same
encoder of pictures with a head for each attribute (size, colour, digit, place), trained on as many
pictures. Both are asked for the whole caption; one in ten of all captions was kept from training.

The folder is a Hugging Face one: ``edgekit export`` makes two graphs of it that classify by words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel

from edgekit import _fs
from edgekit.errors import DataError, RecipeError
from edgekit.training import captioned_digits, checkpoint, classify, deploy, images, optimizer
from edgekit.training.captioned_digits import ATTRIBUTES, CAPTIONS, MARKS, Scenes
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run
from edgekit.training.settings import Settings, setting
from edgekit.training.trainer import Batch, Loss, Task

_EVAL_BATCH = 250
_TEST_SEED = 1 << 20  # no run's own seed
_N_CTX = 16
_RECALL = 5
_HIGHEST_SCALE = 100.0  # of likenesses


@dataclass(frozen=True)
class DualEncoderSettings(Settings):
    """The pictures and the encoders' sizes."""

    data: str = setting("mnist", "digits to draw: mnist, or a folder of grey images, 10 classes")
    scenes: int = setting(40000, "different pictures to train on")
    test_scenes: int = setting(2000, "to test on, of digits that no training saw")
    side: int = setting(32, "of a picture, in pixels")
    patch: int = setting(8, "side of a patch, in pixels")
    width: int = setting(64, "of a token, in both encoders")
    depth: int = setting(3, "blocks of the pictures' encoder")
    text_depth: int = setting(2, "blocks of the sentences' encoder")
    heads: int = setting(4, "of attention")
    space: int = setting(32, "dimensions of the common space")
    baseline: bool = setting(True, "train the encoder with a head for each attribute too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.scenes, self.test_scenes, self.patch, self.heads, self.space) < 1:
            raise RecipeError("scenes, test_scenes, patch, heads and space are at least 1")
        if self.side % self.patch or self.width % self.heads:
            raise RecipeError("side must be a multiple of patch, and width of heads")
        if self.parallel == "fsdp":
            raise RecipeError("the temperature is a single number, which has no shards")


class Named(nn.Module):
    """The pictures' encoder with one head for all attributes: float32 [batch, 3, side, side] ->
    logits [batch, 2 + 6 + 10 + 5].
    """

    def __init__(self, clip: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = clip.vision_model
        self.head = nn.Linear(width, sum(map(len, ATTRIBUTES)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.encoder(pixel_values=pixels).pooler_output)
        return logits


def run(run: Run, settings: DualEncoderSettings) -> TrainingReport:
    """Train the pair of encoders, and the baseline; write the first with the report of both."""
    digits = images.load(settings.data, side=28, channels=1, say=run.say)
    if len(digits.labels) != len(captioned_digits.DIGITS):
        raise DataError(
            f"{settings.data} has {len(digits.labels)} classes, the digits are 10",
            hint="mnist, or a folder with one folder a digit",
        )
    unseen = captioned_digits.unseen()
    train = Scenes(
        digits.train, settings.scenes, side=settings.side, seed=settings.seed, allowed=~unseen
    )
    test = Scenes(
        *(digits.test, settings.test_scenes),
        side=settings.side,
        seed=_TEST_SEED,
        allowed=torch.ones_like(unseen),
    )
    words = captioned_digits.tokenizer()
    ids = captioned_digits.tokens(words, CAPTIONS)
    config = _config(settings, words.get_vocab_size())
    torch.manual_seed(settings.seed)
    clip = CLIPModel(config)
    task = Task(
        "clip",
        clip,
        train,
        contrastive(ids),
        _evaluation(_by_likeness(ids), test, unseen),
        unit="pairs",
        optimizers=clipped,
    )
    fitted = {"clip": run.fit(task, settings)}
    results = [Result("clip", {"parameters": _count(clip)} | fitted["clip"].figures)]
    remarks = [
        f"tested on {len(test):,} pictures of digits that no training saw; accuracy: the one right"
        f" caption of {len(CAPTIONS)}; accuracy unseen: of the {int(unseen.sum())} captions that no"
        f" training saw; caption recall: it is among the first five; picture recall: of the"
        f" {len(test.captions.unique())} captions that pictures show, those whose first, or one of"
        " whose first five pictures of all shows it"
    ]
    if settings.baseline:
        torch.manual_seed(settings.seed)
        named = Named(CLIPModel(config), settings.width)
        task = Task(
            "heads",
            named,
            train,
            _attributes_loss,
            _evaluation(_by_heads, test, unseen),
            unit="pictures",
        )
        fitted["heads"] = run.fit(task, settings)
        results.append(Result("heads", {"parameters": _count(named)} | fitted["heads"].figures))
        if run.main:
            clip.load_state_dict(fitted["clip"].state)
            named.load_state_dict(fitted["heads"].state)
            hits = [
                _right(answer, network.to(run.accelerator.device), test)
                for answer, network in ((_by_likeness(ids), clip), (_by_heads, named))
            ]
            lead = classify.bootstrap(hits[0].tolist(), hits[1].tolist())
            remarks.append(f"accuracy of clip less that of heads: {classify.points(lead)}")

    def fill(folder: Path) -> None:
        write_folder(folder, config, words, settings.side, fitted["clip"].state)

    if settings.latency and run.main:
        results[0].figures.update(deploy.tower_figures(run, fill))
    return run.finish(fill, results, remarks)


def clipped(model: nn.Module, settings: Settings) -> optimizer.Optimizers:
    """AdamW, after each of whose steps the scale of the likenesses is brought down to 100, where it
    is more: training gets unstable beyond that (section 2.5).
    """
    (found,) = optimizer.adamw(model, settings)
    # By the end of its name, for a copy of several processes lies in a module of its own.
    (scale,) = (each for name, each in model.named_parameters() if name.endswith("logit_scale"))

    def clip(*_: Any) -> None:
        scale.detach().clamp_(max=math.log(_HIGHEST_SCALE))

    found.register_step_post_hook(clip)
    return (found,)


def contrastive(ids: torch.Tensor) -> Loss:
    """Half of the cross-entropy of each picture among the batch's sentences, and of each sentence
    among its pictures, summed over the pairs (section 2.3, figure 3). Pictures of one batch that
    share a caption are each other's too: their part of the target is even.
    """

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        pixels, captions = batch
        found = model(input_ids=ids.to(pixels.device)[captions], pixel_values=pixels)
        likeness = found.logits_per_image.float()
        same = (captions.unsqueeze(1) == captions.unsqueeze(0)).float()
        target = same / same.sum(1, keepdim=True)
        both = F.cross_entropy(likeness, target, reduction="sum")
        both = both + F.cross_entropy(likeness.t(), target, reduction="sum")
        return both / 2

    return loss


def _attributes_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    pixels, captions = batch
    wanted = captioned_digits.attributes().to(captions.device)[captions]
    parts = model(pixels).float().split([len(each) for each in ATTRIBUTES], dim=1)
    losses = [
        F.cross_entropy(part, wanted[:, number], reduction="sum")
        for number, part in enumerate(parts)
    ]
    return torch.stack(losses).sum()


# A model's logits for each caption: float32 [pictures, captions].
Answer = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def _by_likeness(ids: torch.Tensor) -> Answer:
    def answer(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        found = model(input_ids=ids.to(pixels.device), pixel_values=pixels)
        logits: torch.Tensor = found.logits_per_image.float()
        return logits

    return answer


def _by_heads(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The sum of the log-probabilities of a caption's attributes."""
    parts = model(pixels).float().split([len(each) for each in ATTRIBUTES], dim=1)
    found = [part.log_softmax(1) for part in parts]
    of_captions = captioned_digits.attributes().to(pixels.device)
    columns = [part[:, of_captions[:, number]] for number, part in enumerate(found)]
    return torch.stack(columns).sum(0)


def _evaluation(
    answer: Answer, test: Scenes, unseen: torch.Tensor
) -> Callable[[nn.Module], dict[str, float]]:
    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = torch.cat([each.cpu() for each, _ in _answers(answer, model, test)])
        captions = test.captions
        right = logits.argmax(1) == captions
        new = unseen[captions]
        return {
            "loss": float(F.cross_entropy(logits, captions)),
            "accuracy": float(right.float().mean()),
            "accuracy_unseen": float(right[new].float().mean()) if new.any() else 0.0,
            **retrieval(logits, captions),
        }

    return evaluate


def retrieval(logits: torch.Tensor, captions: torch.Tensor) -> dict[str, float]:
    """How often what is looked for is among the first five (recall at 5), both ways, and the first
    (recall at 1) for sentences; for pictures that is the accuracy.

    ``logits`` are [pictures, all captions], ``captions`` the number of each picture's own. A
    sentence looks for any picture that shows it; those that no picture shows are left out.
    """
    five = min(_RECALL, *logits.shape)
    shown = captions.unique()
    nearest = logits.t()[shown].topk(five, dim=1).indices
    found = captions[nearest] == shown.unsqueeze(1)
    words = logits.topk(five, dim=1).indices == captions.unsqueeze(1)
    return {
        "caption_recall_5": float(words.any(1).float().mean()),
        "picture_recall_1": float(found[:, 0].float().mean()),
        "picture_recall_5": float(found.any(1).float().mean()),
    }


def _answers(answer: Answer, model: nn.Module, test: Scenes) -> Any:
    device = next(model.parameters()).device
    for numbers in torch.arange(len(test)).split(_EVAL_BATCH):
        pixels, captions = test.batch(numbers)
        yield answer(model, pixels.to(device)), captions.to(device)


@torch.no_grad()
def _right(answer: Answer, model: nn.Module, test: Scenes) -> torch.Tensor:
    found = [
        logits.argmax(1) == captions for logits, captions in _answers(answer, model.eval(), test)
    ]
    return torch.cat(found).cpu()


def _count(network: nn.Module) -> float:
    return float(sum(each.numel() for each in network.parameters()))


def _config(settings: DualEncoderSettings, n_vocab: int) -> CLIPConfig:
    shared = {
        "hidden_size": settings.width,
        "intermediate_size": 2 * settings.width,
        "num_attention_heads": settings.heads,
        "projection_dim": settings.space,
    }
    words = {
        "vocab_size": n_vocab,
        "max_position_embeddings": _N_CTX,
        "num_hidden_layers": settings.text_depth,
        "pad_token_id": MARKS.index("<pad>"),
        "bos_token_id": MARKS.index("<start>"),
        "eos_token_id": MARKS.index("<end>"),
    }
    sizes = {
        "image_size": settings.side,
        "patch_size": settings.patch,
        "num_hidden_layers": settings.depth,
    }
    return CLIPConfig(
        text_config=shared | words, vision_config=shared | sizes, projection_dim=settings.space
    )


def write_folder(
    folder: Path, config: CLIPConfig, words: Any, side: int, state: Mapping[str, torch.Tensor]
) -> None:
    """A Hugging Face folder: config, preprocessing, tokenizer, weights."""
    about = {"architectures": ["CLIPModel"]}
    for name, body in (
        ("config.json", config.to_dict() | about),
        ("preprocessor_config.json", captioned_digits.preprocessor(side)),
        ("tokenizer_config.json", {"model_max_length": _N_CTX, "pad_token": "<pad>"}),
    ):
        _fs.write_atomic(folder / name, (json.dumps(body, indent=1) + "\n").encode())
    _fs.write_atomic(folder / "tokenizer.json", words.to_str(pretty=True).encode())
    checkpoint.write(folder / "model.safetensors", dict(state))


RECIPE = Recipe(
    "dual-encoder",
    DualEncoderSettings(
        steps=1500,
        batch=64,
        lr=1e-3,
        eval_every=500,
        checkpoint_every=200,
        weight_decay=0.05,
    ),
    run,
)
