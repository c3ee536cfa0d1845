"""What the recipes for language models share: logits, the loss, the figures on held-out answers.

Knows ids, targets and logits; never a network's inside, nor where the texts come from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from edgekit.training import texts
from edgekit.training.trainer import Batch

_AT_ONCE = 16


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """int64 ids [batch, length] -> float32 logits [batch, length, vocab], of a network of ours or
    of transformers.
    """
    found = model(ids)
    return (found if isinstance(found, torch.Tensor) else found.logits).float()


def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy in nats, summed over the targets."""
    ids, targets = batch
    return F.cross_entropy(logits(model, ids).flatten(0, 1), targets.flatten(), reduction="sum")


def judge_answers(data: texts.Answers) -> Callable[[torch.nn.Module], dict[str, float]]:
    """A function that gives "loss", in nats for each token of the answers."""

    def judge(model: torch.nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        total, count = 0.0, 0
        for numbers in torch.arange(len(data)).split(_AT_ONCE):
            ids, targets = (each.to(device) for each in data.batch(numbers))
            total += float(loss(model, (ids, targets)))
            count += int(texts.terms((ids, targets)))
        return {"loss": total / count}

    return judge


def answer_logs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The logarithm of each answer's probability: float32 [batch]."""
    ids, targets = batch
    found = logits(model, ids).transpose(1, 2)  # classes come second
    return -F.cross_entropy(found, targets, reduction="none").sum(1)
