"""An exponential moving average of a model's weights, and of its running statistics.

Knows tensors alone. Sharded weights are averaged shard by shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Average:
    """``average <- decay * average + (1 - decay) * weights`` after each step (Polyak and Juditsky
    1992 average evenly; the exponential form is that of Tarvainen and Valpola 2017, Mean Teacher,
    section 2). Early on the decay is lower, ``(1 + step) / (10 + step)``, so that the first
    weights are forgotten (the same in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = [each for each in _averaged(model)] if decay else []
        self._kept = [each.detach().clone() for each in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after ``step`` (from 0) in."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.lerp_(live.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def take(self) -> None:
        """The model's weights of now become the average."""
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.copy_(live.detach())

    @torch.no_grad()
    def _swap(self) -> None:
        for kept, live in zip(self._kept, self._live, strict=True):
            held = live.detach().clone()
            live.detach().copy_(kept)
            kept.copy_(held)

    @property
    def size_bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self._kept)

    def __bool__(self) -> bool:
        return bool(self._decay)


def _averaged(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from (each for each in model.parameters() if each.requires_grad)
    yield from (each for each in model.buffers() if each.is_floating_point())
