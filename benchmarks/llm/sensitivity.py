"""Is SmolLM2 more sensitive to quantization than a model of another family? Trains one and asks.

The rival is a small Qwen2 (4 layers, 256 wide) with byte-level BPE of its own, trained here on a
text for a few minutes, so that its distributions mean something. Both are compared on the end of
that text, which it never saw; SmolLM2 starts from its fair float reference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import presets
import reference

from edgekit import sensitivity_plot
from edgekit.cli.ending import ending
from edgekit.sensitivity import (
    DEFAULT_BITS,
    DEFAULT_LAYERS,
    DEFAULT_PART_BYTES,
    DEFAULT_TEXT_BYTES,
    sensitivity,
)
from edgekit.sensitivity_report import Report

_VOCABULARY = 2048
_POSITIONS = 512
_BATCH = 2
_HELD_OUT = 0.1
_TEXT_CHUNKS = 160  # of presets' text: 640 kB
_PEAK_RATE = 2e-3
_WARM_UP = 0.05


@dataclass(frozen=True)
class Trained:
    """The rival's folder, and how far its training came (nats per token)."""

    folder: Path
    first_loss: float
    last_loss: float
    tokens: int

    @property
    def facts(self) -> dict[str, float]:
        """For JSON: all but the folder."""
        return {name: value for name, value in vars(self).items() if name != "folder"}


def train_tokenizer(text: str, folder: Path) -> Any:
    """Byte-level BPE that splits like GPT-2's, written as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return tokenizer


def train(text: str, folder: Path, seconds: float, seed: int) -> Trained:
    """A Qwen2 that was trained on ``text`` for so long, as a Hugging Face folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = train_tokenizer(text, folder)
    tokens = torch.tensor(tokenizer.encode(text).ids)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=_POSITIONS,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, betas=(0.9, 0.95))
    losses: list[float] = []
    started = time.monotonic()
    while (share := (time.monotonic() - started) / seconds) < 1 or not losses:
        starts = torch.randint(len(tokens) - _POSITIONS, (_BATCH,)).tolist()
        batch = torch.stack([tokens[at : at + _POSITIONS] for at in starts])
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_RATE * min(share / _WARM_UP, 1 - share, 1) + 1e-5
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 25 == 0:
            measure.say(f"step {len(losses)}, {share:.0%}, loss {losses[-1]:.2f}")
    model.save_pretrained(folder)
    last = losses[-20:]
    return Trained(folder, losses[0], sum(last) / len(last), len(losses) * _BATCH * _POSITIONS)


def trained_once(text: str, scratch: Path, seconds: float, seed: int) -> Trained:
    """``train``, or what an earlier run made of the same text in as many seconds."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = scratch / f"rival-{seed}-{seconds:g}s-{digest}" / "qwen2-small"
    facts = folder / "training.json"
    if facts.is_file():
        return Trained(folder, **json.loads(facts.read_text()))
    measure.say("training the rival")
    found = train(text, folder, seconds, seed)
    facts.write_text(json.dumps(found.facts))
    return found


def _print(report: Report, trained: Trained) -> None:
    for answer in report.answers:
        print(f"{answer.sentence}\n")
    measure.table(
        f"Quantized to the same widths, over {report.text_bytes:,} bytes of text; the rival saw"
        f" {trained.tokens:,} tokens (loss {trained.first_loss:.2f} to {trained.last_loss:.2f})",
        [
            *("model", "bits", "type", "bits/weight", "KL, nats/token", "KL, bits/byte"),
            *("perplexity ratio", "same top-1"),
        ],
        [
            [
                model.name,
                row.bits,
                row.type,
                f"{row.bits_per_weight:.2f}",
                _interval(row.mean_kl),
                _interval(row.kl_per_byte),
                f"{row.perplexity_ratio.value:.4f}",
                f"{row.top1.value:.1%}",
            ]
            for model in report.models
            for row in model.bits
        ],
    )
    for model in report.models:
        parts = sorted((*model.kinds, *model.layers), key=lambda row: -row.mean_kl.value)
        if not parts:
            continue
        measure.table(
            f"{model.name}: alone at {report.part_bits} bits, all else in floats",
            ["part", "type", "of the weights", "KL, nats/token"],
            [
                [
                    f"layer {row.name}" if row.name.isdigit() else row.name,
                    "/".join(row.types),
                    f"{row.share_of_weights:.1%}",
                    _interval(row.mean_kl),
                ]
                for row in parts
            ],
        )
    for note in report.notes:
        print(f"Note: {note}.")


def _interval(found: Any) -> str:
    return f"{found.value:.3g} ({found.low:.3g}..{found.high:.3g})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny settings: shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="models, reused")
    parser.add_argument("--text", type=Path, metavar="FILE", help="to train on and to compare on")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training (default 4)")
    parser.add_argument("--layers", type=int, default=DEFAULT_LAYERS, help="to quantize alone")
    parser.add_argument(
        "--text-bytes", type=int, default=DEFAULT_TEXT_BYTES, help="that both models read"
    )
    parser.add_argument(
        "--part-bytes", type=int, default=DEFAULT_PART_BYTES, help="for one part quantized alone"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="pictures, .png or .svg")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train, compare, print."""
    arguments = _arguments()
    figures: dict[str, Any] = {"machine": measure.describe_machine()}
    scratch = measure.scratch(arguments)
    text = presets.held_out_text(arguments.text, _TEXT_CHUNKS).decode("utf-8", "replace")
    cut = int(len(text) * (1 - _HELD_OUT))
    seconds, layers = arguments.minutes * 60, arguments.layers
    bits: tuple[int, ...] = DEFAULT_BITS
    options: dict[str, Any] = {
        "text_bytes": arguments.text_bytes,
        "part_bytes": arguments.part_bytes,
    }
    if arguments.quick:
        seconds, bits, layers = 20.0, (8, 2), 1
        options = {"text_bytes": 4000, "part_bytes": 2000, "n_ctx": 128, "chunks": 2}
    trained = trained_once(text[:cut], scratch, seconds, arguments.seed)
    models = [reference.make(scratch, arguments.seed), trained.folder]
    stage = ""

    def progress(name: str, _done: int, _total: int) -> None:
        nonlocal stage
        if name != stage:
            stage = name
            measure.say(name)

    report = sensitivity(models, text[cut:], bits=bits, layers=layers, progress=progress, **options)
    _print(report, trained)
    if arguments.plot:
        for path in sensitivity_plot.draw(report, arguments.plot):
            measure.say(f"drew {path}")
    measure.finish(arguments, figures | {"training": trained.facts, "report": report.to_dict()})


if __name__ == "__main__":
    with ending():
        main()
