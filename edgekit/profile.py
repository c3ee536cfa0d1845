"""Where a model's time goes, by kind of operator and by layer: as data, as tables, as a picture.

Knows what was measured, never the engine: that runs in a child process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit import _proc, language_header, plot
from edgekit.errors import UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.formats import gguf, onnx

_SILENCE_S = 600
_FILE_COPIES = 3
_ENGINE_BYTES = 4 << 30
_SHOWN = 12  # operators in a picture; the rest become one bar
OUTSIDE = "outside the layers"
HEAD = ("", "prefill ms", "share", "decode ms", "share")  # of both tables


@dataclass(frozen=True)
class Operator:
    """One kind of operator in one layer (None: outside them), in one pass through the graph.

    ``weight`` and ``type`` name the matrix of a product ("ffn_down", "Q6_K"), else they are empty.
    ``ms`` is the time of all ``count`` of them together.
    """

    operator: str
    weight: str
    type: str
    layer: int | None
    ms: float
    count: float

    @property
    def kind(self) -> str:
        """What a table calls it: ``MUL_MAT ffn_down Q6_K``."""
        return " ".join(filter(None, (self.operator, self.weight, self.type)))


@dataclass(frozen=True)
class Phase:
    """A prompt of ``n_tokens``, or one decoded token behind ``n_depth`` others.

    ``plain_ms`` is what it takes undisturbed. To time single operators the engine must stop behind
    each, which also keeps it from fusing them: all that took ``profiled_ms``.
    """

    name: str
    n_tokens: int
    n_depth: int
    plain_ms: float
    profiled_ms: float
    operators: tuple[Operator, ...]

    @property
    def operator_ms(self) -> float:
        """All operators together, without the time between two of them."""
        return sum(each.ms for each in self.operators)

    @property
    def count(self) -> int:
        """Operators of one pass."""
        return round(sum(each.count for each in self.operators))

    @property
    def overhead(self) -> float:
        """How much longer it took because it was profiled: 0.25 for a quarter."""
        return self.profiled_ms / self.plain_ms - 1

    def by_kind(self) -> dict[str, float]:
        """Kind of operator -> ms, the largest first."""
        found: dict[str, float] = {}
        for each in self.operators:
            found[each.kind] = found.get(each.kind, 0.0) + each.ms
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def by_layer(self) -> dict[str, float]:
        """Layer -> ms in their order; what belongs to none comes last."""
        found: dict[int | None, float] = {}
        for each in self.operators:
            found[each.layer] = found.get(each.layer, 0.0) + each.ms
        layers = sorted(layer for layer in found if layer is not None)
        inside = {str(layer): found[layer] for layer in layers}
        return inside | ({OUTSIDE: found[None]} if None in found else {})

    def sentence(self) -> str:
        """What the figures are worth."""
        return (
            f"{self.name}: {self.plain_ms:.2f} ms undisturbed, {self.profiled_ms:.2f} ms"
            f" profiled ({self.overhead:+.0%}), {self.operator_ms:.2f} ms of it in"
            f" {self.count} operators"
        )


@dataclass(frozen=True)
class Profile:
    """Where one model's time goes with ``n_threads`` threads, as measured: nothing is scaled."""

    model: str
    n_threads: int
    prefill: Phase
    decode: Phase

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every operator, and the sums by kind and by layer."""
        body = asdict(self)
        for phase in (self.prefill, self.decode):
            body[phase.name] |= {
                "operator_ms": phase.operator_ms,
                "overhead": phase.overhead,
                "by_kind": phase.by_kind(),
                "by_layer": phase.by_layer(),
            }
        return body


def profile(
    model: Path,
    *,
    n_prompt: int = 512,
    n_gen: int = 32,
    threads: int,
    progress: Progress = no_progress,
) -> Profile:
    """Time every operator of a language model, for a prompt and for tokens decoded behind it.

    Each phase runs a few times with and without the stopwatch, in turn, in a child process; the
    fastest runs count. Raises UsageError for impossible counts or more tokens than the model was
    trained for, CorruptArtifactError, LoadError, EngineCrashedError, DeadlineError.
    """
    if min(n_prompt, n_gen, threads) < 1:
        raise UsageError("a profile needs a prompt, tokens to generate, and threads")
    asked = {"n_prompt": n_prompt, "n_gen": n_gen, "threads": threads}
    found = _child("measure", model, asked, progress)
    return Profile(
        model=model.stem,
        n_threads=threads,
        prefill=_phase("prefill", n_prompt, 0, found["prefill"]),
        decode=_phase("decode", 1, n_prompt, found["decode"]),
    )


def count_operators(model: Path) -> int:
    """How many operators the engine's graph has for one decoded token. Loads the model once.

    Raises CorruptArtifactError, LoadError, EngineCrashedError, DeadlineError.
    """
    found: int = _child("count", model, {}, no_progress)
    return found


def _child(function: str, model: Path, asked: dict[str, int], progress: Progress) -> Any:
    is_onnx = language_header.is_onnx(model)
    (onnx if is_onnx else gguf).read(model)  # the engine sees no file that this refuses
    return _proc.call(
        f"edgekit.runtimes.{'ort_lm' if is_onnx else 'llama'}_profile:{function}",
        {"path": str(model.absolute()), **asked},
        silence_s=_SILENCE_S,
        memory_bytes=_FILE_COPIES * model.stat().st_size + _ENGINE_BYTES,
        what=f"the profile of {model.name}",
        on_report=lambda message: progress("profile", *message),
    )


def _phase(name: str, n_tokens: int, n_depth: int, found: dict[str, Any]) -> Phase:
    operators = tuple(Operator(*row) for row in found["operators"])
    return Phase(name, n_tokens, n_depth, found["plain_ms"], found["profiled_ms"], operators)


def kind_rows(profile: Profile) -> list[tuple[str, str, str, str, str]]:
    """A table: kind, and ms and share of each phase, by the time in decode."""
    prefill, decode = profile.prefill.by_kind(), profile.decode.by_kind()
    order = [*decode, *(kind for kind in prefill if kind not in decode)]
    return [_row(kind, (profile.prefill, prefill), (profile.decode, decode)) for kind in order]


def layer_rows(profile: Profile) -> list[tuple[str, str, str, str, str]]:
    """A table: layer, and ms and share of each phase."""
    prefill, decode = profile.prefill.by_layer(), profile.decode.by_layer()
    return [_row(layer, (profile.prefill, prefill), (profile.decode, decode)) for layer in prefill]


def _row(name: str, *phases: tuple[Phase, dict[str, float]]) -> tuple[str, str, str, str, str]:
    cells = []
    for phase, found in phases:
        ms = found.get(name, 0.0)
        cells += [f"{ms:.3f}", f"{ms / phase.operator_ms:.1%}"]
    return name, cells[0], cells[1], cells[2], cells[3]


def draw(profile: Profile, path: Path) -> None:
    """Bars by kind of operator and by layer for both phases, as .png or .svg.

    Raises UsageError for another suffix, MissingExtraError without matplotlib.
    """
    with plot.figure(path, width_in=10.0, height_in=7.5) as figure:
        figure.suptitle(f"{profile.model}, {_threads(profile.n_threads)}: where the time goes")
        axes = figure.subplots(2, 2, height_ratios=(3, 2))
        for column, phase in enumerate((profile.prefill, profile.decode)):
            _draw_kinds(axes[0][column], phase, plot.COLOURS[column])
            _draw_layers(axes[1][column], phase, plot.COLOURS[column])


def _draw_kinds(axis: Any, phase: Phase, colour: str) -> None:
    kinds = list(phase.by_kind().items())
    if len(kinds) > _SHOWN:
        rest = sum(ms for _, ms in kinds[_SHOWN - 1 :])
        kinds = [*kinds[: _SHOWN - 1], (f"{len(kinds) - _SHOWN + 1} others", rest)]
    names, times = zip(*reversed(kinds), strict=True)
    bars = axis.barh(names, times, color=colour)
    axis.bar_label(bars, [f" {ms / phase.operator_ms:.0%}" for ms in times], fontsize=8)
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.12)
    axis.set_xlabel("ms")
    axis.set_title(_title(phase), fontsize=9, loc="right")  # room is to the left, over the names


def _draw_layers(axis: Any, phase: Phase, colour: str) -> None:
    layers = phase.by_layer()
    outside = layers.pop(OUTSIDE, 0.0)
    axis.bar([int(layer) for layer in layers], list(layers.values()), color=colour)
    axis.grid(visible=False, axis="x")
    axis.set_xlabel(f"layer\n({OUTSIDE}: {outside:.2f} ms)")
    axis.set_ylabel("ms")


def _title(phase: Phase) -> str:
    work = (
        f"prompt of {phase.n_tokens} tokens"
        if phase.name == "prefill"
        else f"one token behind {phase.n_depth}"
    )
    return (
        f"{work}: {phase.plain_ms:.2f} ms undisturbed,\n"
        f"{phase.profiled_ms:.2f} ms profiled, {phase.operator_ms:.2f} ms in operators"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
