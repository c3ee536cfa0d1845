"""How long one image takes on a board, from its cost and the board's profile, with an error band.

Knows costs, profiles and the constants of ``predictor.Calibration``; never runs anything.
"""

from __future__ import annotations

from edgekit.device import DeviceProfile, at_threads
from edgekit.predictor import BANDS, CALIBRATION, Band, Calibration, Input, band
from edgekit.vision_cost import VisionCost

# The rate of convolutions grows with this power of the threads.
_SCALING = 0.66
# Times that engines take against ncnn, which the constants are fitted to. Of these only ncnn
# computes in float16 where the core can.
ENGINES = {"ncnn": 1.0, "tflite": 0.65, "ort": 1.6}


def predict_vision(
    cost: VisionCost,
    profile: DeviceProfile,
    *,
    int8: bool = False,
    engine: str = "ncnn",
    n_threads: int | None = None,
    calibration: Calibration = CALIBRATION,
) -> Band:
    """Milliseconds for one image.

    Arithmetic and the traffic of activations follow each other, layer by layer.
    """
    threads = n_threads or profile.n_threads
    seconds = sum(_parts(cost, profile, int8, engine, threads, calibration))
    sources = {each.source for each in inputs(profile, engine=engine, n_threads=threads)}
    off = max(BANDS[source] for source in sources)
    return band(1e3 * seconds, off)


def _parts(
    cost: VisionCost,
    profile: DeviceProfile,
    int8: bool,
    engine: str,
    threads: int,
    calibration: Calibration,
) -> tuple[float, float]:
    """Seconds of arithmetic, and of traffic."""
    halves = _halves(profile, engine)
    peaks = profile.peaks.float16_gflops if halves else profile.peaks.float32_gflops
    rate = calibration.vision * at_threads(peaks, 1).value * 1e9 * threads**_SCALING
    value_bytes = 1 if int8 else 2 if halves else 4
    moved = (2 * calibration.traffic * cost.activations + cost.weights) * value_bytes
    slower = ENGINES[engine]
    return slower * cost.flops / rate, slower * moved / profile.read_bytes_s(threads)


def inputs(
    profile: DeviceProfile,
    *,
    engine: str,
    n_threads: int,
    calibration: Calibration = CALIBRATION,
) -> tuple[Input, ...]:
    """The figures that ``predict_vision`` takes."""
    halves = _halves(profile, engine)
    peaks = profile.peaks.float16_gflops if halves else profile.peaks.float32_gflops
    memory, peak = at_threads(profile.memory.read_gbps, n_threads), at_threads(peaks, 1)
    fitted = "published", "fitted: edgekit plan --validate"
    return (
        Input(
            f"read bandwidth, {n_threads} threads",
            memory.value,
            "GB/s",
            memory.source,
            memory.origin,
        ),
        Input(
            f"{'float16' if halves else 'float32'} peak, 1 thread",
            peak.value,
            "GFLOP/s",
            peak.source,
            peak.origin,
        ),
        Input("times the peak that convolutions reach", calibration.vision, "", *fitted),
        Input("crossings of memory by an activation", calibration.traffic, "", *fitted),
        Input(f"time of {engine} against ncnn", ENGINES[engine], "", *fitted),
    )


def _halves(profile: DeviceProfile, engine: str) -> bool:
    return engine == "ncnn" and bool(profile.peaks.float16_gflops)


def bound(
    cost: VisionCost, profile: DeviceProfile, int8: bool, engine: str, n_threads: int
) -> tuple[str, str]:
    """ "memory" or "compute", and a sentence that says why."""
    compute_s, memory_s = _parts(cost, profile, int8, engine, n_threads, CALIBRATION)
    kind, more = max(("memory", memory_s), ("compute", compute_s), key=lambda pair: pair[1])
    what = "traffic of activations" if kind == "memory" else "arithmetic"
    return kind, f"{kind}-bound: {what} takes {more / (compute_s + memory_s):.0%} of the time"
