"""Values on a grid of a few levels, whose step is learned with the network: LSQ and LSQ+.

Knows tensors, steps and ranges; never a network, and never how levels are stored.

Esser et al. 2020, "Learned Step Size Quantization" (LSQ, https://arxiv.org/abs/1902.08153); Bhalgat
et al. 2020, "LSQ+: Improving low-bit quantization through learnable offsets and better
initialization" (https://arxiv.org/abs/2004.09576).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

# "unsigned" starts at 0, "signed" has 0 in its middle, "offset" lies where training puts it.
Range = Literal["unsigned", "signed", "offset"]
_LEAST_STEP = 1e-8
# Parts of the whole range that a search tries: the rarest values may be cut off.
_SHRINKS = torch.linspace(1.0, 0.2, 41)
_END_SHRINKS = torch.linspace(1.0, 0.25, 16)
_SEARCHED = 1 << 14  # values that a range is searched on


class OnGrid(torch.autograd.Function):
    """``round(clip((x - offset) / step, low, high)) step + offset`` and its gradients.

    LSQ: the step's is ``round(v) - v`` inside the range and the range's end outside, ``v = (x -
    offset) / step`` (section 2.1, equation 3), multiplied by ``scale`` (section 2.2); to ``x`` it
    passes where it is inside (section 2.3). LSQ+: the offset's is 1 outside, 0 inside. The range's
    ends count as inside, as torch's clamp has it; to LSQ they are outside.
    ``step`` is of one value, or of one for each entry of the first axis; beside an offset of one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        step: torch.Tensor,
        offset: torch.Tensor | None,
        low: int,
        high: int,
        scale: float,
    ) -> torch.Tensor:
        value = (x if offset is None else x - offset) / step
        ctx.save_for_backward(value, step)
        ctx.ends, ctx.scale, ctx.moves = (low, high), scale, offset is not None
        found = value.round().clamp_(low, high).mul_(step)
        return found if offset is None else found.add_(offset)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        value, step = ctx.saved_tensors
        low, high = ctx.ends
        inside = gradient * ((value >= low) & (value <= high))
        level = value.round().clamp_(low, high)
        # round(v) - v inside and the end outside, without a tensor for either.
        to_step = _summed(gradient, level, step) - _summed(inside, value, step)
        to_offset = None
        if ctx.moves:
            to_offset = (gradient.sum() - inside.sum()).view_as(step)
        return inside, to_step * ctx.scale, to_offset, None, None, None


def _summed(one: torch.Tensor, other: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The sum of the products, one for each step."""
    if like.numel() == 1:
        return torch.dot(one.reshape(-1), other.reshape(-1)).view_as(like)
    return (one * other).sum(dim=tuple(range(1, one.dim())), keepdim=True)


class Levels(nn.Module):
    """Puts activations on a grid with one step for the whole tensor.

    The step's logarithm is the parameter: Adam moves every parameter by about the learning rate,
    and steps differ by orders of magnitude. It also makes LSQ's factor 1 / sqrt(n high) (section
    2.2) matter to the norm of the gradients alone, where it stays. ``low`` and ``high`` are whole
    numbers; LSQ counts them from ``bits`` in section 2. While ``seen`` is a list it lets values
    through, and keeps some of each in there; ``set`` gives it its grid.
    """

    def __init__(self, bits: int, kind: Range) -> None:
        super().__init__()
        self.low, self.high = ends(bits, kind)
        self.kind = kind
        self.log_step = nn.Parameter(torch.zeros(1))
        self.offset = nn.Parameter(torch.zeros(1)) if kind == "offset" else None
        self.seen: list[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            self.seen.append(_some(x.detach().float()))
            return x
        step = self.log_step.exp()
        if self.training:
            factor = 1 / math.sqrt(x[0].numel() * max(1, self.high))
            return OnGrid.apply(x.float(), step, self.offset, self.low, self.high, factor)
        moved = x.float() if self.offset is None else x.float() - self.offset
        found = (moved / step).round().clamp(self.low, self.high) * step
        return found if self.offset is None else found + self.offset

    @property
    def step(self) -> torch.Tensor:
        return self.log_step.detach().exp()

    @property
    def start(self) -> torch.Tensor:
        """The offset, or 0."""
        return torch.zeros_like(self.log_step) if self.offset is None else self.offset.detach()

    @torch.no_grad()
    def set(self, step: torch.Tensor, offset: torch.Tensor) -> None:
        self.log_step.copy_(step.clamp(min=_LEAST_STEP).log())
        if self.offset is not None:
            self.offset.copy_(offset)


class Rounded(nn.Module):
    """What is left of Levels in a trained network: the number of the level, for the step and the
    offset went into the weights around it. ``owns`` names what could not: "gain" is multiplied with
    first, "shift" added.
    """

    def __init__(self, bits: int, kind: Range, *owns: str) -> None:
        super().__init__()
        self.low, self.high = ends(bits, kind)
        self.register_buffer("gain", torch.ones(1) if "gain" in owns else None)
        self.register_buffer("shift", torch.zeros(1) if "shift" in owns else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gain is not None:
            x = x * self.gain
        if self.shift is not None:
            x = x + self.shift
        return x.round().clamp(self.low, self.high)


class RowSteps(nn.Module):
    """Puts a weight [outputs, inputs] on a grid with a step for each output.

    At 4 bits the lowest level is -7: LiteRT's 4 bits have no -8.
    """

    def __init__(self, bits: int, outputs: int) -> None:
        super().__init__()
        low, self.high = ends(bits, "signed")
        self.low = max(low, -7)
        self.log_step = nn.Parameter(torch.zeros(outputs))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        step = self.log_step.exp().unsqueeze(1)
        factor = 1 / math.sqrt(weight.shape[1] * max(1, self.high))
        found: torch.Tensor = OnGrid.apply(weight, step, None, self.low, self.high, factor)
        return found

    @torch.no_grad()
    def set(self, step: torch.Tensor) -> None:
        self.log_step.copy_(step.clamp(min=_LEAST_STEP).log())


def ends(bits: int, kind: Range) -> tuple[int, int]:
    """The lowest and the highest level of ``bits`` (LSQ, section 2)."""
    if kind == "signed":
        return -(1 << bits - 1), (1 << bits - 1) - 1
    return 0, (1 << bits) - 1


def _some(x: torch.Tensor) -> torch.Tensor:
    """Values of ``x`` spread evenly over it, and its ends."""
    flat = x.reshape(-1)
    stride = max(1, flat.numel() // _SEARCHED)
    return torch.cat([flat[::stride], flat.min().view(1), flat.max().view(1)])


# Where a grid begins its training, or stays without one


def whole_range(x: torch.Tensor, levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """The step and the offset that reach from the least to the largest value."""
    return _reaching(levels, x.min(), x.max())


def least_error(x: torch.Tensor, levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """The step and the offset of the least squared error (how LSQ+ starts), by trying parts of the
    whole range.
    """
    x, low, high = _some(x), x.min(), x.max()
    best = (math.inf, whole_range(x, levels))
    for bottom, top in _parts(levels.kind):
        step, offset = _reaching(levels, low * bottom, high * top)
        found = ((x - offset) / step).round().clamp_(levels.low, levels.high) * step + offset
        error = float((found - x).square().sum())
        if error < best[0]:
            best = error, (step, offset)
    return best[1]


def _parts(kind: Range) -> Iterator[tuple[float, float]]:
    if kind != "offset":
        yield from ((part, part) for part in _SHRINKS.tolist())
    else:
        shrinks = _END_SHRINKS.tolist()
        yield from ((bottom, top) for bottom in shrinks for top in shrinks)


def _reaching(
    levels: Levels, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    zero = torch.zeros((), dtype=low.dtype, device=low.device)
    if levels.kind == "offset":
        step, offset = (high - low) / levels.high, low
    elif levels.kind == "unsigned":
        step, offset = high / levels.high, zero
    else:
        step, offset = torch.maximum(-low / -levels.low, high / levels.high), zero
    return step.clamp(min=_LEAST_STEP).view(1), offset.view(1)


def row_whole(weight: torch.Tensor, steps: RowSteps) -> torch.Tensor:
    """float32 [outputs]: the steps that reach to each row's largest value."""
    largest: torch.Tensor = weight.abs().amax(1) / max(1, steps.high)
    return largest.clamp(min=_LEAST_STEP)


def row_least_error(weight: torch.Tensor, steps: RowSteps) -> torch.Tensor:
    """float32 [outputs]: the steps of each row's least squared error."""
    whole = row_whole(weight, steps)
    best, least = whole.clone(), torch.full_like(whole, math.inf)
    for part in _SHRINKS.tolist():
        step = (whole * part).unsqueeze(1)
        found = (weight / step).round().clamp_(steps.low, steps.high) * step
        error = (found - weight).square().sum(1)
        best = torch.where(error < least, whole * part, best)
        least = torch.minimum(error, least)
    return best
