"""What ONNX's convolutions, pools and resizing compute, in torch.

Knows https://onnx.ai/onnx/operators/ from opset 9 on; never a graph, a file, or where weights lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from edgekit.exporters.onnx_node import Node, Operator, halves, named, torch_pads, word

OPERATORS: dict[str, Operator] = {}


@named(OPERATORS, "Conv", "ConvTranspose")
def _conv(node: Node, x: Sequence[Any]) -> Any:
    values, kernel, bias = x[0], x[1], x[2] if len(x) > 2 else None
    axes = values.dim() - 2
    if axes not in (1, 2, 3):
        raise node.refused(f"has {axes} axes in space")
    steps = tuple(node.ask("strides", [1] * axes))
    spread = tuple(node.ask("dilations", [1] * axes))
    groups = node.ask("group", 1)
    sizes = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], spread, strict=True)]
    if node.op == "ConvTranspose":
        if word(node.ask("auto_pad", "NOTSET")) != "NOTSET" or node.ask("output_shape"):
            raise node.refused("has a size of its output that must be guessed")
        before, after = halves(node.ask("pads", [0] * 2 * axes))
        if before != after:
            raise node.refused("is padded on one side alone")
        more = tuple(node.ask("output_padding", [0] * axes))
        run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        return run(values, kernel, bias, steps, tuple(before), more, groups, spread)
    before, after = _pads(node, values, sizes, steps)
    if before != after:
        values, before = F.pad(values, torch_pads(before, after)), [0] * axes
    run = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return run(values, kernel, bias, steps, tuple(before), spread, groups)


def _pads(
    node: Node, values: Any, sizes: Sequence[int], steps: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Before and after each axis in space; ``sizes`` are those of the kernel with its gaps."""
    how = word(node.ask("auto_pad", "NOTSET"))
    if how in ("NOTSET", "VALID"):
        return halves(node.ask("pads", [0] * 2 * len(sizes)) if how == "NOTSET" else [0, 0] * 2)
    before, after = [], []
    for have, size, step in zip(values.shape[2:], sizes, steps, strict=True):
        whole = max(0, (math.ceil(have / step) - 1) * step + size - have)
        less = whole // 2
        before.append(less if how == "SAME_UPPER" else whole - less)
        after.append(whole - before[-1])
    return before, after


@named(OPERATORS, "MaxPool", "AveragePool")
def _pool(node: Node, x: Sequence[Any]) -> Any:
    values, shape = x[0], tuple(node.ask("kernel_shape"))
    axes = len(shape)
    if axes not in (1, 2):
        raise node.refused(f"has {axes} axes in space")
    steps = tuple(node.ask("strides", [1] * axes))
    spread = tuple(node.ask("dilations", [1] * axes))
    sizes = [(k - 1) * d + 1 for k, d in zip(shape, spread, strict=True)]
    before, after = _pads(node, values, sizes, steps)
    up = bool(node.ask("ceil_mode", 0))
    if node.op == "MaxPool":
        # torch pads by half a kernel at most.
        if before != after or any(2 * n > k for n, k in zip(before, shape, strict=True)):
            lowest = float("-inf")
            values = F.pad(values, torch_pads(before, after), value=lowest)
            before = [0] * axes
        most = (F.max_pool1d, F.max_pool2d)[axes - 1]
        return most(values, shape, steps, tuple(before), spread, up)
    if any(each != 1 for each in spread):
        raise node.refused("has gaps in its window")
    counted = bool(node.ask("count_include_pad", 0))
    run: Any = (F.avg_pool1d, F.avg_pool2d)[axes - 1]
    if before == after:
        return run(values, shape, steps, tuple(before), up, counted)
    if up:
        raise node.refused("is padded on one side alone, and rounds its size up")
    ends = torch_pads(before, after)
    made = run(F.pad(values, ends), shape, steps)
    if counted:
        return made
    inside = F.pad(torch.ones_like(values[:1, :1]), ends)
    return made / run(inside, shape, steps)


@named(OPERATORS, "Resize", "Upsample")
def _resize(node: Node, x: Sequence[Any]) -> Any:
    values = x[0]
    old = node.op == "Upsample" or node.opset < 11
    scales_at, sizes_at = (1, None) if old else (2, 3)
    sizes = node.fixed(sizes_at) if sizes_at and len(x) > sizes_at else None
    if not sizes:
        scales = node.fixed(scales_at, "scales")
        sizes = [math.floor(n * s) for n, s in zip(values.shape, scales, strict=True)]
        if any(size != n * s for size, n, s in zip(sizes, values.shape, scales, strict=True)):
            raise node.refused(f"resizes by {scales}, which makes no whole sizes")
    else:
        scales = [new / n for new, n in zip(sizes, values.shape, strict=True)]
    if values.dim() != 4 or list(sizes[:2]) != list(values.shape[:2]):
        raise node.refused("changes more than height and width")
    mode = word(node.ask("mode", "nearest"))
    place = word(node.ask("coordinate_transformation_mode", "half_pixel"))
    place = "asymmetric" if old else place
    rounds = word(node.ask("nearest_mode", "round_prefer_floor"))
    up = all(float(s).is_integer() for s in scales)
    if mode == "nearest":
        # Whole factors fall on the same pixels by all of these rules.
        floors = place == "asymmetric" and (old or rounds == "floor" or up)
        centres = place in ("half_pixel", "pytorch_half_pixel") and up
        if floors or centres:
            return F.interpolate(values, tuple(sizes[2:]), mode="nearest")
    elif mode in ("linear", "bilinear") and not node.ask("antialias", 0):
        if place in ("half_pixel", "pytorch_half_pixel") and min(sizes[2:]) > 1:
            return F.interpolate(values, tuple(sizes[2:]), mode="bilinear")
        if place == "align_corners":
            return F.interpolate(values, tuple(sizes[2:]), mode="bilinear", align_corners=True)
    raise node.refused(f"resizes by {mode}, {place}, {rounds}")
