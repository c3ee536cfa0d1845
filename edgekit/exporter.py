"""Export: resolve the recipe, check the room, run the exporter, prove, hash, commit.

Knows the order of the work and the manifest; never a format's bytes, those are the exporters'.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from edgekit import __version__, _fs
from edgekit.artifact import MANIFEST, Artifact, ArtifactFile, Manifest, is_artifact
from edgekit.beside import Beside
from edgekit.errors import ParityError, RecipeError, UsageError
from edgekit.receipt import Gates, Receipt, Tuning
from edgekit.recipe import Recipe
from edgekit.registry import EXPORTERS, PROOFS
from edgekit.source import ModelSource, of_module
from edgekit.source import source as resolve_source
from edgekit.tensor_figures import PassTrial

# progress(stage, done, total): what is being done, and how far it is in units of its own.
Progress = Callable[[str, int, int], None]
_REFERENCE = "reference"  # with the format's name as its suffix, or as a folder


def no_progress(stage: str, done: int, total: int) -> None:
    """For callers that do not watch."""


@dataclass(frozen=True)
class ExportOptions:
    """What a user may ask of an export; None means "the documented default".

    ``calibration`` is "builtin", "none", a text file or a folder of images, ``chunks`` how many
    pieces of it; ``overrides`` are (pattern, tensor type); ``adapter`` is a LoRA folder, merged in
    or (``adapter_mode`` "keep") shipped beside the model; ``fusion`` and ``via`` as in Recipe.
    """

    bits: int | None = None
    type: str | None = None
    calibration: str | Path | None = None
    chunks: int | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    adapter: Path | None = None
    adapter_mode: str = "merge"
    fusion: str = "auto"
    via: str = ""


@dataclass(frozen=True)
class TensorPlan:
    """What will become of one tensor. ``wanted`` differs from ``type`` where that type cannot hold
    the tensor's shape and a larger one steps in. ``shape`` is in the format's own order.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    wanted: str
    size_bytes: int


@dataclass(frozen=True)
class ExportPlan:
    """What an export would make: sizes in bytes, bits per weight, the type of every tensor.

    ``scratch_bytes`` is needed on the output's disk while the work runs, beside ``size_bytes``;
    then ``reference_bytes`` for the float model that a receipt is measured against.
    """

    recipe: Recipe
    size_bytes: int
    scratch_bytes: int
    bits_per_weight: float
    tensors: tuple[TensorPlan, ...]
    warnings: tuple[str, ...] = ()
    reference_bytes: int = 0

    @property
    def fallbacks(self) -> list[TensorPlan]:
        return [tensor for tensor in self.tensors if tensor.type != tensor.wanted]


@dataclass(frozen=True)
class Product:
    """What an exporter left in its folder: (role, file name) pairs, and facts for the manifest.

    ``recipe`` is the plan's with what was decided on the way, ``fusion`` what was measured for it.
    """

    files: tuple[tuple[str, str], ...]
    details: dict[str, Any] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    recipe: Recipe | None = None
    fusion: tuple[PassTrial, ...] = ()


class Exporter(Protocol):
    """A format. One object serves one export: options in, recipe out, then plan or run."""

    def recipe(self, source: ModelSource, options: ExportOptions) -> Recipe:
        """Resolve the options to a recipe, and remember the files they name."""
        ...

    def plan(self, source: ModelSource, recipe: Recipe) -> ExportPlan:
        """What ``run`` would make, without reading a weight."""
        ...

    def run(
        self,
        source: ModelSource,
        hashes: dict[str, str],
        plan: ExportPlan,
        folder: Path,
        progress: Progress,
    ) -> Product:
        """Fill ``folder``. Everything in it afterwards belongs to the artifact.

        ``hashes`` are the SHA-256 of the source's files: what a cache may be keyed by.
        """
        ...

    def reference(
        self, source: ModelSource, recipe: Recipe, path: Path, progress: Progress
    ) -> Path:
        """The float model that the product of ``recipe`` is measured against.

        Written to ``path`` (or to a folder of that name without the suffix), or the source itself
        where it is that model already.
        """
        ...


@dataclass(frozen=True)
class Claim:
    """What a proof is about: ``product`` (with ``adapters`` beside it) does what ``source`` does,
    as far as its bits go. ``reference`` is a float file of the source. ``chunks`` of held-out text
    are read; None lets the proof choose, by the time that they take here. ``data`` is held-out data
    of the user's own: a text file, a folder of images or JSON lines. ``runtime`` None is the
    format's own. ``layers``: look inside, too.
    """

    source: ModelSource
    product: Path
    adapters: tuple[Path, ...]
    reference: Path
    fallbacks: int
    chunks: int | None = None
    data: Path | None = None
    runtime: str | None = None
    layers: bool = False


# A proof: measures everything and fills the receipt. Raises ParityError where the claim is false.
Proof = Callable[[Claim, Progress], Receipt]
# Holds a finished artifact against other models before it is kept. Raises what keeps it from that.
Admission = Callable[[Artifact], tuple[Beside, ...]]


def plan(
    model: str | Path | ModelSource,
    format: str = "gguf",
    *,
    revision: str | None = None,
    options: ExportOptions | None = None,
) -> ExportPlan:
    """What ``export`` would make, without making it. Raises what ``export`` raises."""
    return _prepare(model, format, revision, options or ExportOptions())[2]


def export(
    model: str | Path | ModelSource | Any,
    format: str = "gguf",
    *,
    out: str | Path,
    example_inputs: Any = None,
    preprocess: Mapping[str, Any] | None = None,
    revision: str | None = None,
    progress: Progress = no_progress,
    expect: Manifest | None = None,
    receipt: bool = True,
    gates: Gates | None = None,
    eval_data: str | Path | None = None,
    tuning: Tuning | None = None,
    explain_loss: bool = False,
    admit: Admission | None = None,
    **options: Any,
) -> Artifact:
    """Make an artifact at ``out`` from a model; ``options`` as in ExportOptions.

    ``model`` is what ``edgekit.source`` takes, a ModelSource, or a ``torch.nn.Module``, which needs
    ``example_inputs``: a tuple of tensors to call it with, or a dict of them by parameter name.
    ``preprocess`` lets it take images: fields of a ``preprocessor_config.json``, and "labels".

    An artifact that is already there is replaced in one step, and stays whole if the export fails.
    With ``receipt`` the output is proved before it is committed (docs/receipt.md), and must pass
    ``gates``; without it the manifest says "unproven". ``eval_data`` is what it is measured on
    instead of the built-in inputs: a folder of images or a text file, or either with classes (a
    folder for each, or JSON lines). ``explain_loss`` says what each layer loses. ``tuning`` is what
    ``edgekit.tune`` found: the receipt keeps it, and is measured in its runtime. ``admit`` sees the
    finished artifact, which is kept only if it returns (``cross_format.admission``). ``expect`` is
    the manifest of an earlier export that this one must repeat, byte for byte.
    Raises UsageError, SourceError, ExportError (ParityError and GateError among them),
    OutOfSpaceError, MissingExtraError, InferenceError.
    """
    try:
        chosen = ExportOptions(**options)
    except TypeError as error:
        raise UsageError(f"export() {str(error).partition(') ')[2]}") from None
    out, gates = Path(out), gates or Gates()
    if gates.need_a_receipt and not receipt:
        raise UsageError(
            "without a receipt nothing is measured that a gate could check",
            hint="drop --no-receipt, or all gates but --max-size",
        )
    if admit and not (receipt and format in PROOFS):
        raise UsageError(
            "without a receipt nobody knows how far it may be from another model",
            hint="leave out --against"
            + (", or --no-receipt" if format in PROOFS else f": {format} has no proof"),
        )
    if explain_loss and format != "onnx":
        raise UsageError(
            "what each layer loses is measured in ONNX graphs alone", hint="drop --explain-loss"
        )
    if example_inputs is not None or not isinstance(model, str | Path | ModelSource):
        model = of_module(model, example_inputs, preprocess)
    source, exporter, plan = _prepare(model, format, revision, chosen)
    if expect is not None and plan.recipe != expect.recipe:
        was, now = expect.recipe.to_dict(), plan.recipe.to_dict()
        raise RecipeError(
            f"these options do not repeat the earlier export: {_difference(was, now)}",
            hint="give the calibration text and the adapter that the earlier export used",
        )
    if source.kind in ("hf", "run") and _inside(source.path, out):
        raise UsageError(f"--out {out} lies inside the model's own folder")
    beside = max(plan.scratch_bytes, plan.reference_bytes if receipt else 0)
    _fs.require_space(out.absolute(), plan.size_bytes + beside)
    with _fs.staged(out, owns=is_artifact) as folder:
        hashes = source_hashes(source, progress)
        product = exporter.run(source, hashes, plan, folder, progress)
        manifest = Manifest(
            format=format,
            recipe=product.recipe or plan.recipe,
            source={
                "spec": source.spec,
                "kind": source.kind,
                "family": source.family,
                "revision": source.revision,
                "quantized": source.quantized,
                "sha256": hashes,
            },
            files=_hashed(folder, product.files, progress),
            details=product.details,
            versions=_versions(product.packages),
        )
        if expect is not None and manifest.files != expect.files:
            raise ParityError(
                "the same recipe on the same source gave other bytes: "
                + (_difference(_engine(expect), _engine(manifest)) or "no version differs"),
                hint="repeat it with the versions, and on the kind of CPU, of the earlier export",
            )
        proved = Receipt()
        if receipt:
            made = Artifact(folder, manifest)
            data = Path(eval_data) if eval_data is not None else None
            proved = prove(
                *(exporter, source, plan, made, folder, None, progress, data),
                tuning=tuning,
                layers=explain_loss,
            )
        gates.check(proved, sum(file.size_bytes for file in manifest.files))
        proved = replace(proved, gates=gates.limits(), fusion=product.fusion)
        manifest = _write(folder, manifest, proved)
        if admit:
            _write(folder, manifest, replace(proved, beside=admit(Artifact(folder, manifest))))
    return Artifact.open(out)


def _write(folder: Path, manifest: Manifest, receipt: Receipt) -> Manifest:
    """Put the receipt into the manifest, and that into the folder."""
    manifest = replace(manifest, receipt=receipt.to_dict())
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def prove(
    exporter: Exporter,
    source: ModelSource,
    plan: ExportPlan,
    artifact: Artifact,
    folder: Path,
    chunks: int | None,
    progress: Progress,
    data: Path | None = None,
    tuning: Tuning | None = None,
    layers: bool = False,
) -> Receipt:
    """Measure ``artifact`` against the float model, which lies in ``folder`` meanwhile."""
    if artifact.format not in PROOFS:
        return Receipt(reason=f"edgekit has no proof for the format {artifact.format}")
    proof: Proof = PROOFS.load(artifact.format)
    scratch = folder / f"{_REFERENCE}.{artifact.format}"
    files = artifact.manifest.files
    claim = Claim(
        source=source,
        product=artifact.model_path,
        adapters=tuple(
            _fs.contained(artifact.path, file.path) for file in files if file.role == "adapter"
        ),
        reference=exporter.reference(source, plan.recipe, scratch, progress),
        fallbacks=len(plan.fallbacks),
        chunks=chunks,
        data=data,
        runtime=tuning.runtime if tuning else None,
        layers=layers,
    )
    receipt = replace(proof(claim, progress), tuning=tuning)
    for made in folder.glob(f"{_REFERENCE}*"):  # a file with weights beside it, or a folder
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    return receipt


def _prepare(
    model: str | Path | ModelSource, format: str, revision: str | None, options: ExportOptions
) -> tuple[ModelSource, Exporter, ExportPlan]:
    exporter: Exporter = EXPORTERS.load(format)()
    source = (
        model if isinstance(model, ModelSource) else resolve_source(str(model), revision=revision)
    )
    if options.via and (format != "onnx" or source.kind != "hf"):
        raise RecipeError(
            f"{options.via} makes ONNX graphs of Hugging Face folders alone",
            hint="--format onnx, or leave out --via",
        )
    recipe = exporter.recipe(source, options)
    return source, exporter, exporter.plan(source, recipe)


def _difference(was: dict[str, Any], now: dict[str, Any]) -> str:
    keys = sorted(was.keys() | now.keys())
    return ", ".join(
        f"{key} was {was.get(key)}, is {now.get(key)}"
        for key in keys
        if was.get(key) != now.get(key)
    )


def _engine(manifest: Manifest) -> dict[str, Any]:
    """What beside the recipe may change the bytes."""
    return manifest.versions | {"imatrix": manifest.details.get("imatrix")}


def _inside(folder: Path, out: Path) -> bool:
    return folder.is_dir() and out.resolve().is_relative_to(folder.resolve())


def source_hashes(source: ModelSource, progress: Progress) -> dict[str, str]:
    total = source.size_bytes
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress("hash the source", done, total)

    return source.hashes(on_bytes)


def _hashed(
    folder: Path, names: tuple[tuple[str, str], ...], progress: Progress
) -> tuple[ArtifactFile, ...]:
    sizes = {name: (folder / name).stat().st_size for _, name in names}
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress("hash the output", done, sum(sizes.values()))

    return tuple(
        ArtifactFile(role, name, sizes[name], _fs.sha256_file(folder / name, on_bytes))
        for role, name in names
    )


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {"edgekit": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
