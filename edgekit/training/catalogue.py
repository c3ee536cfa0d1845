"""What each recipe is, in a line, and what it has reached: the rows of ``edgekit train --list``.

Knows words and figures alone, so that a list needs no torch. Every figure was printed by the
command that stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """``measured`` is a result in a few words, and ``command`` what printed it; empty: not yet.
    Several commands are parted by "; ". ``into`` is the format that its folder is exported to.
    """

    about: str
    measured: str = ""
    command: str = ""
    into: str = "onnx"


CATALOGUE = {
    "diffusion": Entry(
        "A generator of digits (DDPM, DDIM): noise in, images out.",
        "Fréchet distance 2.25, a Gaussian of all pixels 37.65; the judge is sure of 17.47%, of"
        " training images of 88.73% (three seeds)",
        "SEEDS=3 benchmarks/train/run diffusion",
    ),
    "distill": Entry(
        "A small image classifier that learns from a large one, beside one alone.",
        "58% of the gap in loss given back to a student of a quarter of the weights and a tenth of"
        " the images",
        "benchmarks/train/run distill",
    ),
    "distill-lm": Entry(
        "A language model cut down to fewer, narrower layers and taught by the whole one.",
        "SmolLM2 cut to 97,349,184 of 134,515,008 weights, little text: perplexity 47.95, alone"
        " 268.7, uncut 32.5",
        "benchmarks/train/run distill-lm steps=300 train_chars=150000 lr=5e-4",
        into="gguf",
    ),
    "dual-encoder": Entry(
        "Pictures and sentences in one space (CLIP): a classifier by words.",
        "the right one of 600 captions for 49.02% of the pictures, in the first five for 91.83%"
        " (three seeds)",
        "SEEDS=3 benchmarks/train/run dual-encoder",
    ),
    "finetune": Entry(
        "A language model taught anew: LoRA, QLoRA, DoRA or all weights; answers or preferences.",
        "SmolLM2 on glosses, 30 steps, nats a token of held-out answers: before 4.089, LoRA 2.547,"
        " QLoRA 2.580, DoRA 2.544, all weights 2.478 (three seeds)",
        "SEEDS=3 benchmarks/train/run finetune",
        into="gguf",
    ),
    "finetune-vit": Entry(
        "A vision transformer taught anew from 1,000 images: five methods side by side.",
        "digits: LoRA 80.53%, all weights 78.58%, adapters 69.35%, linear probe 50.67%, from"
        " scratch 48.35%",
        "benchmarks/train/run low-data",
    ),
    "minimal": Entry(
        "Smallest image classifier by constraint: shifts and 1x1 convolutions only.",
        "91.86% on Fashion-MNIST, 99.50% on 2,000 digits of MNIST, 96,490 parameters; 3x3"
        " convolutions 91.96% and 99.50%",
        "benchmarks/train/run minimal",
    ),
    "nas": Entry(
        "A network found by a search: accuracy against latency and memory, in hours.",
        "found: 87.86% on Fashion-MNIST at 0.116 ms; drawn by hand: 88.20% at 0.298 ms",
        "benchmarks/train/run nas hours=0.5",
    ),
    "prune": Entry(
        "A convolutional network cut down channel by channel to a latency, and tuned.",
        "2.14 times as fast in ONNX Runtime at 92.32% on Fashion-MNIST, uncut 92.82% (three seeds)",
        "SEEDS=3 benchmarks/train/run prune sparse=no tune_steps=2700",
    ),
    "prune-lm": Entry(
        "A language model made smaller at once: layers, channels or single weights go.",
        "SmolLM2 cut to 114.6 of 134.5 million weights: perplexity 46.8 for 28.5, a loss of 0.495"
        " nats a token; chosen by size 10.931 more",
        "benchmarks/train/run prune-lm held_tokens=8000 calibration=16",
        into="gguf",
    ),
    "tinyllama": Entry(
        "A small Llama from raw text: tokenizer, pretraining, tuning on answers; or of experts.",
        "1.342 bits per byte of held-out prose, 5-gram Kneser-Ney 1.391 (1.394 of as many tokens);"
        " of 15.7 million weights 1.301;"
        " 8 experts, 2 chosen: training at 2,139 tok/s in 697 MB, the dense twin at 2,334 in 442",
        "benchmarks/train/run tinyllama; benchmarks/train/run edgekit-tiny;"
        " SEEDS=3 benchmarks/train/run sparse-experts",
        into="gguf",
    ),
    "video": Entry(
        "A classifier of short clips: frames that meet by shifts of channels (TSM).",
        "99.98% on eight motions of digits; without shifts 34.95%, at most 50% without order (three"
        " seeds)",
        "SEEDS=3 benchmarks/train/run video",
    ),
    "vit-qat": Entry(
        "A vision transformer of 4-bit weights and activations, by learned steps.",
        "88.25% on Fashion-MNIST, its float control 88.41%; w3a3: 87.66%",
        "benchmarks/train/run vit-qat",
    ),
}
