"""`edgekit verify`: parse, call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit import cross_format
from edgekit.artifact import Artifact, is_artifact
from edgekit.cli import show, show_cross, show_receipt
from edgekit.errors import ManifestError, UsageError
from edgekit.export_again import reprove
from edgekit.exporter import Progress
from edgekit.receipt import Receipt


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Measure the receipt again, against the source.")
@click.option(
    "--source", metavar="MODEL", help="With --deep: the source, where it is not in its old place."
)
@click.option(
    "--adapter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --deep: the LoRA folder that was merged in.",
)
@click.option(
    "--eval-data",
    type=click.Path(exists=True, path_type=Path),
    metavar="FILE|FOLDER",
    help="With --deep: the texts or images of your own that the export was measured on; with"
    " --against: those to compare on.",
)
@show_cross.options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    artifact: Path,
    deep: bool,
    source: str | None,
    adapter: Path | None,
    eval_data: Path | None,
    against: tuple[Path, ...],
    as_json: bool,
    **cross: Any,
) -> None:
    """Check every byte of ARTIFACT against its manifest.

    Exit code 0 when all is as it was exported, 5 when anything differs; with --deep also 5 when
    the receipt's figures do not hold, and 6 when the model does not do what its source does.
    With --against also 6 when it does not answer as the same model in another format does, within
    what both receipts allow: then the layer and the tensor are named where the two depart first.

    \b
    edgekit verify build/smollm2-q4
    edgekit verify build/smollm2-q4 --against build/smollm2-onnx
    edgekit verify build/vit-onnx --against build/vit-tflite --against build/vit-int8
    """
    if (source or adapter) and not deep:
        raise UsageError("--source and --adapter need --deep")
    if eval_data and not (deep or against):
        raise UsageError("--eval-data needs --deep or --against")
    if not against:
        for name, value in cross.items():
            if value:
                raise UsageError(f"--{name.replace('_', '-')} needs --against")
    opened = Artifact.open(artifact)
    with show.progress(quiet=as_json) as progress:
        _hash(opened, progress)
        for other in against:
            if is_artifact(other):
                _hash(Artifact.open(other), progress)
        found = show_cross.measured(artifact, against, eval_data, progress, **cross)
        again = None
        if deep:
            again = reprove(
                opened, model=source, adapter=adapter, eval_data=eval_data, progress=progress
            )
    files = opened.manifest.files
    body: dict[str, Any] = {
        "path": str(opened.path),
        "intact": True,
        "files": [vars(file) for file in files],
        "sha256": opened.sha256,
    }
    if not as_json:
        click.echo(f"{opened.path}: {len(files)} files, {show.size(opened.size_bytes)}, intact")
        for each in found:
            show_cross.table(each)
    if found:
        body["against"] = [each.to_dict() for each in found]
    if again is None:
        if as_json:
            show.as_json(body)
        return cross_format.check(found)
    now, differing = again
    was = Receipt.from_dict(opened.receipt)
    show_receipt.warn(now)
    if as_json:
        receipts = {"manifest": opened.receipt, "measured": now.to_dict()}
        show.as_json(body | {"receipts": receipts, "differences": differing})
    else:
        show.table(show_receipt.rows(now, earlier=was))
    if differing:
        raise ManifestError(
            f"the receipt in {opened.path} does not hold: {'; '.join(differing)}",
            hint="export the model again",
        )
    cross_format.check(found)


def _hash(artifact: Artifact, progress: Progress) -> None:
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress("verify", done, artifact.size_bytes)

    artifact.verify(on_bytes)
