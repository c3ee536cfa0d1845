"""An export again, from its manifest: made, or measured.

Knows what of a manifest brings the source and the options back; never how an export goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekit import _fs
from edgekit.artifact import Artifact, Manifest
from edgekit.errors import RecipeError
from edgekit.exporter import (
    Admission,
    Exporter,
    ExportOptions,
    Progress,
    export,
    no_progress,
    prove,
    source_hashes,
)
from edgekit.receipt import PROVEN, Gates, Receipt, differences
from edgekit.registry import EXPORTERS
from edgekit.source import ModelSource
from edgekit.source import source as resolve_source


def repeat(
    manifest_of: str | Path,
    *,
    out: str | Path,
    model: str | Path | None = None,
    progress: Progress = no_progress,
    calibration: str | Path | None = None,
    adapter: Path | None = None,
    receipt: bool | None = None,
    gates: Gates | None = None,
    admit: Admission | None = None,
    eval_data: Path | None = None,
) -> Artifact:
    """Make an artifact again from its manifest: the same recipe on the same source.

    The source is ``model``, or found where it was (on the hub, at the pinned revision); it must
    have the same hashes. A calibration text or an adapter that was a file must be given again.
    A receipt is measured anew, on ``eval_data`` where that is given; with ``receipt`` None, if the
    earlier export had one, or ``gates`` or ``admit`` need it.
    Raises RecipeError or SourceError when it is not the same, ParityError when the bytes are not.
    """
    earlier = Artifact.open(manifest_of).manifest
    recipe = earlier.recipe
    source = _source_again(earlier, model, no_progress)
    if calibration is None:
        calibration = "builtin" if recipe.calibration else "none"
    if receipt is None:
        proven = earlier.receipt["status"] == PROVEN
        receipt = proven or admit is not None or (gates is not None and gates.need_a_receipt)
    return export(
        source,
        earlier.format,
        out=out,
        progress=progress,
        expect=earlier,
        receipt=receipt,
        gates=gates,
        admit=admit,
        eval_data=eval_data,
        type=recipe.type,
        calibration=calibration,
        chunks=recipe.calibration.chunks if recipe.calibration else None,
        overrides=recipe.overrides,
        adapter=adapter,
        adapter_mode=recipe.adapter_mode,
        fusion=recipe.fusion,
        via=recipe.via,
    )


def reprove(
    artifact: Artifact,
    *,
    model: str | Path | None = None,
    adapter: Path | None = None,
    eval_data: Path | None = None,
    progress: Progress = no_progress,
) -> tuple[Receipt, list[str]]:
    """Measure an artifact's receipt again, and say where its manifest's figures do not hold.

    The source is found as in ``repeat``; an adapter that was merged, and data of the user's own
    that it was measured on, must be given again. The artifact is only read.
    Raises ManifestError for a malformed receipt, RecipeError or SourceError when the source is
    another, ParityError when the model does not do what its source does.
    """
    earlier = artifact.manifest
    was = Receipt.from_dict(artifact.receipt)
    source = _source_again(earlier, model, progress)
    exporter: Exporter = EXPORTERS.load(earlier.format)()
    options = ExportOptions(
        type=earlier.recipe.type,
        calibration="builtin" if earlier.recipe.calibration else "none",
        adapter=adapter,
        adapter_mode=earlier.recipe.adapter_mode,
    )
    merged = earlier.recipe.adapter_mode == "merge"
    if merged and exporter.recipe(source, options).adapter != earlier.recipe.adapter:
        raise RecipeError(
            "the artifact was made with another adapter",
            hint="name the adapter that was merged in with --adapter",
        )
    plan = exporter.plan(source, earlier.recipe)
    place = _fs.home("cache") / "receipt" / artifact.sha256[:16]
    _fs.require_space(place, plan.reference_bytes)
    chunks = was.quality.chunks if was.quality else None
    if was.agreement:
        chunks = was.agreement.samples
    with _fs.scratch(place) as folder:
        now = prove(
            exporter, source, plan, artifact, folder, chunks, progress, eval_data, was.tuning
        )
    return now, differences(was, now)


@contextmanager
def float_model(artifact: str | Path, progress: Progress) -> Iterator[Path]:
    """The float model of an artifact's source, made again; gone when the block ends."""
    made = Artifact.open(artifact)
    source = _source_again(made.manifest, None, progress)
    exporter: Exporter = EXPORTERS.load(made.format)()
    with _fs.scratch(_fs.home("cache") / "float" / made.sha256[:16]) as folder:
        path = folder / f"model.{made.format}"
        yield exporter.reference(source, made.manifest.recipe, path, progress)


def _source_again(earlier: Manifest, model: str | Path | None, progress: Progress) -> ModelSource:
    """The model that a manifest was made from: ``model``, or where it was. Raises RecipeError."""
    if earlier.source["kind"] == "module":
        raise RecipeError(
            "the artifact was made from a module in a program's memory",
            hint="run that program again: equal inputs give equal bytes",
        )
    if model is None:
        source = resolve_source(earlier.source["spec"], revision=earlier.source["revision"])
    else:
        source = resolve_source(str(model))
    if source_hashes(source, progress) != earlier.source["sha256"]:
        raise RecipeError(f"{source.spec} is not the model that the manifest was made from")
    return source
