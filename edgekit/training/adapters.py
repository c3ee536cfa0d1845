"""Adapters of PEFT round a model of transformers: put in, and written as a folder.

Knows peft and the files of its folders; never a task, nor what the model computes.

LoRA (Hu et al. 2022, section 4.1): W + alpha / r * B A. DoRA (Liu et al. 2024, section 4.1): the
direction of each row so changed, its length learned apart. QLoRA: LoRA on four_bit.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

from edgekit import _fs
from edgekit.training import checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"


def put_in(
    model: torch.nn.Module, *, rank: int, alpha: float, dora: bool, heads: Sequence[str] = ()
) -> torch.nn.Module:
    """``model`` with adapters at all of its linear layers but the output; these alone are trained,
    and ``heads``, modules that are trained whole. Initial values come from torch's generator.
    """
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        exclude_modules=list(heads) or None,
        use_dora=dora,
        modules_to_save=list(heads) or None,
    )
    with warnings.catch_warnings():
        # peft asks transformers 5 by a name that is about to go: nothing that a user can mend.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        found: torch.nn.Module = peft.get_peft_model(model, config)
    return found


@dataclass(frozen=True)
class Adapter:
    """What a folder of peft has: its config, and the matrices."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def size_bytes(self) -> int:
        """Of the matrices."""
        return sum(each.numel() * each.element_size() for each in self.tensors.values())

    def write(self, folder: Path) -> None:
        """As a folder that peft and ``edgekit export --adapter`` read."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config, indent=1, sort_keys=True) + "\n"
        _fs.write_atomic(folder / CONFIG, text.encode())
        checkpoint.write(folder / WEIGHTS, self.tensors)


def taken_from(model: Any, base: str) -> Adapter:
    """The adapters of ``model``; ``base`` is the name of the model that they belong to."""
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    config = model.peft_config[_NAME].to_dict() | {
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    return Adapter(
        {name: _plain(value) for name, value in config.items()},
        {name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()},
    )


def _plain(value: Any) -> Any:
    """JSON-ready: peft keeps sets, whose order changes, and enumerations, which are texts."""
    if isinstance(value, set):
        return sorted(value)
    return value.value if hasattr(value, "value") else value
