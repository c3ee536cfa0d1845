"""How long a convolution takes: measured here in ONNX Runtime, or told by a board's profile.

Knows shapes and clocks; never a network, nor what its weights are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy

from edgekit.device import DeviceProfile
from edgekit.registry import load
from edgekit.vision_cost import VisionCost
from edgekit.vision_predictor import predict_vision

_TURNS, _TURN_S = 20, 0.001
_LEAST_MS = 1e-3  # an operator is never free
_WARM_RUNS = 3
_OPSET, _IR_VERSION = 17, 8


@dataclass(frozen=True)
class Convolution:
    """Channels in and out, the kernel's side, the stride, the groups, and the OUTPUT's size."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    height: int
    width: int

    @property
    def cost(self) -> VisionCost:
        """Of one image; the addition of a bias is not counted."""
        values = self.outputs * self.height * self.width
        weights = self.outputs * self.inputs // self.groups * self.kernel**2
        taken = self.inputs * self.height * self.width * self.stride**2
        return VisionCost(
            flops=2.0 * weights * self.height * self.width,
            activations=float(values),
            weights=float(weights + self.outputs),
            peak=float(values + taken),
            operators=1,
        )


class Times(Protocol):
    """Milliseconds of a convolution on one machine."""

    def ms(self, convolution: Convolution) -> float: ...


def total_ms(times: Times, convolutions: Iterable[Convolution]) -> float:
    """The sum: what stands between convolutions (ReLU, additions) engines compute with them."""
    return sum(times.ms(each) for each in convolutions)


class Predicted:
    """What ``edgekit plan`` says of ONNX Runtime on the board of ``profile``."""

    def __init__(self, profile: DeviceProfile) -> None:
        self._profile = profile

    def ms(self, convolution: Convolution) -> float:
        return predict_vision(convolution.cost, self._profile, engine="ort").mid


class Measured:
    """On one thread of this machine, each shape once: what a graph takes that has the convolution
    and its ReLU behind another one, less what it takes without them. So the call of the engine, and
    the order of values that it changes at both ends of a graph, do not count.
    """

    def __init__(self) -> None:
        self._found: dict[Convolution, float] = {}

    def ms(self, convolution: Convolution) -> float:
        """Raises MissingExtraError without onnx or onnxruntime."""
        if convolution not in self._found:
            before = _Turns(_graph(_before(convolution)))
            both = _Turns(_graph(_before(convolution), convolution))
            for _ in range(_TURNS):
                before.take()
                both.take()
            self._found[convolution] = max(_LEAST_MS, both.best_ms - before.best_ms)
        return self._found[convolution]


def _before(c: Convolution) -> Convolution:
    """A convolution of 1 x 1 that makes what ``c`` takes."""
    height, width = c.height * c.stride, c.width * c.stride
    return Convolution(c.inputs, c.inputs, 1, 1, 1, height, width)


class _Turns:
    """A graph in ONNX Runtime, on one thread; ``best_ms`` is the fastest turn's mean of a run."""

    def __init__(self, model: bytes) -> None:
        options = load("onnxruntime:SessionOptions", extra="onnx")()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        self._session = load("onnxruntime:InferenceSession", extra="onnx")(
            model, options, providers=["CPUExecutionProvider"]
        )
        (given,) = self._session.get_inputs()
        self._feed = {given.name: numpy.zeros(given.shape, "float32")}
        for _ in range(_WARM_RUNS):
            self._session.run(None, self._feed)
        self.best_ms = math.inf

    def take(self) -> None:
        begun_s, runs = time.perf_counter(), 0
        while (spent_s := time.perf_counter() - begun_s) < _TURN_S or not runs:
            self._session.run(None, self._feed)
            runs += 1
        self.best_ms = min(self.best_ms, 1e3 * spent_s / runs)


def _graph(*convolutions: Convolution) -> bytes:
    """The convolutions behind each other, a ReLU after each; weights are small and no zeros."""
    helper, numpy_helper = (
        load(f"onnx:{name}", extra="onnx") for name in ("helper", "numpy_helper")
    )
    nodes: list[Any] = []
    weights: list[Any] = []
    given = "x"
    for number, c in enumerate(convolutions):
        names = [f"{part}{number}" for part in ("weight", "bias", "sums", "y")]
        shape = (c.outputs, c.inputs // c.groups, c.kernel, c.kernel)
        weights.append(numpy_helper.from_array(numpy.full(shape, 0.01, "float32"), names[0]))
        weights.append(numpy_helper.from_array(numpy.full(c.outputs, 0.1, "float32"), names[1]))
        before, after = c.kernel // 2, (c.kernel - 1) // 2
        nodes.append(
            helper.make_node(
                "Conv",
                [given, *names[:2]],
                [names[2]],
                kernel_shape=[c.kernel] * 2,
                strides=[c.stride] * 2,
                group=c.groups,
                pads=[before, before, after, after],
            )
        )
        nodes.append(helper.make_node("Relu", [names[2]], [names[3]]))
        given = names[3]
    first, last = convolutions[0], convolutions[-1]
    sides = [first.height * first.stride, first.width * first.stride]
    x = helper.make_tensor_value_info("x", 1, [1, first.inputs, *sides])
    y = helper.make_tensor_value_info(given, 1, [1, last.outputs, None, None])
    graph = helper.make_graph(nodes, "convolutions", [x], [y], weights)
    imports = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION)
    found: bytes = model.SerializeToString()
    return found
