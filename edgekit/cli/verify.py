"""`edgekit verify`: parse, call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekit.artifact import Artifact
from edgekit.cli import show, show_receipt
from edgekit.errors import ManifestError, UsageError
from edgekit.exporter import Progress, reprove
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
    help="With --deep: the texts or images of your own that the export was measured on.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    artifact: Path,
    deep: bool,
    source: str | None,
    adapter: Path | None,
    eval_data: Path | None,
    as_json: bool,
) -> None:
    """Check every byte of ARTIFACT against its manifest.

    Exit code 0 when all is as it was exported, 5 when anything differs; with --deep also 5 when
    the receipt's figures do not hold, and 6 when the model does not do what its source does.
    """
    if (source or adapter or eval_data) and not deep:
        raise UsageError("--source, --adapter and --eval-data need --deep")
    opened = Artifact.open(artifact)
    with show.progress(quiet=as_json) as progress:
        _hash(opened, progress)
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
    if again is None:
        return show.as_json(body) if as_json else None
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


def _hash(artifact: Artifact, progress: Progress) -> None:
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress("verify", done, artifact.size_bytes)

    artifact.verify(on_bytes)
