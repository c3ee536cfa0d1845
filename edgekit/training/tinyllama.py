"""Recipe: a small Llama from raw text: tokenizer, pretraining, and tuning on questions and answers.

The architecture and the sizes follow Zhang et al. 2024, "TinyLlama: An Open-Source Small Language
Model", section 2.2; the largest size is theirs. Pretraining predicts each next token. Tuning does
so on answers alone (Ouyang et al. 2022, InstructGPT, section 3.5, its supervised part).

The baseline is a 5-gram Kneser-Ney model of the same tokens, judged in bits per byte on the same
held-out text; it reads the whole training text, the Llama as much as its steps allow.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from edgekit import _fs
from edgekit.errors import RecipeError
from edgekit.training import checkpoint, deploy, texts
from edgekit.training.kneser_ney import KneserNey
from edgekit.training.llama import Llama, Shape
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run
from edgekit.training.settings import Settings, setting
from edgekit.training.trainer import Batch, Fitted, Task

# Name -> width, inner width, layers, heads, heads of keys and values, vocabulary.
SIZES = {
    "toy": Shape(64, 128, 2, 4, 2, 512),
    "1m": Shape(128, 384, 4, 4, 2, 2048),
    "5m": Shape(256, 768, 6, 8, 4, 4096),
    "15m": Shape(384, 1024, 8, 6, 2, 8192),
    "110m": Shape(768, 2048, 12, 12, 4, 32000),
    "1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
}


@dataclass(frozen=True)
class TinyLlamaSettings(Settings):
    """The size, the text, and how long to tune. ``batch`` counts pieces of ``length`` tokens."""

    size: Literal["toy", "1m", "5m", "15m", "110m", "1.1b"] = setting("5m", "of the model")
    text: str = setting("prose", "a .txt file, a folder of them, or prose (benchmarks/train/fetch)")
    pairs: str = setting("prose", "JSON lines with prompt and answer, or prose; empty: no tuning")
    length: int = setting(256, "tokens of a piece, and of a chat")
    n_ctx: int = setting(1024, "context that config.json promises")
    held_tokens: int = setting(60_000, "tokens of held-out text to judge by")
    tune_steps: int = setting(300, "steps of tuning")
    tune_lr: float = setting(5e-4, "highest learning rate of tuning")
    ngram: bool = setting(True, "judge a 5-gram Kneser-Ney model too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2 or self.n_ctx < self.length:
            raise RecipeError("length must be 2 or more, and n_ctx no less")
        if self.held_tokens < 2 or self.tune_steps < 1:
            raise RecipeError("held_tokens and tune_steps must be more")


def run(run: Run, settings: TinyLlamaSettings) -> TrainingReport:
    """Tokenize, pretrain, judge against n-grams, tune; write a Hugging Face folder."""
    shape = SIZES[settings.size]
    found = texts.read(settings.text)

    def make_tokenizer(path: Path) -> None:
        texts.byte_pairs(found.train, shape.vocab).save(str(path))

    tokenizer = Tokenizer.from_file(str(run.once("tokenizer.json", make_tokenizer)))
    tokens = {}
    for name, blocks in (("train", found.train), ("held", found.held)):
        packed = run.once(f"{name}.tokens", partial(texts.pack, tokenizer, blocks))
        tokens[name] = texts.tokens_of(tokenizer, packed)
    held = np.asarray(tokens["held"][: settings.held_tokens + 1])
    held_bytes = len(tokenizer.decode(held[1:].tolist(), skip_special_tokens=True).encode())

    torch.manual_seed(settings.seed)
    pretrain = Task(
        "pretrain",
        Llama(shape),
        texts.Packed(tokens["train"], settings.length),
        next_token_loss,
        judge_of(held, held_bytes, settings.length),
        texts.terms,
        unit="tok",
        units=settings.length,
    )
    pretrained = run.fit(pretrain, settings)
    speed = mfu(pretrained, shape, settings, run.accelerator.device)
    results = [
        Result(
            "tinyllama",
            {
                "parameters": float(sum(p.numel() for p in Llama(shape).parameters())),
                **pretrained.figures,
                "trained_tokens": float(pretrained.steps * settings.batch * settings.length),
                "mfu": speed,
            },
        )
    ]
    if settings.ngram and run.main:
        results.append(judge_ngram(np.asarray(tokens["train"]), held, held_bytes, shape.vocab))
    remarks = [
        f"held out: {len(held) - 1:,} tokens, {held_bytes:,} bytes of {settings.text}, each token"
        " judged once; the Llama sees at most one piece before it",
        "mfu: operations of training (PaLM, appendix B) against the fastest matrix product that"
        f" torch makes here in {settings.precision}",
    ]
    tuned, figures = pretrained, None
    if settings.pairs:
        tuned, figures = tune(run, settings, shape, tokenizer, pretrained)
        remarks.append(
            "loss on held-out answers in nats a token: pretrained"
            f" {figures[0]:.3f}, tuned {figures[1]:.3f}"
        )

    def fill(folder: Path) -> None:
        write_folder(folder, shape, settings.n_ctx, tokenizer, tuned.state)

    if settings.latency and run.main:
        results[0].figures.update(deploy.gguf_figures(run, fill))
    return run.finish(fill, results, remarks)


def next_token_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy in nats, summed over the targets."""
    ids, targets = batch
    logits = model(ids).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), reduction="sum")


def judge_of(
    held: np.ndarray[Any, Any], held_bytes: int, length: int
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """A function that gives nats a token and bits a byte on ``held``, each token judged once."""

    def judge(model: torch.nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        total, count = 0.0, len(held) - 1
        whole = count // length * length
        pieces = [held[: whole + 1]] if whole else []
        for tokens in [*pieces, held[whole:]]:
            if len(tokens) < 2:
                continue
            wide = min(length, len(tokens) - 1)
            data = texts.Packed(tokens, wide)
            for numbers in torch.arange(len(data)).split(16):
                ids, targets = (each.to(device) for each in data.batch(numbers))
                total += next_token_loss(model, (ids, targets)).item()
        return {"loss": total / count, "bits_per_byte": total / math.log(2) / held_bytes}

    return judge


def judge_ngram(
    train: np.ndarray[Any, Any], held: np.ndarray[Any, Any], held_bytes: int, vocab: int
) -> Result:
    """The same figures of the Kneser-Ney model."""
    model = KneserNey(train, vocab)
    total = -float(model.log_probabilities(held).sum())
    return Result(
        f"{model.order}-gram Kneser-Ney",
        {
            "loss": total / (len(held) - 1),
            "bits_per_byte": total / math.log(2) / held_bytes,
            "trained_tokens": float(len(train)),
        },
    )


def tune(
    run: Run, settings: TinyLlamaSettings, shape: Shape, tokenizer: Tokenizer, start: Fitted
) -> tuple[Fitted, tuple[float, float]]:
    """Go on from ``start`` with answers only; the loss on held-out answers before and after too."""
    path = Path(settings.pairs).expanduser()
    if not path.exists() and settings.pairs.isidentifier():
        path = _fs.home("cache") / "data" / settings.pairs / "definitions.jsonl"
    train, held = texts.pairs(path)
    held_answers = texts.Answers(tokenizer, held[:400], settings.length)

    def judge(model: torch.nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        total, count = 0.0, 0
        for numbers in torch.arange(len(held_answers)).split(32):
            ids, targets = (each.to(device) for each in held_answers.batch(numbers))
            total += float(next_token_loss(model, (ids, targets)))
            count += int(texts.terms((ids, targets)))
        return {"loss": total / count}

    model = Llama(shape)
    # Every process needs the weights, and only the main one has them where they were sharded.
    weights = run.once("pretrained.safetensors", lambda p: checkpoint.write(p, start.state))
    model.load_state_dict(checkpoint.read(weights)[0])
    with torch.no_grad():
        before = judge(model.eval())["loss"]
    tuned = run.fit(
        Task(
            *("tune", model, texts.Answers(tokenizer, train, settings.length)),
            *(next_token_loss, judge, texts.terms),
            unit="tok",
            units=settings.length,
        ),
        replace(settings, steps=settings.tune_steps, lr=settings.tune_lr, schedule="cosine"),
    )
    return tuned, (before, tuned.figures["loss"])


def mfu(fitted: Fitted, shape: Shape, settings: TinyLlamaSettings, device: torch.device) -> float:
    """Model FLOPs utilization: what training computes by need, over what the device can compute."""
    return (
        fitted.per_s * shape.train_flops(settings.length) / peak_flops(device, settings.precision)
    )


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second of the fastest of five matrix products, in the run's precision."""
    side = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    one = torch.ones(side, side, dtype=kind, device=device)
    best_s = math.inf
    for _ in range(5):
        begun_s = time.perf_counter()
        found = one @ one
        found[0, 0].item()  # waits for the device
        best_s = min(best_s, time.perf_counter() - begun_s)
    return 2.0 * side**3 / best_s


def write_folder(
    folder: Path, shape: Shape, n_ctx: int, tokenizer: Tokenizer, state: dict[str, torch.Tensor]
) -> None:
    """A Hugging Face folder: config, tokenizer with a chat template, weights."""
    ids = tokenizer.get_vocab()
    end, turn_end = ids[texts.END], ids[texts.TURN_END]
    config = shape.config(
        n_ctx, {"bos_token_id": end, "eos_token_id": turn_end, "pad_token_id": end}
    )
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": texts.END,
        "eos_token": texts.TURN_END,
        "pad_token": texts.END,
        "add_bos_token": False,
        "model_max_length": n_ctx,
        "clean_up_tokenization_spaces": False,
        "chat_template": texts.CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": end, "eos_token_id": [turn_end, end], "pad_token_id": end}
    for name, body in (
        ("config.json", config),
        ("tokenizer_config.json", about),
        ("generation_config.json", generation),
    ):
        _fs.write_atomic(folder / name, (json.dumps(body, indent=1) + "\n").encode())
    _fs.write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    checkpoint.write(folder / "model.safetensors", state)


RECIPE = Recipe(
    "tinyllama",
    TinyLlamaSettings(
        steps=900,
        batch=16,
        lr=3e-3,
        min_lr=0.1,
        schedule="wsd",
        decay=0.3,
        warmup=0.05,
        weight_decay=0.1,
        eval_every=300,
        checkpoint_every=100,
        precision="bf16",
    ),
    run,
)
