"""A model of two encoders, one for images and one for texts, as two modules that can be traced.

Knows how CLIP (https://arxiv.org/abs/2103.00020) and SigLIP (https://arxiv.org/abs/2303.15343) put
both into one space, and how alike they call them; never ONNX.
"""

from __future__ import annotations

import math
from typing import Any

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters import torch_model
from edgekit.exporters.torch_model import TracedModel
from edgekit.preprocess import Matching, Preprocessing, encoders, of_folder
from edgekit.source import ModelSource

TEXT_FILE = "text.onnx"
IMAGE_OUTPUT, TEXT_OUTPUT = "image_embeds", "text_embeds"
_LENGTH = 12  # tokens of the texts that are traced
_MOST_SCALE = 1e4  # real ones lie near 100


def build(source: ModelSource) -> tuple[Preprocessing, TracedModel, TracedModel]:
    """What makes their inputs, the images' encoder, and the texts'.

    Raises as ``torch_model.build``.
    """
    torch = torch_model.load_torch()
    if "tokenizer.json" not in source.files:
        raise UnsupportedModelError(
            f"{source.spec} has no tokenizer.json",
            hint="save its tokenizer with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    model = torch_model.loaded(source, "AutoModel")
    matching = _matching(model, source)
    steps = of_folder(source.config, matching=matching, **torch_model.companions(source))
    # The texts that SigLIP saw were all of one length; CLIP's attend to what came before alone, so
    # that padding behind the end changes nothing, and needs no mask.
    assert steps.image is not None and steps.text is not None
    image, text = encoders(steps)
    pixels = torch.zeros(1, len(steps.image.mean), steps.image.height, steps.image.width)
    axes = {0: "batch"} if steps.text.padded else {0: "batch", 1: "sequence"}
    return (
        steps,
        TracedModel(
            _encoder(torch, model, model.vision_model, "pixel_values", "visual_projection"),
            (pixels,),
            ("pixel_values",),
            (IMAGE_OUTPUT,),
            {"pixel_values": {0: "batch"}, IMAGE_OUTPUT: {0: "batch"}},
            image,
        ),
        TracedModel(
            _encoder(torch, model, model.text_model, "input_ids", "text_projection"),
            (_text_example(torch, model, steps),),
            ("input_ids",),
            (TEXT_OUTPUT,),
            {"input_ids": axes, TEXT_OUTPUT: {0: "batch"}},
            text,
        ),
    )


def _matching(model: Any, source: ModelSource) -> Matching:
    """The temperature of both families is a weight, kept as its logarithm."""
    scale = math.exp(min(100.0, float(model.logit_scale.detach().reshape(-1)[0])))
    alone = hasattr(model, "logit_bias")
    bias = float(model.logit_bias.detach().reshape(-1)[0]) if alone else 0.0
    if not (0 < scale < _MOST_SCALE and math.isfinite(bias)):
        raise SourceError(f"{source.spec} multiplies likeness by {scale:.3g}: its weights are odd")
    return Matching(TEXT_FILE, scale, bias, alone)


def _text_example(torch: Any, model: Any, steps: Preprocessing) -> Any:
    """int64 [2, tokens]: texts of different tokens, with their end where the model looks for it."""
    assert steps.text is not None
    config = model.config.text_config
    most = steps.text.max_length
    length = most if steps.text.padded else min(_LENGTH, most // 2)  # twice that is tried, too
    ids = torch.arange(2 * length).reshape(2, length) % max(2, config.vocab_size - 2)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and end < config.vocab_size:
        # With an end of 2 the model takes the largest token for it: that is how old folders are.
        ids[ids == end] = 0
        ids[0, -1] = ids[1, length // 2] = config.vocab_size - 1 if end == 2 else end
    return ids


def _encoder(torch: Any, model: Any, part: Any, name: str, projection: str) -> Any:
    """The pooled output of ``part``, in the common space."""

    class Encoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.part = part
            # SigLIP's parts end in the common space by themselves.
            self.projection = getattr(model, projection, None) or torch.nn.Identity()

        def forward(self, tensor: Any) -> Any:
            return self.projection(self.part(**{name: tensor}).pooler_output)

    return Encoder().eval()
