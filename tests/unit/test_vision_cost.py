"""The cost of an image is what the papers say of their networks."""

from __future__ import annotations

from typing import Any

import pytest

from edgekit import vision_cost
from edgekit.errors import SourceError, UnsupportedModelError

B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "hidden_dim": 1280}
TINY = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}


@pytest.mark.parametrize(
    ("config", "gmacs", "weights_m", "activations_m"),
    [
        ({"model_type": "mobilenet_v1"}, 0.57, 4.2, 5.0),
        ({"model_type": "mobilenet_v2"}, 0.30, 3.5, 6.7),
        ({"model_type": "efficientnet", **B0}, 0.39, 5.3, 6.7),
        ({"model_type": "resnet"}, 4.1, 25.6, 11.1),
        (
            {"model_type": "resnet", "layer_type": "basic", "depths": [2, 2, 2, 2]}
            | {"hidden_sizes": [64, 128, 256, 512]},
            1.8,
            11.7,
            2.5,
        ),
        ({"model_type": "vit"}, 17.6, 86.6, None),
        ({"model_type": "deit", **TINY}, 1.26, 5.7, None),
    ],
    ids=["mobilenet_v1", "mobilenet_v2", "efficientnet_b0", "resnet50", "resnet18", "vit", "deit"],
)
def test_networks_cost_what_their_papers_say(
    config: dict[str, Any], gmacs: float, weights_m: float, activations_m: float | None
) -> None:
    found = vision_cost.required(config)
    assert found.flops / 2e9 == pytest.approx(gmacs, rel=0.04)
    assert found.weights / 1e6 == pytest.approx(weights_m, rel=0.03)
    if activations_m:
        assert found.activations / 1e6 == pytest.approx(activations_m, rel=0.05)
    assert found.peak < found.activations


def test_a_language_model_is_no_vision_model() -> None:
    assert vision_cost.cost({"model_type": "llama"}) is None
    with pytest.raises(UnsupportedModelError, match="mobilenet"):
        vision_cost.required({"model_type": "mobilenet"})


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "vit", "image_size": 0},
        {"model_type": "vit", "image_size": "224"},
        {"model_type": "vit", "num_hidden_layers": 1 << 19},
        {"model_type": "resnet", "depths": [1 << 19]},
        {"model_type": "resnet", "depths": 3},
        {"model_type": "efficientnet", "width_coefficient": -1},
        {"model_type": "efficientnet", "depth_coefficient": float("nan")},
    ],
    ids=str,
)
def test_absurd_sizes_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        vision_cost.required(config)
