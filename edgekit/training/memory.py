"""Whether a training step fits the memory, told before the first one, as a sum with its parts; and
what the first steps then took.

Measures activations on two small batches and extrapolates; knows no task and no optimizer's mind.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgekit import machine
from edgekit.errors import DoesNotFitError

_SMALL, _LARGER = 2, 4  # samples; one alone has no batch statistics
# Where the backward pass begins, all activations are held, and beside the largest one (logits, as a
# rule) its gradient and a copy of it in another precision.
_PASSING = 2
# On CPUs: what the C library's allocator holds beside what was asked for, as a share of it, and
# what the kernels and their threads take once. With these the first steps of seven recipes took
# half to 1.25 times what was told.
_SPARE_SHARE, _SPARE_BYTES = 0.25, 32 << 20


@dataclass(frozen=True)
class MemorySum:
    """Bytes that a step needs beside the weights, on one device."""

    gradients: int
    optimizer: int
    average: int
    per_sample: int
    samples: int
    fixed: int
    spare_share: float
    spare_bytes: int
    free: int

    @property
    def activations(self) -> int:
        """Of the forward pass, with the gradients of the largest."""
        return self.fixed + self.per_sample * self.samples

    @property
    def spare(self) -> int:
        return self.spare_bytes + int(self.spare_share * self._asked_for)

    @property
    def needed(self) -> int:
        return self._asked_for + self.spare

    @property
    def _asked_for(self) -> int:
        return self.gradients + self.optimizer + self.average + self.activations

    def __str__(self) -> str:
        parts = (
            f"gradients {_mb(self.gradients)}",
            f"optimizer {_mb(self.optimizer)}",
            f"averaged weights {_mb(self.average)}",
            f"activations {_mb(self.activations)} ({self.samples} samples of"
            f" {_mb(self.per_sample)})",
            *([f"spare room {_mb(self.spare)}"] if self.spare else []),
        )
        return f"{_mb(self.needed)} = {' + '.join(parts)}; {_mb(self.free)} are free"

    def check(self, accumulate: int) -> None:
        """Raises DoesNotFitError with the sum, and with what would fit; a batch is cut into
        ``accumulate`` pieces now.
        """
        if self.needed <= self.free:
            return
        each = int((1 + self.spare_share) * self.per_sample)
        room = self.free - self.needed + each * self.samples
        fits = room // max(1, each)
        hint = "the weights alone are too large: a smaller model, or --set parallel=fsdp"
        if fits >= 1:
            pieces = -(-self.samples // fits)
            hint = f"--set accumulate={pieces * accumulate}: pieces of {fits} samples"
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
    storage once, and the largest of these again with its gradients. Buffers are left as they were.
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
        spare_share=_SPARE_SHARE if device.type == "cpu" else 0.0,
        spare_bytes=_SPARE_BYTES if device.type == "cpu" else 0,
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
    total = sum(seen.values()) + _PASSING * max(seen.values(), default=0)
    del loss
    return total


class Watch:
    """What is held on ``device`` at most from now on, beside what is held now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # What was let go of, but not given back, would be taken again without being seen.
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            machine.forget_peak()
        self._before = self._peak()

    def most_bytes(self) -> int | None:
        """None where the system does not tell."""
        now = self._peak()
        return None if now is None or self._before is None else max(0, now - self._before)

    def _peak(self) -> int | None:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return machine.peak_bytes()


def free_bytes(device: torch.device) -> int:
    """What an allocation on ``device`` may take now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = machine.memory(machine.root())
    free = found.available_bytes if found.available_bytes is not None else 1 << 62
    return min(free, found.limit_bytes or free)
