"""Whether a training step fits the memory, told before the first one, as a sum with its parts.

Measures activations on two small batches and extrapolates; knows no task and no optimizer's mind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgekit import machine
from edgekit.errors import DoesNotFitError

_SMALL, _LARGER = 2, 4  # samples; one alone has no batch statistics


@dataclass(frozen=True)
class MemorySum:
    """Bytes that a step needs beside the weights, on one device."""

    gradients: int
    optimizer: int
    average: int
    per_sample: int
    samples: int
    fixed: int
    free: int

    @property
    def activations(self) -> int:
        return self.fixed + self.per_sample * self.samples

    @property
    def needed(self) -> int:
        return self.gradients + self.optimizer + self.average + self.activations

    def __str__(self) -> str:
        parts = (
            f"gradients {_mb(self.gradients)}",
            f"optimizer {_mb(self.optimizer)}",
            f"averaged weights {_mb(self.average)}",
            f"activations {_mb(self.activations)} ({self.samples} samples of"
            f" {_mb(self.per_sample)})",
        )
        return f"{_mb(self.needed)} = {' + '.join(parts)}; {_mb(self.free)} are free"

    def check(self) -> None:
        """Raises DoesNotFitError with the sum, and with what would fit."""
        if self.needed <= self.free:
            return
        room = self.free - self.needed + self.per_sample * self.samples
        fits = room // max(1, self.per_sample)
        hint = "the weights alone are too large: a smaller model, or --set parallel=fsdp"
        if fits >= 1:
            pieces = -(-self.samples // fits)
            hint = f"--set accumulate={pieces} times what it is: pieces of {fits} samples"
        raise DoesNotFitError(f"a training step needs {self}", hint=hint)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def measure(
    model: torch.nn.Module,
    forward: Callable[[int], torch.Tensor],
    *,
    samples: int,
    averages: bool,
    device: torch.device,
) -> MemorySum:
    """The sum for micro-batches of ``samples``; ``forward(n)`` is the loss of ``n`` samples.

    AdamW keeps two values a weight (Kingma and Ba 2015, algorithm 1; Muon one, so with it the sum
    is an upper bound), gradients are a third. What autograd saves is counted tensor by tensor, each
    storage once. Buffers are left as they were.
    """
    weights = [each for each in model.parameters() if each.requires_grad]
    size_bytes = sum(_local(each) for each in weights)
    held = {name: each.detach().clone() for name, each in model.named_buffers()}
    small, larger = (_saved_bytes(model, forward, n) for n in (_SMALL, _LARGER))
    with torch.no_grad():
        for name, each in model.named_buffers():
            each.copy_(held[name])
    per_sample = max(0, larger - small) // (_LARGER - _SMALL)
    return MemorySum(
        gradients=size_bytes,
        optimizer=2 * size_bytes,
        average=size_bytes if averages else 0,
        per_sample=per_sample,
        samples=samples,
        fixed=max(0, small - _SMALL * per_sample),
        free=free_bytes(device),
    )


def _local(tensor: torch.Tensor) -> int:
    """Bytes on this device: of a sharded tensor, its shard."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())


def _saved_bytes(model: torch.nn.Module, forward: Callable[[int], torch.Tensor], count: int) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        weight = torch.nn.Parameter
        if not isinstance(tensor, weight) and not isinstance(tensor._base, weight):
            storage = tensor.untyped_storage()
            seen[storage._cdata] = storage.nbytes()
        return tensor

    # The loss must live until the sum is taken, or its storages are given out twice.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(count)
    total = sum(seen.values())
    del loss
    return total


def free_bytes(device: torch.device) -> int:
    """What an allocation on ``device`` may take now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = machine.memory(machine.root())
    free = found.available_bytes if found.available_bytes is not None else 1 << 62
    return min(free, found.limit_bytes or free)
