"""How fast a model will run on a board, from its cost and the board's profile, with an error band.

Knows costs, profiles and a few calibrated constants; never runs anything. docs/plan.md has the
formulas; ``plan_validate`` fits the constants to published speeds, and says how far off they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from edgekit.device import AtThreads, DeviceProfile, Figure, Gpu, Product, at_threads
from edgekit.model_cost import ModelCost
from edgekit.quant import FLOAT_TYPES

# How far off a prediction may be, by the weakest source of its bandwidth and peak.
BANDS = {"measured": 0.15, "published": 0.25, "assumed": 0.35}
# An operator of the engine costs its threads this many cycles: dispatch and a barrier.
_OPERATOR_CYCLES = 7000.0
# Operators of a layer: seven products, norms, rotations, cache writes, attention, additions.
_OPERATORS_PER_LAYER = 18
_PRODUCTS_PER_LAYER = 7
# What attention reaches of the float32 peak: with many queries, and with a single one.
_ATTENTION_PROMPT, _ATTENTION_TOKEN = 0.3, 0.08
# What a prompt reaches of the float32 peak with float weights: a model's matrices are no small ones
# that stay in the cache, as those of the probe do.
_FLOAT_PROMPT = 0.65
# How sharply the slower of two limits decides: infinity would be the maximum of both.
_SHARP = 3.0


@dataclass(frozen=True)
class Calibration:
    """What engines reach of what profiles promise. ``plan_validate.fit`` finds the values.

    ``memory``: part of the read bandwidth that decoding reaches; ``gpu_memory`` a GPU's.
    ``prefill``: part of the float32 peak that a CPU without special instructions reaches in
    quantized products of many columns; ``gpu_prefill`` likewise of a GPU.
    ``vision``: times one core's peak that convolutions reach (above 1: Winograd's shortcut).
    ``traffic``: how often a value between two layers crosses the memory.
    """

    memory: float = 0.98
    gpu_memory: float = 0.83
    prefill: float = 0.41
    gpu_prefill: float = 0.64
    vision: float = 1.39
    traffic: float = 3.65


CALIBRATION = Calibration()

# What the best instruction for int8 products gives against float32's, overheads included.
_COLUMNS = {"NEON": 1.0, "DOTPROD": 1.7, "MATMUL_INT8": 3.0, "AVX2": 1.35, "AVX512": 1.35}
_VNNI = 1.5
# Products of one column unpack weights first: their rate against the float32 peak.
_ONE_COLUMN = {"NEON": 0.5, "DOTPROD": 0.6, "MATMUL_INT8": 0.6, "AVX2": 0.55, "AVX512": 0.55}
# What unpacking makes of these rates, by type.
_UNPACKING = {"Q4_0": 1.0, "Q4_K": 0.97, "IQ4_NL": 0.97, "Q2_K": 0.9, "Q8_0": 0.85, "IQ4_XS": 0.8}
_UNPACKING |= {"Q6_K": 0.75, "Q5_K": 0.75, "Q3_K": 0.7, "F16": 0.7, "BF16": 0.7, "Q4_1": 0.6}
_UNPACKING |= {"Q5_0": 0.5, "Q5_1": 0.45, "F32": 0.5}
# Blocks of an ONNX language model: their kernels unpack as those of llama.cpp's plainest types do.
_UNPACKING |= {"wi4": _UNPACKING["Q4_0"], "wi8": _UNPACKING["Q8_0"]}
_LOOKED_UP = 0.35  # of the types that look values up in tables: IQ1, IQ2, IQ3


@dataclass(frozen=True)
class Band:
    """A prediction and the range that it should lie in."""

    low: float
    mid: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Input:
    """A figure that a prediction was made of, and how it is known."""

    name: str
    value: float
    unit: str
    source: str
    origin: str


@dataclass(frozen=True)
class Prediction:
    """Speeds in tokens per second, and what bounds decoding: "memory", "compute" or "overhead".

    ``memory_ms``, ``compute_ms`` and ``overhead_ms`` are parts of one decoded token's time.
    """

    decode: Band
    prefill: Band
    bound: str
    memory_ms: float
    compute_ms: float
    overhead_ms: float
    inputs: tuple[Input, ...]


@dataclass(frozen=True)
class Work:
    """What to predict. ``gpu_part`` is the part of the layers that a GPU computes.

    Decoding happens behind ``depth`` tokens, in ``n_seqs`` sequences side by side; a prompt of
    ``n_prompt`` is read in batches of ``n_batch``.
    """

    n_threads: int | None = None
    n_prompt: int = 512
    depth: int = 64
    n_seqs: int = 1
    n_batch: int = 512
    kv_type: str = "f16"
    gpu_part: float = 0.0


@dataclass(frozen=True)
class _Rates:
    """What one processor reaches.

    ``one`` and ``many`` are FLOP per second of products of one and of 512 columns, by the weights'
    type; the other two those of attention. ``stream`` is that of one column with weights from
    memory, None where it was not measured. ``alone_bytes_s`` is what the threads would read if none
    stood in another's way.
    """

    read_bytes_s: float
    alone_bytes_s: float
    attention_one: float
    attention_many: float
    operator_s: float
    one: Callable[[str], float]
    many: Callable[[str], float]
    stream: Callable[[str], float | None]


@dataclass(frozen=True)
class _Time:
    """Parts of a token's time, or of a part of it; ``together_s`` is that of reading and computing
    where both were measured as one.
    """

    memory_s: float
    alone_s: float
    compute_s: float
    overhead_s: float
    together_s: float | None = None

    @property
    def total_s(self) -> float:
        """The memory serves all threads, while each of them reads and computes in turn.

        The slower of both sets the pace, and two that are near each other both cost something.
        """
        if self.together_s is not None:
            return self.together_s + self.overhead_s
        threads_s = self.alone_s + self.compute_s
        return float((self.memory_s**_SHARP + threads_s**_SHARP) ** (1 / _SHARP)) + self.overhead_s


def predict(
    cost: ModelCost,
    profile: DeviceProfile,
    work: Work | None = None,
    *,
    calibration: Calibration = CALIBRATION,
) -> Prediction:
    """The speeds of a language model with llama.cpp.

    The whole model is taken to lie in memory. A part on a GPU is taken to come after the rest.
    """
    work = work or Work()
    threads = work.n_threads or profile.n_threads
    on_gpu = work.gpu_part if profile.gpu else 0.0
    shares = [(1 - on_gpu, _cpu(profile, threads, calibration))]
    if profile.gpu:
        shares.append((on_gpu, _gpu(profile.gpu, calibration)))
    decode = [(share, _decode(cost, rates, work)) for share, rates in shares]
    prefill = [(share, _prefill(cost, rates, work)) for share, rates in shares]
    inputs = _inputs(profile, threads, on_gpu, calibration)
    off = BANDS[_weakest(inputs)]
    parts = {
        "memory": sum(share * time.memory_s for share, time in decode),
        "compute": sum(share * time.compute_s for share, time in decode),
        "overhead": sum(share * time.overhead_s for share, time in decode),
    }
    return Prediction(
        decode=band(work.n_seqs / sum(share * time.total_s for share, time in decode), off),
        prefill=band(1 / sum(share * time.total_s for share, time in prefill), off),
        bound=max(parts, key=lambda name: parts[name]),
        memory_ms=parts["memory"] * 1e3,
        compute_ms=parts["compute"] * 1e3,
        overhead_ms=parts["overhead"] * 1e3,
        inputs=inputs,
    )


def band(mid: float, off: float) -> Band:
    """``mid`` with ``off`` (0.25: a quarter) on both sides, as factors."""
    return Band(mid / (1 + off), mid, mid * (1 + off))


def _weakest(inputs: Sequence[Input]) -> str:
    """The least certain source among those that decide."""
    deciding = {each.source for each in inputs if each.name.startswith(("read", "GPU bandwidth"))}
    return max(deciding, key=lambda source: BANDS[source])


def _cpu(profile: DeviceProfile, threads: int, calibration: Calibration) -> _Rates:
    return _Rates(
        read_bytes_s=calibration.memory * profile.read_bytes_s(threads),
        alone_bytes_s=calibration.memory * threads * profile.read_bytes_s(1),
        attention_one=_ATTENTION_TOKEN * profile.flops(threads),
        attention_many=_ATTENTION_PROMPT * profile.flops(threads),
        operator_s=operator_s(profile, threads),
        one=lambda kind: one_column_flops(profile, kind, threads),
        many=lambda kind: many_column_flops(profile, kind, threads, calibration),
        stream=lambda kind: _streamed_flops(profile, kind, threads),
    )


def _gpu(gpu: Gpu, calibration: Calibration) -> _Rates:
    flops = calibration.gpu_prefill * gpu.float16_gflops.value * 1e9
    return _Rates(
        read_bytes_s=calibration.gpu_memory * gpu.bandwidth_gbps.value * 1e9,
        alone_bytes_s=math.inf,
        attention_one=flops,
        attention_many=flops,
        operator_s=gpu.launch_us.value / 1e6,
        one=lambda kind: flops,
        many=lambda kind: flops,
        stream=lambda kind: None,
    )


def _decode(cost: ModelCost, rates: _Rates, work: Work) -> _Time:
    """One step of all sequences."""
    read = cost.weight_bytes(work.n_seqs) + work.n_seqs * cost.kv_bytes(work.depth, work.kv_type)
    rate = rates.one if work.n_seqs == 1 else rates.many
    products_s = sum(flops / rate(kind) for kind, flops in cost.flops_by_type().items())
    attention_s = cost.attention_flops(work.depth) / rates.attention_one
    together_s = _together_s(cost, rates, work, attention_s) if work.n_seqs == 1 else None
    count = operators(cost)
    if together_s is not None:  # what products cost beside their work was measured with them
        count -= _PRODUCTS_PER_LAYER * len(cost.layers)
    return _Time(
        read / rates.read_bytes_s,
        read / rates.alone_bytes_s,
        work.n_seqs * (products_s + attention_s),
        count * rates.operator_s,
        together_s,
    )


def _together_s(cost: ModelCost, rates: _Rates, work: Work, attention_s: float) -> float | None:
    """Seconds of one token's products with weights from memory, and of its attention; None if a
    type that it needs was not measured so.
    """
    seconds = attention_s
    for kind, flops in cost.flops_by_type().items():
        rate = rates.stream(kind)
        if rate is None:
            return None
        seconds += flops / rate
    others = cost.other_bytes + cost.kv_bytes(work.depth, work.kv_type)
    return seconds + others / rates.read_bytes_s


def _prefill(cost: ModelCost, rates: _Rates, work: Work) -> _Time:
    """One token of a prompt."""
    batch = min(work.n_batch, work.n_prompt)
    products = cost.flops_by_type(output=False).items()
    products_s = sum(flops / rates.many(kind) for kind, flops in products)
    attention_s = cost.attention_flops(work.n_prompt / 2) / rates.attention_many
    read = cost.weight_bytes(batch) / batch
    return _Time(
        read / rates.read_bytes_s,
        read / rates.alone_bytes_s,
        products_s + attention_s,
        operators(cost) * rates.operator_s / batch,
    )


def operators(cost: ModelCost) -> int:
    """About how many operators of the engine one step takes."""
    return _OPERATORS_PER_LAYER * len(cost.layers) + 4


def operator_s(profile: DeviceProfile, threads: int) -> float:
    """Seconds of one small operator: measured, or a number of cycles."""
    if profile.operator_us:
        return at_threads(profile.operator_us, threads).value / 1e6
    return _OPERATOR_CYCLES / (profile.cpu.clock_mhz.value * 1e6)


def _path(profile: DeviceProfile) -> str:
    """The feature that decides how fast quantized products are."""
    features = profile.cpu.features.value
    order = ("AVX512", "AVX2", "MATMUL_INT8", "DOTPROD", "NEON")
    return next((name for name in order if name in features), "NEON")


def _vnni(profile: DeviceProfile) -> float:
    """What x86's int8 dot products add."""
    return _VNNI if {"AVX_VNNI", "AVX512_VNNI"} & set(profile.cpu.features.value) else 1.0


def _unpacking(kind: str) -> float:
    bits = kind.partition("b")[0] if kind.startswith("wi") else kind  # whatever their length
    return _UNPACKING.get(bits, _LOOKED_UP)


def one_column_flops(profile: DeviceProfile, kind: str, threads: int) -> float:
    """FLOP per second of a product of one column with weights of a type, out of the cache."""
    if measured := profile.product(kind, threads):
        return measured.decode_gflops * 1e9
    factor = _ONE_COLUMN[_path(profile)] * _vnni(profile) * _unpacking(kind)
    return factor * profile.flops(threads)


def _streamed_flops(profile: DeviceProfile, kind: str, threads: int) -> float | None:
    measured = profile.product(kind, threads)
    return None if measured is None else measured.stream_gflops * 1e9


def many_column_flops(
    profile: DeviceProfile, kind: str, threads: int, calibration: Calibration
) -> float:
    """FLOP per second of a product of 512 columns with weights of a type."""
    if measured := profile.product(kind, threads):
        rate = max(measured.prefill_gflops, measured.decode_gflops) * 1e9
        return min(rate, _FLOAT_PROMPT * profile.flops(threads)) if kind in FLOAT_TYPES else rate
    factor = calibration.prefill * _COLUMNS[_path(profile)] * _vnni(profile)
    return factor * max(0.5, _unpacking(kind)) * profile.flops(threads)


def _inputs(
    profile: DeviceProfile, threads: int, on_gpu: float, calibration: Calibration
) -> tuple[Input, ...]:
    found = []

    def add(name: str, unit: str, figure: Figure | AtThreads) -> None:
        found.append(Input(name, figure.value, unit, figure.source, figure.origin))

    def constant(name: str, value: float) -> None:
        found.append(Input(name, value, "", "published", "fitted: edgekit plan --validate"))

    if on_gpu < 1:
        memory = at_threads(profile.memory.read_gbps, threads)
        add(f"read bandwidth, {threads} threads", "GB/s", memory)
        peak = at_threads(profile.peaks.float32_gflops, threads)
        add(f"float32 peak, {threads} threads", "GFLOP/s", peak)
        constant("part of the bandwidth that decoding reaches", calibration.memory)
        constant("part of the peak that prompts reach, plain", calibration.prefill)
        if profile.operator_us:
            add("cost of an operator", "us", at_threads(profile.operator_us, threads))
        else:
            add("clock, for the cost of an operator", "MHz", profile.cpu.clock_mhz)
        kinds = [p for p in profile.products if p.threads == threads]
        found += [_product_input(each) for each in kinds]
    if on_gpu and profile.gpu:
        add("GPU bandwidth", "GB/s", profile.gpu.bandwidth_gbps)
        add("GPU float16 peak", "GFLOP/s", profile.gpu.float16_gflops)
        add("GPU launch of an operator", "us", profile.gpu.launch_us)
        constant("part of the GPU's bandwidth that decoding reaches", calibration.gpu_memory)
        constant("part of the GPU's peak that prompts reach", calibration.gpu_prefill)
    return tuple(found)


def _product_input(each: Product) -> Input:
    name = f"{each.type} products of one column from memory, {each.threads} threads"
    return Input(name, each.stream_gflops, "GFLOP/s", each.source, each.origin)


def impossible(tok_s: float, cost: ModelCost, profile: DeviceProfile) -> str | None:
    """Why a claimed decode speed of one sequence cannot be; None where it can.

    Every token reads every active weight once, so the memory must carry that.
    """
    needed = tok_s * cost.weight_bytes_per_token
    limits = [profile.memory.theoretical_gbps]
    if profile.gpu:
        limits.append(profile.gpu.bandwidth_gbps)
    known = [limit.value * 1e9 for limit in limits if limit]
    # A model that the caches hold needs no memory.
    cache_kib = sum(level.value for level in (profile.cpu.l2_kib, profile.cpu.l3_kib) if level)
    if not known or needed <= max(known) or cost.weight_bytes_per_token <= cache_kib * 1024:
        return None
    return (
        f"impossible: {tok_s:.3g} tok/s would read {needed / 1e9:.1f} GB/s, the memory of"
        f" {profile.title} carries {max(known) / 1e9:.1f}"
    )
