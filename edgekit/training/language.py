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
    return lambda model: {"loss": float(answer_losses(model, data).mean())}


@torch.no_grad()
def answer_losses(model: torch.nn.Module, data: texts.Answers) -> torch.Tensor:
    """What each answer costs, in nats, over the mean number of tokens of an answer: float64
    [answers] on the CPU, so that their mean is the loss a token.
    """
    device = next(model.parameters()).device
    costs, count = [], 0
    for numbers in torch.arange(len(data)).split(_AT_ONCE):
        ids, targets = (each.to(device) for each in data.batch(numbers))
        costs.append(-log_probabilities(model, (ids, targets)).double().cpu())
        count += int(texts.terms((ids, targets)))
    return torch.cat(costs) * len(data) / count


def log_probabilities(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The logarithm of the probability of each row's targets: float32 [batch]."""
    ids, targets = batch
    found = logits(model, ids).flatten(0, 1)
    return -F.cross_entropy(found, targets.flatten(), reduction="none").view(ids.shape).sum(1)
