"""Direct preference optimization: pairs of a better and a worse answer, and the loss on them.

Knows tokens and the logarithms of their probabilities; never a network's inside.

Rafailov et al. 2023, "Direct Preference Optimization", section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from edgekit.training import language
from edgekit.training.texts import Answers, Chat
from edgekit.training.trainer import Batch, Loss

_AT_ONCE = 8


class Preferences:
    """Pairs of chats that differ in the answer, and what the model thought of both before it was
    trained: ``reference``, float32 [pairs, 2] (``reference_of``).
    """

    def __init__(
        self, chosen: Sequence[Chat], rejected: Sequence[Chat], length: int, pad: int
    ) -> None:
        longest = sorted(
            zip(chosen, rejected, strict=True),
            key=lambda pair: -max(len(chat[0]) + len(chat[1]) for chat in pair),
        )
        self.chosen = Answers([pair[0] for pair in longest], length, pad)
        self.rejected = Answers([pair[1] for pair in longest], length, pad)
        self.reference = torch.zeros(len(longest), 2)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each pair: int64 [pairs]."""
        return self.chosen.lengths + self.rejected.lengths

    def batch(self, numbers: torch.Tensor) -> Batch:
        chosen, rejected = self.chosen.batch(numbers), self.rejected.batch(numbers)
        return (*chosen, *rejected, self.reference[numbers])


def logs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The logarithms of the probabilities of both answers: float32 [pairs, 2]."""
    sides = [language.log_probabilities(model, each) for each in (batch[:2], batch[2:4])]
    return torch.stack(sides, 1)


@torch.no_grad()
def reference_of(model: torch.nn.Module, data: Preferences) -> torch.Tensor:
    """``logs`` of all pairs, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    pieces = torch.arange(len(data)).split(_AT_ONCE)
    return torch.cat(
        [logs(model, tuple(each.to(device) for each in data.batch(n))).cpu() for n in pieces]
    )


def margins(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """How much more the model has come to like the better answer than the worse one, in nats:
    float32 [pairs].
    """
    gained = logs(model, batch) - batch[4]
    return gained[:, 0] - gained[:, 1]


def loss_of(beta: float) -> Loss:
    """-log sigmoid(beta * margin), summed over the pairs (section 4, equation 7)."""

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return -F.logsigmoid(beta * margins(model, batch)).sum()

    return loss


def figures(found: torch.Tensor, reference: torch.Tensor, beta: float) -> dict[str, float]:
    """Of the ``logs`` of pairs and those before training, float32 [pairs, 2]: the mean "loss";
    "accuracy", the share of pairs of which the model has come to like the better answer more (so
    the implicit reward of section 4 ranks them); and "likelier_share", of which it gives the better
    one the higher probability.
    """
    gained = found - reference
    margin = gained[:, 0] - gained[:, 1]
    return {
        "loss": float(-F.logsigmoid(beta * margin).mean()),
        "accuracy": float((margin > 0).float().mean()),
        "likelier_share": float(likelier(found).mean()),
    }


def likelier(found: torch.Tensor) -> torch.Tensor:
    """1 where the better answer has the higher probability, else 0: float32 [pairs]."""
    return (found[:, 0] > found[:, 1]).float()
