"""Small real vision models and encoders: transformers' own classes with seeded weights, as folders,
and a module of plain torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

SIDE = 32
LABELS = ("cat", "dog", "fish", "bird", "tree", "house", "car", "boat", "shoe", "lamp")
WORDS = "a the cat dog sits on mat much longer text with many words and of in is it was for"


def vit_folder(folder: Path, **changed: Any) -> Path:
    """A ViT of two blocks that classifies images of 32 x 32 into ten classes."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
    }
    config = ViTConfig(**sizes | changed, id2label=dict(enumerate(LABELS)))
    return _saved(folder, ViTForImageClassification, config, _preprocessor(SIDE))


def resnet_folder(folder: Path) -> Path:
    """A ResNet of two stages with the same classes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(LABELS)),
    )
    body = _preprocessor(SIDE) | {
        "size": {"shortest_edge": SIDE + 4},
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    return _saved(folder, ResNetForImageClassification, config, body)


def deit_folder(folder: Path) -> Path:
    """A distilled DeiT of two blocks with the same classes: two tokens, of two classifiers the
    mean.
    """
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    config = DeiTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        id2label=dict(enumerate(LABELS)),
    )
    # As the published folders spell it: one number for both edges.
    body = _preprocessor(SIDE) | {"image_processor_type": "DeiTImageProcessor", "size": SIDE + 4}
    body |= {"do_center_crop": True, "crop_size": SIDE, "resample": 3}
    return _saved(folder, DeiTForImageClassificationWithTeacher, config, body)


def mobilenet_folder(folder: Path) -> Path:
    """A MobileNetV2 of a quarter of the channels with the same classes."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(
        depth_multiplier=0.25,
        finegrained_output=False,
        image_size=SIDE,
        id2label=dict(enumerate(LABELS)),
    )
    body = _preprocessor(SIDE) | {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "size": SIDE + 4,
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    return _saved(folder, MobileNetV2ForImageClassification, config, body)


def efficientnet_folder(folder: Path) -> Path:
    """An EfficientNet of three stages with the same classes."""
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        width_coefficient=0.25,
        depth_coefficient=1.0,
        kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 40],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 1],
        expand_ratios=[1, 6, 6],
        hidden_dim=320,  # 1280 times the width
        image_size=SIDE,
        id2label=dict(enumerate(LABELS)),
    )
    body = _preprocessor(SIDE) | {
        "image_processor_type": "EfficientNetImageProcessor",
        "resample": 0,
        "rescale_offset": True,
        "include_top": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.478, 0.473, 0.474],
    }
    return _saved(folder, EfficientNetForImageClassification, config, body, sees_images=True)


def bert_folder(folder: Path) -> Path:
    """A BERT of two layers with a tokenizer of words and letters, for embeddings."""
    from transformers import BertConfig, BertModel

    tokenizer = _word_pieces()
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    made = _saved(folder, BertModel, config)
    tokenizer.save(str(made / "tokenizer.json"))
    return made


def clip_folder(folder: Path, kind: str = "CLIP") -> Path:
    """Two encoders of two layers each in one space; ``kind`` is "CLIP" or "Siglip"."""
    import transformers

    shared = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    words = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "projection_size": 64}
    # The end of a text is [SEP], as the tokenizer writes it.
    words |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    sizes = {"image_size": SIDE, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(
        text_config=shared | words, vision_config=shared | sizes, projection_dim=32
    )
    made = _saved(folder, getattr(transformers, f"{kind}Model"), config, _preprocessor(SIDE))
    _word_pieces().save(str(made / "tokenizer.json"))
    return made


VOCABULARY = 300


def _word_pieces() -> Any:
    """A tokenizer of words and letters, with BERT's marks."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split(), *letters]
    pieces = list(dict.fromkeys([*pieces, *(f"##{letter}" for letter in letters)]))
    pieces += [f"[unused{i}]" for i in range(VOCABULARY - len(pieces))]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def cnn_module() -> torch.nn.Module:
    """Three convolutions with batch norms of real statistics, and a classifier."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for before, after in ((3, 8), (8, 16), (16, 32)):
        layers += [
            torch.nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            torch.nn.BatchNorm2d(after),
            torch.nn.ReLU(),
        ]
    layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10)]
    model = torch.nn.Sequential(*layers).train()
    for _ in range(4):
        model(torch.randn(8, 3, SIDE, SIDE))
    return model.eval()


def _preprocessor(side: int) -> dict[str, Any]:
    return {
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _saved(
    folder: Path,
    kind: Any,
    config: Any,
    preprocessor: dict[str, Any] | None = None,
    *,
    sees_images: bool = False,
) -> Path:
    """``sees_images`` gives batch norms statistics of some noise."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # wide, so that the answers differ from input to input
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
    if sees_images:
        model.train()
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, torch.nn.BatchNorm2d):
                    layer.weight.fill_(1)
            for _ in range(8):
                model(torch.randn(16, 3, SIDE, SIDE))
        model.eval()
    model.save_pretrained(folder, safe_serialization=True)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def end_the_process(path: str) -> None:
    """What an engine does that aborts while it opens ``path``."""
    os.abort()
