"""The proof of a vision model's, an encoder's or any graph's export: what its receipt says.

Knows which figures tell whether two graphs do the same, and when one disproves the export; never
how an engine works, and it writes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from edgekit import graph_file, language_model, machine, preprocess, sample_inputs
from edgekit.errors import InferenceError, ParityError
from edgekit.exporter import Claim, Progress
from edgekit.formats import onnx
from edgekit.graph_file import GraphFile
from edgekit.intervals import Interval
from edgekit.preprocess import Preprocessing
from edgekit.receipt import PROVEN, Agreement, Latency, Receipt, Reference, Size, bounded
from edgekit.registry import RUNTIME_OF_FORMAT, RUNTIMES
from edgekit.runtime import LoadParams, TensorSession
from edgekit.runtimes import aligned, tensor_agreement
from edgekit.sample_inputs import Samples
from edgekit.tensor_figures import Accuracy, Ranking

_SAMPLES = {"image": 64, "text": 128, "tensors": 32}
_LAYER_SAMPLES = 8
_RACE_S = 4.0
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 200
_HINT = "nothing was kept; --no-receipt exports it all the same"
# Bits of the smallest weights -> the least mean cosine that a sound file can have.
_SOUND_COSINE = ((32, 0.9999), (16, 0.995), (8, 0.9), (0, 0.75))
_NO_WEIGHTS = ("bool", "string")
_FEW = 0.9  # of the classes that stay the same: below, nobody should deploy it unwarned


def prove(claim: Claim, progress: Progress) -> Receipt:
    """Measure everything about an export to ONNX or TFLite; a language model's is measured as a
    GGUF's is.

    Raises ParityError where the file does not do what its source does, UsageError for held-out data
    that does not suit it, InferenceError or MissingExtraError when the measuring itself fails.
    """
    if language_model.is_one(claim.product):
        from edgekit import proof  # which needs this module for its sizes

        return proof.prove(claim, progress)
    steps = preprocess.beside(claim.product)
    own, other = (graph_file.format_of(path) for path in (claim.product, claim.reference))
    runtime = RUNTIMES.load(claim.runtime or RUNTIME_OF_FORMAT[own])()
    # A file of another format is its own judge, in the engine that it is for.
    beside = runtime if other == own else RUNTIMES.load(RUNTIME_OF_FORMAT[other])()
    progress("first load", 0, 2)
    try:
        product = runtime.load(claim.product, LoadParams())
    except InferenceError as error:
        raise ParityError(
            f"the exported file fails in the engine: {error.message}", hint=_HINT
        ) from None
    progress("first load", 1, 2)
    with product, beside.load(claim.reference, LoadParams(n_threads=product.threads)) as judge:
        progress("first load", 2, 2)
        float_one: Any = judge if other == own else aligned.Aligned(judge, product)
        pairs = _pairs(claim, steps, product, float_one)
        proved = [_compare(pair, claim, progress) for pair in pairs]
        for pair, (_, agreement) in zip(pairs, proved, strict=True):
            _check_sound(pair.header.least_bits, agreement)
        races = [
            _race(pair.product, pair.reference, found.feeds[0], progress)
            for pair, (found, _) in zip(pairs, proved, strict=True)
        ]
        layers = None
        if claim.layers and pairs[0].header.format == "onnx":
            # Here, for the proof of a GGUF passes through this file and needs no ONNX Runtime.
            from edgekit.runtimes import onnx_layers

            # Of two encoders the one that loses more.
            loser = min(range(len(pairs)), key=lambda i: proved[i][1].cosine.value)
            some = proved[loser][0].feeds[:_LAYER_SAMPLES]
            pair = pairs[loser]
            layers = onnx_layers.losses(pair.path, pair.reference_path, some, progress)
        accuracy = _accuracy(claim, pairs[0], progress)
        ranking = None
        if steps.matching:
            feeds = [found.feeds for found, _ in proved]
            ranking = tensor_agreement.ranking(product, float_one, feeds, steps)
    agreements = [agreement for _, agreement in proved]
    own_bytes = sum(pair.header.size_bytes for pair in pairs)
    parameters = sum(pair.reference_header.parameters for pair in pairs)
    two = len(pairs) > 1
    return Receipt(
        status=PROVEN,
        reference=Reference(
            type="F32",
            origin="the source" if claim.reference == claim.source.path else "made of the source",
            size_bytes=sum(pair.reference_header.size_bytes for pair in pairs),
            requantized_from=claim.source.quantized,
        ),
        agreement=agreements[0],
        latency=races[0],
        text_agreement=agreements[1] if two else None,
        text_latency=races[1] if two else None,
        ranking=ranking,
        accuracy=accuracy,
        layers=layers,
        size=Size(own_bytes, 8 * own_bytes / max(1, parameters), claim.fallbacks),
        warnings=tuple(_warnings(agreements, races, ranking)),
    )


@dataclass(frozen=True)
class _Pair:
    """A graph of the product, and its float model: one, or two for a model of two encoders."""

    steps: Preprocessing
    product: TensorSession
    reference: TensorSession
    path: Path
    reference_path: Path

    @cached_property
    def header(self) -> GraphFile:
        return graph_file.read(self.path)

    @cached_property
    def reference_header(self) -> GraphFile:
        return graph_file.read(self.reference_path)


def _pairs(claim: Claim, steps: Preprocessing, product: Any, float_one: Any) -> list[_Pair]:
    if steps.matching is None:
        return [_Pair(steps, product, float_one, claim.product, claim.reference)]
    image, text = preprocess.encoders(steps)
    name = steps.matching.text_model
    beside = claim.product.with_name(name), claim.reference.with_name(name)
    return [
        _Pair(image, product.image, float_one.image, claim.product, claim.reference),
        _Pair(text, product.text, float_one.text, *beside),
    ]


def _compare(pair: _Pair, claim: Claim, progress: Progress) -> tuple[Samples, Agreement]:
    """The held-out inputs, and how far both agree on them."""
    _same_form(pair.product, pair.reference)
    two = preprocess.beside(claim.product).matching is not None
    found = sample_inputs.samples(
        pair.steps,
        pair.product.inputs,
        folder=claim.product.parent,
        data=sample_inputs.meant_for(pair.steps, claim.data) if two else claim.data,
        count=claim.chunks or _SAMPLES["image" if two else pair.steps.task.partition("-")[0]],
        part="held-out",
    )
    return found, tensor_agreement.measure(
        pair.product, pair.reference, found, pair.steps, progress
    )


def size_bytes(path: Path, header: onnx.OnnxHeader) -> int:
    """Of a model file and of the weights beside it."""
    return path.stat().st_size + sum((path.parent / n).stat().st_size for n in header.beside)


def _same_form(product: TensorSession, reference: TensorSession) -> None:
    for what in ("inputs", "outputs"):
        mine, theirs = ([s.name for s in getattr(side, what)] for side in (product, reference))
        if mine != theirs:
            raise ParityError(f"the exported file has the {what} {mine}, its source has {theirs}")


def _check_sound(bits: int, agreement: Agreement) -> None:
    """Raises ParityError for answers further off than so few bits explain."""
    least = next(cosine for bound, cosine in _SOUND_COSINE if bits >= bound)
    if not agreement.cosine.value >= least:
        raise ParityError(
            f"the exported file does not answer as its source does: cosine"
            f" {bounded(agreement.cosine)}, where {bits} bits cost no more than {1 - least:.2g}",
            hint=f"{_HINT}, and another --type may do better",
        )


def least_bits(header: onnx.OnnxHeader) -> int:
    """Of the weights of matrices and kernels."""
    packed = [int(n.attributes.get("bits", 4)) for n in header.nodes if n.op_type == "MatMulNBits"]
    sizes = {name: bits for name, bits in onnx.DTYPES.values() if name not in _NO_WEIGHTS}
    kinds = [sizes.get(t.dtype, 32) for t in header.initializers if len(t.shape) > 1]
    return min([*packed, *kinds, 32])


def _accuracy(claim: Claim, pair: _Pair, progress: Progress) -> Accuracy | None:
    """On labelled data of the user's own; None without."""
    if claim.data is None or not pair.steps.task.endswith("classification"):
        return None
    rows = sample_inputs.labelled(
        pair.steps, pair.product.inputs, folder=claim.product.parent, data=claim.data
    )
    if not rows:
        return None
    data = sample_inputs.identity(claim.data)
    return tensor_agreement.accuracy(pair.product, pair.reference, rows, data, progress)


def _race(
    product: TensorSession, reference: TensorSession, feed: Mapping[str, Any], progress: Progress
) -> Latency:
    """Both in turn on one sample, one run each, after two to warm up."""
    seconds: list[list[float]] = [[], []]
    sides = (product, reference)
    ends = time.perf_counter() + _RACE_S
    busy = os.getloadavg()[0] > 2 * len(os.sched_getaffinity(0))
    for turn in range(-2, _MOST_ROUNDS):
        progress("race", max(0, turn), _MOST_ROUNDS)
        for number in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            sides[number].run(feed)
            if turn >= 0:
                seconds[number].append(time.perf_counter() - started)
        if turn + 1 >= _LEAST_ROUNDS and time.perf_counter() > ends:
            break
    progress("race", _MOST_ROUNDS, _MOST_ROUNDS)
    mine, theirs = seconds
    ratios = sorted(b / a for a, b in zip(mine, theirs, strict=True))
    cut = len(ratios) // 20  # the slowest and fastest twentieth are neighbours' noise
    cpu = machine.cpu(machine.root())
    return Latency(
        ms=1e3 * median(mine),
        reference_ms=1e3 * median(theirs),
        ratio=Interval(median(theirs) / median(mine), ratios[cut], ratios[-1 - cut]),
        rounds=len(ratios),
        threads=getattr(product, "threads", 0),
        cpu=cpu.model or cpu.architecture,
        busy=busy,
    )


def _warnings(
    agreements: list[Agreement], races: list[Latency], ranking: Ranking | None
) -> list[str]:
    found = []
    for latency in races:
        if latency.slower:
            found.append(
                f"SLOWER than the float model on this machine: {latency.ratio.value:.2f}x its speed"
            )
    if any(latency.busy for latency in races):
        found.append("the machine was busy while the speed was measured: measure it again")
    for agreement in agreements:
        if agreement.top1 and agreement.top1.value < _FEW:
            found.append(f"only {agreement.top1.value:.0%} of the inputs keep their class")
        if agreement.neighbours and agreement.neighbours.value < _FEW:
            share = f"{agreement.neighbours.value:.0%}"
            found.append(f"only {share} of the vectors keep their neighbour")
    if ranking and ranking.top1.value < _FEW:
        found.append(f"only {ranking.top1.value:.0%} of the images keep their likeliest text")
    return found
