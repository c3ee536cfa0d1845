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
    folder: Path, kind: Any, config: Any, preprocessor: dict[str, Any] | None = None
) -> Path:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # wide, so that the answers differ from input to input
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder, safe_serialization=True)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def end_the_process(path: str) -> None:
    """What an engine does that aborts while it opens ``path``."""
    os.abort()
