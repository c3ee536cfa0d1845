"""Recipe: a small Llama from raw text: tokenizer, pretraining, and tuning on questions and answers.

The architecture and the sizes follow Zhang et al. 2024, "TinyLlama: An Open-Source Small Language
Model", section 2.2; the largest size is theirs. Pretraining predicts each next token. Tuning does
so on answers alone (Ouyang et al. 2022, InstructGPT, section 3.5, its supervised part).

The baseline is a 5-gram Kneser-Ney model of the same tokens, judged in bits per byte on the same
held-out text; it counts the whole training text, the Llama reads as much as its steps allow. Where
that is less than the whole, another n-gram model counts as much.
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
from tokenizers import Tokenizer

from edgekit import _fs
from edgekit.errors import RecipeError
from edgekit.training import bootstrap, checkpoint, deploy, language, optimizer, texts
from edgekit.training.experts import balances, unstacked
from edgekit.training.kneser_ney import KneserNey
from edgekit.training.llama import Llama, Shape
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run, strictly_repeatable
from edgekit.training.settings import Settings, setting
from edgekit.training.trainer import Batch, Fitted, Loss, Task

# Name -> width, inner width, layers, heads, heads of keys and values, vocabulary.
SIZES = {
    "toy": Shape(64, 128, 2, 4, 2, 512),
    "1m": Shape(128, 384, 4, 4, 2, 2048),
    "5m": Shape(256, 768, 5, 4, 2, 4096),
    "15m": Shape(384, 1024, 8, 6, 2, 8192),
    "110m": Shape(768, 2048, 12, 12, 4, 32000),
    "1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
}
_OPTIMIZERS = {"muon": optimizer.muon, "adamw": optimizer.adamw}


@dataclass(frozen=True)
class TinyLlamaSettings(Settings):
    """The size, the text, and how long to tune. ``batch`` counts pieces of ``length`` tokens."""

    size: Literal["toy", "1m", "5m", "15m", "110m", "1.1b"] = setting("5m", "of the model")
    text: str = setting("prose", "a .txt file, a folder of them, or prose (benchmarks/train/fetch)")
    pairs: str = setting("prose", "JSON lines with prompt and answer, or prose; empty: no tuning")
    length: int = setting(256, "tokens of a piece, and of a chat")
    n_ctx: int = setting(1024, "context that config.json promises")
    held_tokens: int = setting(60_000, "most tokens of held-out text to judge by")
    tune_steps: int = setting(200, "steps of tuning")
    tune_lr: float = setting(5e-4, "highest learning rate of tuning")
    optimizer: Literal["muon", "adamw"] = setting("muon", "of the matrices within the blocks")
    ngram: bool = setting(True, "judge a 5-gram Kneser-Ney model too")
    experts: int = setting(0, "feed-forward parts of a block, each as much smaller; 0: one")
    chosen: int = setting(2, "of the experts, for each token")
    capacity: float = setting(1.25, "most of its fair share that an expert takes in training")
    balance: float = setting(0.01, "weight of the loss that keeps experts equally busy")
    twin: bool = setting(True, "with experts: train the dense model with as much work a token too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2 or self.n_ctx < self.length:
            raise RecipeError("length must be 2 or more, and n_ctx no less")
        if self.held_tokens < 2 or self.tune_steps < 1:
            raise RecipeError("held_tokens and tune_steps must be more")
        if self.experts and not 0 < self.chosen <= self.experts:
            raise RecipeError("chosen must be 1 to experts")
        if self.experts and self.optimizer == "muon":
            raise RecipeError(
                "experts are stacks of matrices, which Muon does not take",
                hint="--set optimizer=adamw",
            )
        if self.experts < 0 or self.capacity <= 0 or self.balance < 0:
            raise RecipeError("experts, capacity and balance must not be negative")
        if self.experts and SIZES[self.size].inner % self.chosen:
            raise RecipeError(
                f"{SIZES[self.size].inner} channels cannot be shared by {self.chosen}"
            )


def run(run: Run, settings: TinyLlamaSettings) -> TrainingReport:
    """Tokenize, pretrain, judge against n-grams, tune; write a Hugging Face folder."""
    dense = SIZES[settings.size]
    shape = _sparse(dense, settings) if settings.experts else dense
    found = texts.read(settings.text)
    if settings.pairs:
        texts.pairs(_pairs_at(settings))  # what is wrong with them is told before the pretraining

    def make_tokenizer(path: Path) -> None:
        tokenizer = texts.byte_pairs(found.train, shape.vocab)
        _fs.write_atomic(path, tokenizer.to_str(pretty=True).encode())

    tokenizer = Tokenizer.from_file(str(run.once("tokenizer.json", make_tokenizer)))
    tokens = {}
    for name, blocks in (("train", found.train), ("held", found.held)):
        packed = run.once(f"{name}.tokens", partial(texts.pack, tokenizer, blocks))
        tokens[name] = texts.tokens_of(tokenizer, packed)
    held = texts.spread(tokens["held"], settings.held_tokens, 8 * settings.length)
    held_bytes = len(tokenizer.decode(held[1:].tolist(), skip_special_tokens=True).encode())
    data = texts.Packed(tokens["train"], settings.length)
    judge = judge_of(held, held_bytes, settings.length)

    pretrained = _pretrained(run, settings, "pretrain", shape, data, judge)
    results = [
        _result(run, settings, "sparse" if settings.experts else "tinyllama", shape, pretrained)
    ]
    remarks = _remarks(settings, held, held_bytes)
    twin = None
    if settings.experts and settings.twin:
        twin = _pretrained(run, settings, "dense", dense, data, judge)
        results.append(_result(run, settings, "dense twin", dense, twin))
    ours = _losses(shape, pretrained, held, settings.length)
    if twin:
        its = _losses(dense, twin, held, settings.length)
        remarks.append(ahead(results[0].name, ours, results[1].name, its, held_bytes))
    if settings.ngram and run.main:
        whole = np.asarray(tokens["train"])
        read = settings.steps * settings.batch * settings.length
        rivals = {"": whole}
        if read < len(whole):
            rivals[", as many tokens"] = texts.spread(whole, read, 8 * settings.length)
        for more, read_by_it in rivals.items():
            rival, nats = judge_ngram(read_by_it, held, held_bytes, shape.vocab)
            results.append(replace(rival, name=rival.name + more))
            theirs = by_window(nats, held, settings.length)
            remarks.append(ahead(results[0].name, ours, results[-1].name, theirs, held_bytes))
    tuned, figures = pretrained, None
    if settings.pairs:
        tuned, figures = tune(run, settings, shape, tokenizer, pretrained)
        remarks.append(
            "loss on held-out answers in nats a token: pretrained"
            f" {figures[0]:.3f}, tuned {figures[1]:.3f}"
        )

    def fill(which: Shape, state: dict[str, torch.Tensor], folder: Path) -> None:
        write_folder(folder, which, settings.n_ctx, tokenizer, state)

    if settings.latency and run.main:
        results[0].figures.update(deploy.gguf_figures(run, partial(fill, shape, tuned.state)))
        if twin:
            results[1].figures.update(deploy.gguf_figures(run, partial(fill, dense, twin.state)))
    return run.finish(partial(fill, shape, tuned.state), results, remarks)


def _sparse(dense: Shape, settings: TinyLlamaSettings) -> Shape:
    """Experts so narrow that those of a token do together what the dense model does."""
    return replace(
        dense,
        inner=dense.inner // settings.chosen,
        experts=settings.experts,
        chosen=settings.chosen,
        capacity=settings.capacity,
    )


def _pretrained(
    run: Run,
    settings: TinyLlamaSettings,
    name: str,
    shape: Shape,
    data: texts.Packed,
    judge: Callable[[torch.nn.Module], dict[str, float]],
) -> Fitted:
    torch.manual_seed(settings.seed)
    loss = loss_of(shape, settings.balance)
    task = Task(
        *(name, Llama(shape), data, loss, judge, texts.terms, "tok", settings.length),
        optimizers=_OPTIMIZERS[settings.optimizer],
    )
    with strictly_repeatable():
        return run.fit(task, settings)


def loss_of(shape: Shape, balance: float) -> Loss:
    """Cross-entropy, and with experts for each target ``balance`` times the loss of their routers
    (Fedus et al. 2022, Switch Transformers, section 2.2, equation 4, averaged over the layers).
    """
    if not shape.experts:
        return language.loss

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        found = language.loss(model, batch)
        if not model.training:
            return found
        return found + balance * texts.terms(batch) * balances(model) / shape.layers

    return loss


def _result(
    run: Run, settings: TinyLlamaSettings, name: str, shape: Shape, fitted: Fitted
) -> Result:
    parameters = float(sum(each.numel() for each in Llama(shape).parameters()))
    figures = {"parameters": parameters}
    if settings.experts:
        figures["active_parameters"] = float(shape.matrices)
        if fitted.taken_bytes is not None:
            figures["training_bytes"] = 4 * parameters + fitted.taken_bytes
    figures |= fitted.figures
    figures["trained_tokens"] = float(fitted.steps * settings.batch * settings.length)
    figures["training_tok_s"] = fitted.per_s
    figures["mfu"] = mfu(fitted, shape, settings, run.accelerator.device)
    return Result(name, figures)


def _remarks(settings: TinyLlamaSettings, held: np.ndarray[Any, Any], held_bytes: int) -> list[str]:
    found = [
        f"held out: {len(held) - 1:,} tokens, {held_bytes:,} bytes of {settings.text}, each token"
        f" judged once; the Llama sees {settings.length // 2} to {settings.length} tokens before"
        " it, fewer at the very beginning",
        "mfu: operations of training (PaLM, appendix B) against the fastest matrix product that"
        f" torch makes here in {settings.precision}; the time has the evaluations in it",
    ]
    if settings.experts:
        found.append(
            f"sparse: {settings.experts} experts a block, {settings.chosen} for each token, each"
            f" 1/{settings.chosen} as wide as the twin's feed-forward part;"
            " training_bytes: the weights, and what the first two steps took beside them, which is"
            " gradients, AdamW's two values and activations"
        )
    return found


def judge_of(
    held: np.ndarray[Any, Any], held_bytes: int, length: int
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """A function that gives nats a token and bits a byte on ``held``, each token judged once."""
    losses = losses_of(held, length)
    return lambda model: figures_of(losses(model), len(held) - 1, held_bytes)


def figures_of(nats: torch.Tensor, tokens: int, held_bytes: int) -> dict[str, float]:
    """Nats a token and bits a byte, of the ``nats`` of all pieces of a held-out text."""
    total = float(nats.sum())
    return {"loss": total / tokens, "bits_per_byte": total / math.log(2) / held_bytes}


def losses_of(held: np.ndarray[Any, Any], length: int) -> Callable[[torch.nn.Module], torch.Tensor]:
    """A function that gives the nats of all targets of each piece of ``held``, as texts.windows
    cuts it: float64 [pieces] on the CPU.
    """
    ids, targets = texts.windows(held, length)

    def losses(model: torch.nn.Module) -> torch.Tensor:
        device = next(model.parameters()).device
        found = []
        for numbers in torch.arange(len(ids)).split(16):
            batch = (ids[numbers].to(device), targets[numbers].to(device))
            with torch.no_grad():
                found.append(-language.log_probabilities(model, batch).double().cpu())
        return torch.cat(found)

    return losses


def _losses(shape: Shape, fitted: Fitted, held: np.ndarray[Any, Any], length: int) -> torch.Tensor:
    model = Llama(shape)
    model.load_state_dict(fitted.state)
    return losses_of(held, length)(model.eval())


def judge_ngram(
    train: np.ndarray[Any, Any], held: np.ndarray[Any, Any], held_bytes: int, vocab: int
) -> tuple[Result, torch.Tensor]:
    """The same figures of the Kneser-Ney model, and its nats of each token but the first."""
    model = KneserNey(train, vocab)
    nats = -torch.from_numpy(np.asarray(model.log_probabilities(held))).double()
    figures = figures_of(nats, len(held) - 1, held_bytes) | {"trained_tokens": float(len(train))}
    return Result(f"{model.order}-gram Kneser-Ney", figures), nats


def by_window(nats: torch.Tensor, held: np.ndarray[Any, Any], length: int) -> torch.Tensor:
    """``nats`` of all tokens of ``held`` but the first, summed over the targets of each window."""
    counts = (texts.windows(held, length)[1] >= 0).sum(1)
    return torch.stack([part.sum() for part in nats.split(counts.tolist())])


def ahead(name: str, ours: torch.Tensor, rival: str, theirs: torch.Tensor, held_bytes: int) -> str:
    """How far apart two models are whose nats of each window of the held-out text these are."""
    bits = len(ours) / math.log(2) / held_bytes  # so that the mean of the windows is per byte
    gain = bootstrap.paired((bits * ours).tolist(), (bits * theirs).tolist())
    return (
        f"bits per byte of {name} less those of {rival}: {gain.value:+.3f} [{gain.low:+.3f},"
        f" {gain.high:+.3f}] (95%, paired bootstrap over {len(ours)} pieces of held-out text)"
    )


def _pairs_at(settings: TinyLlamaSettings) -> Path:
    return texts.named(settings.pairs, "definitions.jsonl")


def tune(
    run: Run, settings: TinyLlamaSettings, shape: Shape, tokenizer: Tokenizer, start: Fitted
) -> tuple[Fitted, tuple[float, float]]:
    """Go on from ``start`` with answers only; the loss on held-out answers before and after too."""
    train, held = texts.pairs(_pairs_at(settings))
    pad = tokenizer.get_vocab()[texts.END]
    answers, held_answers = (
        texts.Answers(texts.longest_first(texts.chats(tokenizer, chosen)), settings.length, pad)
        for chosen in (train, held[:400])
    )
    judge = language.judge_answers(held_answers)
    model = Llama(shape)
    model.load_state_dict(start.state)
    with torch.no_grad():
        before = judge(model.eval())["loss"]
    loss = loss_of(shape, settings.balance)
    task = Task(
        *("tune", model, answers, loss, judge, texts.terms, "answers"),
        optimizers=_OPTIMIZERS[settings.optimizer],
    )
    with strictly_repeatable():
        tuned = run.fit(
            task,
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
    # Not ones: chips that watch their power are faster at those.
    one = torch.randn(side, side, device=device).to(kind)
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
    checkpoint.write(folder / "model.safetensors", unstacked(state))


# For a quarter of an hour on two cores, which is less than one pass: small batches, a high rate and
# Muon make most of few tokens.
RECIPE = Recipe(
    "tinyllama",
    TinyLlamaSettings(
        steps=1000,
        batch=16,
        lr=4e-3,
        min_lr=0.02,
        schedule="wsd",
        decay=0.5,
        warmup=0.03,
        weight_decay=0.1,
        checkpoint_every=100,
        precision="bf16",
    ),
    run,
)
