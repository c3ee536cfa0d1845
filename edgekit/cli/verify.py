"""`edgekit verify`: parse, call, render."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.artifact import Artifact
from edgekit.cli import show


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(artifact: Path, as_json: bool) -> None:
    """Check every byte of ARTIFACT against its manifest.

    Exit code 0 when all is as it was exported, 5 when anything differs.
    """
    opened = Artifact.open(artifact)
    done = 0
    with show.progress(quiet=as_json) as progress:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            progress("verify", done, opened.size_bytes)

        opened.verify(on_bytes)
    files = opened.manifest.files
    if as_json:
        show.as_json(
            {
                "path": str(opened.path),
                "intact": True,
                "files": [vars(file) for file in files],
                "sha256": opened.sha256,
            }
        )
    else:
        click.echo(f"{opened.path}: {len(files)} files, {show.size(opened.size_bytes)}, intact")
