"""Do two artifacts of one model, of whatever formats, answer alike: the figures, and their band.

Knows what two receipts together allow; never how an engine works, nor what a format's bytes mean.

Receipts hold what each artifact lost against the float model of its source. Two that lost a and b
can differ by no more than (sqrt(a) + sqrt(b))^2: half the squared distance of two unit vectors is 1
less their cosine, and distances add up at most (Minkowski's inequality); for small divergences KL
is such a square too (Kullback, Information Theory and Statistics, 1959, chapter 2). Where one keeps
a class on all but a share p of the inputs, and the other on all but q, both name the same one on
all but p + q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit import agreement, evaluate, language_header, language_layers, typed_json
from edgekit.artifact import Artifact, is_artifact
from edgekit.beside import Beside, Figure
from edgekit.errors import ArtifactError, GateError, UsageError
from edgekit.exporter import Admission, Progress, no_progress
from edgekit.intervals import Interval
from edgekit.receipt import Gates, Receipt, figure
from edgekit.registry import RUNTIME_OF_FORMAT, RUNTIMES
from edgekit.scorer import model_files
from edgekit.tensor_figures import LayerLosses

# What two engines make of equal floats: they add up in another order, and keep the cache of a
# language model in other types. Larger figures than any pair of sound float files had here.
_ENGINES = {"mean_kl": 0.002, "cosine": 1e-4, "top1": 0.02, "neighbours": 0.02}
_FLOATS = ("F32", "F16", "BF16")
_N_CTX, _CHUNKS = 512, 4
_GATES = {"mean_kl": "max_kld", "top1": "min_top1", "cosine": "min_cosine"}


@dataclass(frozen=True)
class CrossFormat:
    """``model`` against ``against``, on ``samples`` inputs or tokens of ``data``. ``part`` is ""
    or, of two encoders, "images" or "texts". ``layers`` is None where the figures are within the
    band and nobody asked, or where the two cannot be looked into (``blind`` says why).
    """

    model: str
    against: str
    forms: tuple[str, str]
    part: str
    data: str
    samples: int
    figures: tuple[Figure, ...]
    layers: LayerLosses | None
    blind: str | None
    notes: tuple[str, ...]

    @property
    def within(self) -> bool:
        return all(each.within for each in self.figures)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = [
            typed_json.write(each) | {"value": each.value.to_dict(), "within": each.within}
            for each in self.figures
        ]
        return typed_json.write(self) | {"figures": figures, "within": self.within}


def compare(
    model: Path,
    against: Path,
    *,
    limits: Gates | None = None,
    data: Path | None = None,
    chunks: int | None = None,
    layers: bool = False,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> list[CrossFormat]:
    """How far two artifacts or model files answer alike, and whether that is within the band.

    ``limits`` replace the band of the receipts: ``max_kld``, ``min_top1``, ``min_cosine``. ``data``
    is a text, or a folder of images, instead of the built-in inputs; ``chunks`` how much of it two
    language models read. Outside the band, and with ``layers``, what each layer loses.
    Raises UsageError for two models that take or answer something else, and what loading raises.
    """
    sides = _Side.open(model), _Side.open(against)
    limits = limits or Gates()
    kinds = [side.of_tensors for side in sides]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"{against} is {'no' if kinds[1] else 'a'} language model, and is held against one that"
            f" is {'one' if kinds[1] else 'none'}"
        )
    if not kinds[0]:
        return [_of_language(sides, limits, data, chunks, layers, threads, progress)]
    if chunks is not None:
        raise UsageError("--chunks is for language models")
    how: dict[str, Any] = {"data": data, "threads": threads, "progress": progress}
    found = agreement.compare(model, against, layers=layers, **how)
    told = [_of_tensors(sides, part, limits) for part in found]
    if layers or all(each.within for each in told):
        return told
    again = agreement.compare(model, against, layers=True, **how)
    return [_of_tensors(sides, part, limits) for part in again]


def admission(
    against: Sequence[Path], *, data: Path | None = None, progress: Progress = no_progress
) -> Admission:
    """What ``export`` may be told to do with a finished artifact: hold it ``against`` others, or
    keep it out (``check``). ``data`` as in ``compare``. What can be seen of the others is checked
    here, and not after the export: every byte of an artifact, the kind of a file.
    Raises ArtifactError, CorruptArtifactError or SourceError, MissingExtraError without an engine.
    """
    for other in against:
        _check_other(other, progress)

    def admit(artifact: Artifact) -> tuple[Beside, ...]:
        found = [
            (other, replace(each, model="this export"))
            for other in against
            for each in compare(artifact.path, other, data=data, progress=progress)
        ]
        check(
            [each for _, each in found],
            hint="nothing was kept; `edgekit verify --against` shows all layers of a kept one",
        )
        return tuple(
            Beside(
                form=each.forms[1],
                sha256=Artifact.open(other).sha256 if is_artifact(other) else None,
                part=each.part,
                data=each.data,
                samples=each.samples,
                figures=each.figures,
                notes=each.notes,
            )
            for other, each in found
        )

    return admit


def _check_other(path: Path, progress: Progress) -> None:
    if not path.exists():
        raise ArtifactError(f"there is nothing at {path}")
    if is_artifact(path):
        artifact, done = Artifact.open(path), 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress("verify", done, artifact.size_bytes)

        artifact.verify(on_bytes)
        path = artifact.model_path
    form = path.suffix.lower().removeprefix(".")
    if not path.is_file() or form not in RUNTIME_OF_FORMAT:
        raise ArtifactError(f"{path} is no artifact, and no file of a model")
    RUNTIMES.load(RUNTIME_OF_FORMAT[form])


def check(
    found: Sequence[CrossFormat],
    *,
    hint: str = "export that one again; --max-kld, --min-cosine and --min-top1 set another band",
) -> None:
    """Raises GateError, which names every figure outside its band and the first layer to depart."""
    missed = []
    for each in found:
        said = [_missed(one) for one in each.figures if not one.within]
        if said:
            part = f" ({each.part})" if each.part else ""
            missed.append(
                f"{each.model} and {each.against}{part}: {', '.join(said)}; {_departs(each)}"
            )
    if missed:
        raise GateError(
            "they do not answer alike. " + ". ".join(missed),
            hint=hint,
        )


def _missed(found: Figure) -> str:
    side = "above" if found.name == "mean_kl" else "below"
    return f"{found.name} {figure(found.value.value)} is {side} {figure(found.limit)}"


def _departs(found: CrossFormat) -> str:
    if found.layers is None:
        return f"where they depart is not known: {found.blind}"
    first = found.layers.first
    if first is None:
        return "no layer stands out"
    return f"they depart first in {first.layer}, {first.op}, {first.tensor} ({first.snr_db:.1f} dB)"


# The two sides


@dataclass(frozen=True)
class _Side:
    """One of the two: its file, its form in words, and what its manifest proves of it."""

    path: Path
    file: Path
    form: str
    receipt: Receipt | None
    source: dict[str, Any] | None
    exact: bool

    @classmethod
    def open(cls, path: Path) -> _Side:
        if not is_artifact(path):
            return cls(path, path, path.suffix.lower().removeprefix("."), None, None, False)
        artifact = Artifact.open(path)
        manifest, kind = artifact.manifest, artifact.manifest.recipe.type
        receipt = Receipt.from_dict(artifact.receipt)
        return cls(
            path=path,
            file=artifact.model_path,
            form=f"{artifact.format} {kind}",
            receipt=receipt if receipt.quality or receipt.agreement else None,
            source=manifest.source["sha256"],
            exact=kind in _FLOATS,
        )

    @property
    def of_tensors(self) -> bool:
        return agreement.is_of_tensors(self.path)

    def lost(self, name: str, part: str) -> float:
        """Of its receipt: a mean KL, 1 - cosine, or a share that is another; 0 without one."""
        if self.receipt is None:
            return 0.0
        likeness: Any = self.receipt.text_agreement if part == "texts" else self.receipt.agreement
        likeness = self.receipt.quality or likeness
        found: Interval | None = getattr(likeness, name, None)
        if found is None:
            return 0.0
        if name == "mean_kl":
            return max(0.0, found.value, found.high if math.isfinite(found.high) else 0.0)
        low = found.low if math.isfinite(found.low) else found.value
        return max(0.0, 1 - min(found.value, low))


def _figure(
    sides: tuple[_Side, _Side], part: str, name: str, value: Interval, own: Gates
) -> Figure:
    given = getattr(own, _GATES[name]) if name in _GATES else None
    if given is not None:
        return Figure(name, value, given, given=True)
    lost = [side.lost(name, part) for side in sides]
    shares = name in ("top1", "neighbours")
    allowed = sum(lost) if shares else sum(map(math.sqrt, lost)) ** 2
    allowed += _ENGINES[name]
    limit = allowed if name == "mean_kl" else max(0.0, 1 - allowed)
    return Figure(name, value, limit, given=False)


def _notes(sides: tuple[_Side, _Side]) -> tuple[str, ...]:
    notes = [
        f"{side.path} has no receipt: the band takes it for exact"
        for side in sides
        if side.receipt is None and not side.exact
    ]
    sources = [side.source for side in sides]
    if all(sources) and sources[0] != sources[1]:
        notes.append("they were made of different files")
    return tuple(notes)


# Both kinds of models


def _of_tensors(
    sides: tuple[_Side, _Side], part: agreement.Comparison, limits: Gates
) -> CrossFormat:
    found = part.agreement
    values = {"cosine": found.cosine, "mean_kl": found.mean_kl, "top1": found.top1}
    values["neighbours"] = found.neighbours
    return CrossFormat(
        model=str(sides[0].path),
        against=str(sides[1].path),
        forms=(sides[0].form, sides[1].form),
        part=part.part,
        data=found.data,
        samples=found.samples,
        figures=tuple(
            _figure(sides, part.part, name, value, limits)
            for name, value in values.items()
            if value is not None
        ),
        layers=part.layers,
        blind=part.blind and f"{part.blind} cannot be looked into",
        notes=_notes(sides),
    )


def _trained_length(file: Path) -> int:
    """Tokens of the context that a language model was trained for, where its header says it."""
    header = language_header.read(file)
    found = header.metadata.get(f"{header.architecture}.context_length")
    return found if isinstance(found, int) and found > 0 else _N_CTX


def _of_language(
    sides: tuple[_Side, _Side],
    limits: Gates,
    data: Path | None,
    chunks: int | None,
    layers: bool,
    threads: int | None,
    progress: Progress,
) -> CrossFormat:
    if limits.min_cosine is not None:
        raise UsageError("--min-cosine is not for language models", hint="--max-kld, --min-top1")
    model, against = sides
    text = evaluate.read_text(data)
    lengths = [_trained_length(side.file) for side in sides]
    found = evaluate.compare(
        model.path,
        against.path,
        text,
        n_ctx=min(_N_CTX, *lengths),
        chunks=chunks or _CHUNKS,
        threads=threads,
        progress=progress,
    )
    figures = tuple(
        _figure(sides, "", name, getattr(found, name), limits) for name in ("mean_kl", "top1")
    )
    inside, blind = None, None
    if layers or not all(each.within for each in figures):
        by_format = {side.file.suffix.lower(): side for side in sides}
        if set(by_format) == {".gguf", ".onnx"}:
            gguf, onnx = (model_files(by_format[name].path) for name in (".gguf", ".onnx"))
            inside = language_layers.departs(gguf, onnx, text, threads=threads, progress=progress)
        else:
            blind = "language models are looked into as a GGUF beside an ONNX file"
    return CrossFormat(
        model=str(model.path),
        against=str(against.path),
        forms=(model.form, against.form),
        part="",
        data="builtin" if data is None else data.name,
        samples=found.tokens,
        figures=figures,
        layers=inside,
        blind=blind,
        notes=_notes(sides),
    )
