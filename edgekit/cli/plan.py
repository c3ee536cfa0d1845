"""`edgekit plan`: parse, call, render."""

from __future__ import annotations

import click

from edgekit.cli import show, show_plan
from edgekit.errors import DoesNotFitError, UsageError
from edgekit.plan import plan
from edgekit.plan_validate import validate


@click.command()
@click.argument("model", required=False)
@click.option("--device", metavar="NAME", help="A profile (edgekit devices list), or your device.")
@click.option("--bits", type=int, help="Bits per weight [default: the file's own, else 4].")
@click.option("--type", "file_type", metavar="TYPE", help="A GGUF type instead of --bits.")
@click.option("--context", type=int, help="Tokens [default: the model's own, at most 4096].")
@click.option("--batch", type=int, default=1, help="Sequences decoded side by side [default: 1].")
@click.option("--kv", "kv_type", default="f16", help="Type of the KV cache [default: f16].")
@click.option("-t", "--threads", type=int, help="CPU threads [default: the profile's].")
@click.option("--n-batch", type=int, default=512, help="Prompt tokens at once [default: 512].")
@click.option("--validate", "validating", is_flag=True, help="How far off published rows are.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    model: str | None,
    device: str | None,
    bits: int | None,
    file_type: str | None,
    context: int | None,
    batch: int,
    kv_type: str,
    threads: int | None,
    n_batch: int,
    validating: bool,
    as_json: bool,
) -> None:
    """Does MODEL fit a device, and how fast will it be? Needs neither of them.

    MODEL is an artifact, a GGUF file (its beginning is enough), a folder with config.json, or a
    hub id. Exit code 8: it does not fit.
    """
    if validating:
        if model or device:
            raise UsageError("--validate takes no model and no device")
        found = validate()
        return show.as_json(found.to_dict()) if as_json else show_plan.validation(found)
    if model is None or device is None:
        raise UsageError("which model, and which device?", hint="edgekit plan MODEL --device rpi5")
    made = plan(
        model,
        device,
        bits=bits,
        type=file_type,
        context=context,
        batch=batch,
        kv_type=kv_type,
        threads=threads,
        n_batch=n_batch,
    )
    if as_json:
        show.as_json(made.to_dict())
    else:
        show_plan.plan(made)
    if not made.fits:
        better = made.recommended
        kind = "" if better.type == made.type else f"--type {better.type} "
        raise DoesNotFitError(
            f"{made.model} as {made.type} with {made.context} tokens does not fit {made.title}",
            hint=f"{kind}--context {better.context} would"
            if better.type and better.context
            else "take a smaller model, or a larger board",
        )
