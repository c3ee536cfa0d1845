"""What moves the weights: AdamW for all of them, or Muon for the matrices between a network's ends.

Knows parameters and the run's settings; never a loss, nor the course of the rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from edgekit.training.settings import Settings

Optimizers = tuple[torch.optim.Optimizer, ...]
Choose = Callable[[torch.nn.Module, Settings], Optimizers]


def adamw(model: torch.nn.Module, settings: Settings) -> Optimizers:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) for whatever is trained."""
    return (_adamw([each for each in model.parameters() if each.requires_grad], settings),)


def muon(model: torch.nn.Module, settings: Settings) -> Optimizers:
    """Muon for the matrices of the blocks, AdamW for the table of embeddings and for vectors.

    The momentum of a matrix is brought to where all its singular values are about one (Jordan et
    al. 2024, "Muon: an optimizer for hidden layers in neural networks"), and scaled so that it
    moves weights as far as AdamW would at the same rate (Liu et al. 2025, "Muon is scalable for LLM
    training", section 2.2, equation 4): one rate serves both.
    """
    ends = {id(each) for part in model.modules() for each in _ends(part)}
    trained = [each for each in model.parameters() if each.requires_grad]
    inner = [each for each in trained if each.dim() == 2 and id(each) not in ends]
    chosen = {id(each) for each in inner}
    matrices = torch.optim.Muon(
        inner,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    return matrices, _adamw([each for each in trained if id(each) not in chosen], settings)


def _ends(part: torch.nn.Module) -> Sequence[torch.nn.Parameter]:
    return list(part.parameters(recurse=False)) if isinstance(part, torch.nn.Embedding) else []


def _adamw(weights: Sequence[torch.nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Vectors (biases, gains) do not decay."""
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
