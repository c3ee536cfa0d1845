"""Does a model fit a board, and how fast will it be: without the board, and without the weights.

Knows the order of the questions; never a formula (``plan_memory``, ``predictor``) or a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgekit import device_config, model_cost, plan_memory, quant, vision_predictor
from edgekit.device import MIB, DeviceProfile, load_profile
from edgekit.errors import UnknownNameError, UsageError
from edgekit.formats.gguf import GgufHeader
from edgekit.model_cost import ModelCost
from edgekit.plan_memory import MemoryPlan
from edgekit.planned_model import PlannedModel, in_type, planned, weight_bytes
from edgekit.predictor import Band, Input, Prediction, Work, band, predict
from edgekit.runtime import DEFAULT_N_CTX, KV_TYPES, LoadParams
from edgekit.runtimes import gpu_layers

# Types that are tried for a recommendation, the best first.
_CANDIDATES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
_SMALLEST_CONTEXT = 512
# Faster than people read: beyond it more bits are worth more than more speed.
_PLEASANT_TOK_S = 10.0
_START_S = 0.5  # Python and the engine, before the first byte of a model
_MAX_CONTEXT = 1 << 22
_MAX_SEQS = 256
_GRAPH_ENGINE = "ort"
_LITE_ENGINES = {"litert": "tflite"}  # the predictor's name for it
_LOAD_OFF = 0.35


@dataclass(frozen=True)
class Recommended:
    """What to run instead, or the same again; None: nothing fits."""

    bits: int | None
    type: str | None
    context: int | None
    threads: int
    gpu_layers: int | None
    decode_tok_s: float | None


@dataclass(frozen=True)
class Plan:
    """The answer. Speeds in tokens per second, or milliseconds for one image.

    ``decode`` is behind a short prompt, ``decode_full`` behind a context that is full.
    ``gpu_layers`` is None without a GPU.
    """

    model: str
    architecture: str
    parameters: int
    type: str
    device: str
    title: str
    threads: int
    context: int
    n_seqs: int
    kv_type: str
    memory: MemoryPlan
    decode: Band | None
    decode_full: Band | None
    prefill: Band | None
    latency_ms: Band | None
    load_s: Band
    bound: str
    verdict: str
    gpu_layers: int | None
    recommended: Recommended
    inputs: tuple[Input, ...]
    remarks: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the board's memory holds it."""
        return self.memory.margin >= 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        body: dict[str, Any] = {
            "model": self.model,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "type": self.type,
            "device": self.device,
            "threads": self.threads,
            "context": self.context,
            "batch": self.n_seqs,
            "kv_type": self.kv_type,
            "fits": self.fits,
            "memory_bytes": self.memory.to_dict(),
        }
        for name, speed in (
            ("decode_tok_s", self.decode),
            ("decode_tok_s_full_context", self.decode_full),
            ("prefill_tok_s", self.prefill),
            ("latency_ms", self.latency_ms),
        ):
            if speed is not None:
                body[name] = speed.to_dict()
        return body | {
            "load_s": self.load_s.to_dict(),
            "bound": self.bound,
            "verdict": self.verdict,
            "gpu_layers": self.gpu_layers,
            "recommended": asdict(self.recommended),
            "inputs": [asdict(each) for each in self.inputs],
            "remarks": list(self.remarks),
        }


def profile_of(device: str) -> DeviceProfile:
    """The profile of that name, or that of the user's device of that name.

    Raises UnknownNameError, ProfileError, UsageError for a spoilt ``devices.yaml``.
    """
    try:
        return load_profile(device)
    except UnknownNameError:
        if device == device_config.LOCAL:
            raise UnknownNameError(
                "this machine was not measured yet", hint="edgekit devices probe local --save"
            ) from None
        own = device_config.devices().get(device)
        if own is None or own.profile is None:
            raise
    return load_profile(own.profile)


@dataclass(frozen=True)
class _Wish:
    """What the user asked for, checked."""

    context: int
    n_seqs: int
    threads: int
    kv_type: str
    n_batch: int


def plan(
    model: str | Path,
    device: str | DeviceProfile,
    *,
    bits: int | None = None,
    type: str | None = None,
    context: int | None = None,
    batch: int = 1,
    kv_type: str = "f16",
    threads: int | None = None,
    n_batch: int = 512,
) -> Plan:
    """Plan ``model`` (as in ``planned_model.planned``) for a board's profile.

    ``context`` tokens in each of ``batch`` sequences; by default the model's own, at most 4096.
    Raises UsageError, UnknownNameError, SourceError, ArtifactError, ProfileError.
    """
    profile = profile_of(device) if isinstance(device, str) else device
    found = planned(model, bits=bits, file_type=type)
    if found.vision is not None:
        return _vision_plan(found, profile, threads or profile.n_threads)
    if found.runtime == _GRAPH_ENGINE:
        profile = replace(profile, gpu=None)  # such a model runs on the processor
        if batch != 1 or kv_type not in ("f16", "f32"):
            raise UsageError("an ONNX language model has one sequence, and its KV cache is f32")
        kv_type = "f32"
    wish = _checked(found.language(), profile, context, batch, kv_type, threads, n_batch)
    return _language_plan(found, profile, wish)


def _checked(
    header: GgufHeader,
    profile: DeviceProfile,
    context: int | None,
    batch: int,
    kv_type: str,
    threads: int | None,
    n_batch: int,
) -> _Wish:
    trained = header.metadata.get(f"{header.architecture}.context_length")
    longest = trained if isinstance(trained, int) and trained > 0 else _MAX_CONTEXT
    if context is None:
        context = min(longest, DEFAULT_N_CTX)
    if not 1 <= context <= longest:
        raise UsageError(f"the context must lie between 1 and {longest}, for which it was trained")
    if not 1 <= batch <= _MAX_SEQS:
        raise UsageError(f"the batch must lie between 1 and {_MAX_SEQS}")
    if kv_type not in KV_TYPES:
        raise UsageError(f"kv_type must be one of {', '.join(KV_TYPES)}")
    cores = int(profile.cpu.cores.value)
    if threads is not None and not 1 <= threads <= cores:
        raise UsageError(f"threads must lie between 1 and {cores}, the cores of {profile.title}")
    if not 1 <= n_batch <= 1 << 14:
        raise UsageError(f"n_batch must lie between 1 and {1 << 14}")
    return _Wish(context, batch, threads or profile.n_threads, kv_type, n_batch)


@dataclass(frozen=True)
class _Case:
    """One type and context on the board: what it takes, where its layers go, how fast it is."""

    model: PlannedModel
    cost: ModelCost
    wish: _Wish
    memory: MemoryPlan
    layers: int | None
    work: Work
    prediction: Prediction

    @property
    def fits(self) -> bool:
        return self.memory.margin >= 0


def _case(model: PlannedModel, profile: DeviceProfile, wish: _Wish) -> _Case:
    header = model.language()
    cost = model_cost.cost(header)
    memory = plan_memory.of_model(
        header,
        cost,
        context=wish.context,
        n_seqs=wish.n_seqs,
        n_batch=wish.n_batch,
        kv_type=wish.kv_type,
        available=profile.available_bytes,
        graph=model.runtime == _GRAPH_ENGINE,
    )
    layers = _gpu_layers(header, memory, profile, wish)
    part = 0.0 if layers is None else layers / max(1, len(cost.layers))
    if profile.gpu and not profile.gpu.shared:
        memory = replace(memory, gpu=_gpu_bytes(header, memory, part))
    work = Work(
        n_threads=wish.threads,
        n_seqs=wish.n_seqs,
        n_batch=wish.n_batch,
        kv_type=wish.kv_type,
        gpu_part=part,
    )
    return _Case(model, cost, wish, memory, layers, work, predict(cost, profile, work))


def _gpu_layers(
    header: GgufHeader, memory: MemoryPlan, profile: DeviceProfile, wish: _Wish
) -> int | None:
    """How many layers the GPU takes: of its own memory what fits, of a shared one all or none."""
    if profile.gpu is None:
        return None
    count = int(header.metadata.get(f"{header.architecture}.block_count", 0))
    free = round(profile.gpu.memory_mib.value * MIB)
    if profile.gpu.shared:
        return count if memory.total <= free else 0
    params = LoadParams(n_ctx=wish.context * wish.n_seqs, kv_type=wish.kv_type)
    return min(count, gpu_layers.count(header, params, free))


def _gpu_bytes(header: GgufHeader, memory: MemoryPlan, part: float) -> int:
    """What lies on a GPU: all but the runtime, or the part of the layers with their cache."""
    if part == 1:
        return memory.total - memory.runtime
    layers = sum(each.size_bytes for each in header.tensors if each.name.startswith("blk."))
    return round(part * (layers + memory.kv_cache))


def _language_plan(model: PlannedModel, profile: DeviceProfile, wish: _Wish) -> Plan:
    header = model.language()
    case = _case(model, profile, wish)
    full = predict(case.cost, profile, replace(case.work, depth=wish.context))
    storage = profile.storage.read_mbps
    return Plan(
        model=model.name,
        architecture=header.architecture,
        parameters=header.parameters,
        type=model.type,
        device=profile.name,
        title=profile.title,
        threads=wish.threads,
        context=wish.context,
        n_seqs=wish.n_seqs,
        kv_type=wish.kv_type,
        memory=case.memory,
        decode=case.prediction.decode,
        decode_full=full.decode,
        prefill=case.prediction.prefill,
        latency_ms=None,
        load_s=band(case.memory.weights / (storage.value * 1e6) + _START_S, _LOAD_OFF),
        bound=case.prediction.bound,
        verdict=_verdict(case.prediction),
        gpu_layers=case.layers,
        recommended=_recommended(case, profile),
        inputs=(*_board_inputs(profile), *case.prediction.inputs),
        remarks=tuple(_remarks(case, profile)),
    )


def _verdict(prediction: Prediction) -> str:
    parts = {
        "memory": (prediction.memory_ms, "reading weights and cache"),
        "compute": (prediction.compute_ms, "arithmetic"),
        "overhead": (prediction.overhead_ms, "starting operators"),
    }
    ms, what = parts[prediction.bound]
    total = 1e3 / prediction.decode.mid
    return f"{prediction.bound}-bound: {what} would take {ms:.3g} of {total:.3g} ms a token"


def _board_inputs(profile: DeviceProfile) -> Iterator[Input]:
    for name, unit, figure in (
        ("memory", "MiB", profile.memory.total_mib),
        ("memory that the system keeps", "MiB", profile.memory.system_mib),
        (f"reading from {profile.storage.name}", "MB/s", profile.storage.read_mbps),
    ):
        yield Input(name, figure.value, unit, figure.source, figure.origin)
    if profile.gpu:
        memory = profile.gpu.memory_mib
        yield Input("GPU memory", memory.value, "MiB", memory.source, memory.origin)


def _remarks(case: _Case, profile: DeviceProfile) -> Iterator[str]:
    if not case.fits:
        short = -case.memory.margin / 1e6
        yield f"{profile.title} lacks {short:.0f} MB of memory for it"
    elif case.memory.margin < 0.1 * case.memory.available:
        yield "little memory is left: close everything else"
    if case.model.runtime == _GRAPH_ENGINE:
        yield "speeds are those of llama.cpp with as many bits: ONNX Runtime's were not fitted"
    if case.layers and profile.gpu:
        yield f"with an engine that is built for {profile.gpu.name}; else the CPU computes all"


def _recommended(case: _Case, profile: DeviceProfile) -> Recommended:
    """The best type that fits and is pleasant to read along with, else the fastest that fits.

    The context is the one asked for, or the largest power of two below it that fits.
    """
    found = []
    for model in _candidates(case.model):
        if fitting := _with_fitting_context(model, profile, case.wish):
            found.append(fitting)
    if not found:
        return Recommended(None, None, None, case.wish.threads, None, None)
    longest = max(each.wish.context for each in found)
    found = [each for each in found if each.wish.context == longest]
    pleasant = [each for each in found if each.prediction.decode.mid >= _PLEASANT_TOK_S]
    four_bits = [each for each in found if each.model.type == quant.GGUF_BITS[4].type]
    best = (pleasant or four_bits or found)[0]
    bits = {preset.type: bits for bits, preset in quant.GGUF_BITS.items()}
    return Recommended(
        bits=bits.get(best.model.type, round(best.model.language().bits_per_weight)),
        type=best.model.type,
        context=best.wish.context,
        threads=best.wish.threads,
        gpu_layers=best.layers,
        decode_tok_s=best.prediction.decode.mid,
    )


def _candidates(model: PlannedModel) -> Iterator[PlannedModel]:
    """The model in every type that is worth a thought, the best first.

    What was quantized before stays as it is, or gets fewer bits.
    """
    if model.runtime == _GRAPH_ENGINE or model.lossy_bytes == weight_bytes(model.language()):
        yield model
    if model.runtime == _GRAPH_ENGINE:
        return  # other types are another export
    for name in _CANDIDATES:
        other = in_type(model, name)
        if model.lossy_bytes is None or weight_bytes(other.language()) < model.lossy_bytes:
            yield other


def _with_fitting_context(model: PlannedModel, profile: DeviceProfile, wish: _Wish) -> _Case | None:
    context = wish.context
    while True:
        case = _case(model, profile, replace(wish, context=context))
        if case.fits:
            return case
        if context <= _SMALLEST_CONTEXT:
            return None
        context = max(_SMALLEST_CONTEXT, 1 << (context - 1).bit_length() - 1)


def _vision_plan(model: PlannedModel, profile: DeviceProfile, threads: int) -> Plan:
    assert model.vision is not None
    int8 = model.type == "int8"
    memory = plan_memory.of_vision(
        model.vision, int8=int8, available=profile.available_bytes, stored=model.stored
    )
    engine = _LITE_ENGINES.get(model.runtime, _GRAPH_ENGINE)
    latency = vision_predictor.predict_vision(
        model.vision, profile, int8=int8, engine=engine, n_threads=threads
    )
    faster = vision_predictor.predict_vision(
        model.vision, profile, int8=True, engine=engine, n_threads=threads
    )
    bound, verdict = vision_predictor.bound(model.vision, profile, int8, engine, threads)
    storage = profile.storage.read_mbps
    faster_if = (f"with 8 bits {faster.mid:.3g} ms",) if not int8 else ()
    open_sizes = (
        (f"sizes that the file leaves open were taken for {', '.join(model.assumed)}",)
        if model.assumed
        else ()
    )
    inputs = vision_predictor.inputs(profile, engine=engine, n_threads=threads)
    return Plan(
        model=model.name,
        architecture="vision",
        parameters=round(model.vision.weights),
        type=model.type,
        device=profile.name,
        title=profile.title,
        threads=threads,
        context=0,
        n_seqs=1,
        kv_type="",
        memory=memory,
        decode=None,
        decode_full=None,
        prefill=None,
        latency_ms=latency,
        load_s=band(memory.weights / (storage.value * 1e6) + _START_S, _LOAD_OFF),
        bound=bound,
        verdict=verdict,
        gpu_layers=None,
        recommended=Recommended(8, "int8", None, threads, None, None),
        inputs=(*_board_inputs(profile), *inputs),
        remarks=(*faster_if, *open_sizes),
    )
