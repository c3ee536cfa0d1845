"""`edgekit export`: parse, call, render."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from edgekit.artifact import Artifact
from edgekit.cli import export_tuned, lists, show, show_receipt
from edgekit.device_config import LOCAL
from edgekit.errors import UsageError
from edgekit.export_again import repeat
from edgekit.exporter import Admission, ExportOptions, ExportPlan, Progress, export, plan
from edgekit.receipt import Gates, Receipt
from edgekit.recipe import VIAS
from edgekit.registry import EXPORTERS
from edgekit.source import source as find_source

_RECIPE = ("bits", "overrides", "chunks")
_GATES = ("max_kld", "max_kld_p99", "min_top1", "min_cosine", "max_ppl_ratio", "min_speed_ratio")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def _bytes(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    """``120MB``, ``1.5GiB`` or a number of bytes."""
    if value is None:
        return None
    match = _SIZE.fullmatch(value.strip())
    if not match:
        raise click.BadParameter(f"{value!r} is no size such as 120MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _pairs(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    pairs = []
    for value in values:
        pattern, equals, kind = value.rpartition("=")
        if not equals or not pattern or not kind:
            raise click.BadParameter(f"{value!r} is not PATTERN=TYPE")
        pairs.append((pattern, kind))
    return tuple(pairs)


@click.command()
@click.argument("model", required=False)
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(EXPORTERS)),
    default="gguf",
    help="Form of the artifact (default gguf).",
)
@click.option(
    "--bits",
    type=int,
    help="Bits per weight: GGUF 2, 3, 4, 5, 6, 8 or 16 (default 4); ONNX and TFLite 4, 8, 16 or 32"
    " (default 8).",
)
@click.option(
    "--type",
    "type_",
    metavar="TYPE",
    help="Instead of --bits: a type such as Q4_K_M or static_wi8_ai8.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the artifact (default build/MODEL-TYPE).",
)
@click.option("--revision", help="Commit, tag or branch of a hub id.")
@click.option(
    "--calibration",
    metavar="FILE|FOLDER|builtin|none",
    help="Text for the importance matrix (default: builtin at 6 bits and below); ONNX, TFLite:"
    " text or images for the ranges of static activations.",
)
@click.option(
    "--chunks",
    type=click.IntRange(2, 10_000),
    help="Calibration chunks of 512 tokens (default 32); ONNX, TFLite: inputs (default 64).",
)
@click.option(
    "--override",
    "overrides",
    multiple=True,
    callback=_pairs,
    metavar="PATTERN=TYPE",
    help="Type of the tensors that a regular expression matches; may be repeated.",
)
@click.option(
    "--adapter",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="LoRA folder to merge into the model.",
)
@click.option("--keep-adapter", is_flag=True, help="Ship the adapter beside the model instead.")
@click.option(
    "--via",
    type=click.Choice(VIAS),
    help="ONNX: who writes the float graph instead of edgekit; optimum-cli gets an environment of"
    " its own, fetched once.",
)
@click.option("--no-fusion", is_flag=True, help="ONNX: leave the operators as they were traced.")
@click.option(
    "--from-manifest",
    type=click.Path(exists=True, path_type=Path),
    help="Repeat the export of this artifact, byte for byte.",
)
@click.option(
    "--no-receipt",
    is_flag=True,
    help='Do not measure the output against the float model: the manifest says "unproven".',
)
@click.option(
    "--eval-data",
    type=click.Path(exists=True, path_type=Path),
    metavar="FILE|FOLDER",
    help="ONNX, TFLite: measure it on these texts or images instead of the built-in ones; with"
    " classes (a folder for each, or JSON lines) the accuracy too.",
)
@click.option("--explain-loss", is_flag=True, help="ONNX: say what each layer loses.")
@click.option(
    "--against",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    metavar="ARTIFACT",
    help="Keep the export only if it answers as this artifact of the same model does, of whatever"
    " format, within what both receipts allow; else say where they depart first. Repeatable.",
)
@click.option("--max-kld", type=float, metavar="NATS", help="Gate: mean KL divergence.")
@click.option("--max-kld-p99", type=float, metavar="NATS", help="Gate: its 99th percentile.")
@click.option(
    "--min-top1", callback=lists.share, metavar="SHARE", help="Gate: same likeliest token or class."
)
@click.option(
    "--min-cosine", type=float, metavar="COSINE", help="Gate (ONNX, TFLite): mean cosine."
)
@click.option("--max-ppl-ratio", type=float, metavar="RATIO", help="Gate: perplexity ratio.")
@click.option("--max-size", callback=_bytes, metavar="SIZE", help="Gate: such as 120MB.")
@click.option(
    "--min-speed-ratio",
    type=float,
    metavar="RATIO",
    help="Gate: speed against the float model, the slower of decode and prefill.",
)
@click.option(
    "--optimize-for",
    "goal",
    type=click.Choice(["latency", "size", "accuracy"]),
    help="ONNX: try the sensible types and runtimes on this machine, and keep the best.",
)
@click.option(
    "--device",
    metavar="NAME",
    help="With --optimize-for: try them there, on a device of yours or an SSH host.",
)
@click.option("--dry-run", is_flag=True, help="Show sizes and types; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    model: str | None,
    format_: str,
    out: Path | None,
    revision: str | None,
    from_manifest: Path | None,
    dry_run: bool,
    as_json: bool,
    type_: str | None,
    keep_adapter: bool,
    via: str | None,
    no_fusion: bool,
    no_receipt: bool,
    eval_data: Path | None,
    goal: str | None,
    explain_loss: bool,
    against: tuple[Path, ...],
    device: str | None,
    **fields: Any,
) -> None:
    """Make a verified artifact from MODEL.

    MODEL is a Hugging Face folder, a hub id, a GGUF or ONNX file, a function in a Python file of
    your own that returns a torch module and its example inputs, or the built-in name smollm2-135m.

    \b
    edgekit export smollm2-135m --format gguf --bits 4
    edgekit export ./TinyLlama-1.1B --type Q5_K_M --calibration my-texts.txt
    edgekit export smollm2-135m --bits 4 --max-kld 0.1 --max-size 120MB
    edgekit export ./vit-tiny --format onnx --bits 8 --eval-data photos/
    edgekit export net.py:make --format onnx --optimize-for latency --device rpi5
    edgekit export smollm2-135m --format onnx --bits 4 --against build/smollm2-135m-q4_k_m
    """
    if device is not None and goal is None:
        raise UsageError(
            "--device says where --optimize-for tries its variants",
            hint=f"edgekit bench ARTIFACT --device {device} measures one there",
        )
    limits = {name: fields.pop(name) for name in _GATES}
    gates = Gates(max_size_bytes=fields.pop("max_size"), **limits)
    if from_manifest is not None:
        if (
            dry_run
            or type_
            or revision
            or keep_adapter
            or no_fusion
            or via
            or goal
            or any(fields[name] for name in _RECIPE)
        ):
            raise UsageError("--from-manifest takes the whole recipe from the manifest")
        if out is None:
            raise UsageError("--from-manifest needs --out")
        with show.progress(quiet=as_json) as progress:
            artifact = repeat(
                from_manifest,
                out=out,
                model=model,
                progress=progress,
                calibration=fields["calibration"],
                adapter=fields["adapter"],
                receipt=False if no_receipt else None,
                gates=gates,
                admit=_admission(against, eval_data, progress),
                eval_data=eval_data,
            )
        return _render(artifact, as_json)
    if model is None:
        raise UsageError(
            "which model?", hint="edgekit export smollm2-135m --bits 4 makes a small one"
        )
    if keep_adapter and not fields["adapter"]:
        raise UsageError("--keep-adapter needs --adapter")
    options = ExportOptions(
        type=type_,
        adapter_mode="keep" if keep_adapter else "merge",
        fusion="none" if no_fusion else "auto",
        via=via or "",
        **fields,
    )
    with show.progress(quiet=as_json) as progress:
        source = find_source(model, revision=revision, on_progress=partial(progress, "download"))
    if goal is not None:
        out = out or Path("build") / f"{_base_name(model)}-for-{goal}"
        taken = any((via, type_, fields["bits"], fields["overrides"], fields["adapter"]))
        if format_ != "onnx" or taken or dry_run or no_receipt:
            raise UsageError(
                "--optimize-for chooses the type of an ONNX file itself, and measures it",
                hint="--format onnx, without --bits, --type, --override, --adapter, --via,"
                " --dry-run and --no-receipt",
            )
        artifact = export_tuned.tuned(
            *(source, goal, out, options, gates),
            eval_data=eval_data,
            against=against,
            device=None if device == LOCAL else device,
            as_json=as_json,
        )
        return _render(artifact, as_json)
    found = plan(source, format_, options=options)
    for warning in found.warnings:
        show.warn(warning)
    if dry_run:
        return _render_plan(found, as_json)
    # ONNX and TFLite share the names of their types.
    between = "-tflite-" if format_ == "tflite" else "-"
    out = out or Path("build") / f"{_base_name(model)}{between}{found.recipe.type.lower()}"
    with show.progress(quiet=as_json) as progress:
        artifact = export(
            source,
            format_,
            out=out,
            progress=progress,
            receipt=not no_receipt,
            gates=gates,
            eval_data=eval_data,
            explain_loss=explain_loss,
            admit=_admission(against, eval_data, progress),
            **vars(options),
        )
    _render(artifact, as_json)


def _admission(
    against: tuple[Path, ...], data: Path | None, progress: Progress
) -> Admission | None:
    if not against:
        return None
    from edgekit import cross_format  # numpy comes with it, which no other export needs this early

    return cross_format.admission(against, data=data, progress=progress)


def _base_name(model: str) -> str:
    """``./TinyLlama-1.1B`` -> ``TinyLlama-1.1B``, ``org/name`` -> ``name``, ``x.gguf`` -> ``x``,
    ``net.py:make`` -> ``net``.
    """
    return re.sub(r"\.(gguf|onnx|py(:\w+)?)$", "", Path(model).resolve().name)


def _render_plan(found: ExportPlan, as_json: bool) -> None:
    if as_json:
        return show.as_json(
            {
                "recipe": found.recipe.to_dict(),
                "size_bytes": found.size_bytes,
                "scratch_bytes": found.scratch_bytes,
                "reference_bytes": found.reference_bytes,
                "bits_per_weight": found.bits_per_weight,
                "warnings": list(found.warnings),
                "tensors": [vars(tensor) for tensor in found.tensors],
            }
        )
    rows = [
        (
            tensor.name,
            " x ".join(str(n) for n in tensor.shape),
            tensor.source_type,
            tensor.type,
            "" if tensor.type == tensor.wanted else f"falls back from {tensor.wanted}",
            show.size(tensor.size_bytes),
        )
        for tensor in found.tensors
    ]
    show.table(rows, head=("tensor", "shape", "from", "to", "", "size"))
    click.echo(
        f"{found.recipe.type}: {show.size(found.size_bytes)}, {found.bits_per_weight:.2f} bits per"
        f" weight, {len(found.fallbacks)} of {len(rows)} tensors fall back; nothing was written"
    )


def _render(artifact: Artifact, as_json: bool) -> None:
    manifest = artifact.manifest
    receipt = Receipt.from_dict(manifest.receipt)
    show_receipt.warn(receipt)
    if as_json:
        return show.as_json(
            {
                "path": str(artifact.path),
                "sha256": artifact.sha256,
                "size_bytes": artifact.size_bytes,
                "recipe": manifest.recipe.to_dict(),
                "source": manifest.source,
                "details": manifest.details,
                "receipt": manifest.receipt,
            }
        )
    rows = [
        ("artifact", str(artifact.path)),
        ("model", f"{manifest.source['spec']} ({manifest.source['family']})"),
        ("type", manifest.recipe.type),
        ("size", show.size(artifact.size_bytes)),
        *_facts(manifest.details),
        ("sha256", artifact.sha256),
        *show_receipt.rows(receipt),
    ]
    show.table(rows)


def _facts(details: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the exporter says of its file, as far as this verb knows how to show it."""
    if "bits_per_weight" in details:
        yield "bits per weight", f"{details['bits_per_weight']:.2f}"
    if "types" in details:
        yield "tensors", ", ".join(f"{count} {kind}" for kind, count in details["types"].items())
    if matrix := details.get("imatrix"):
        yield "calibrated on", f"{matrix['text']}, {matrix['chunks']} chunks"
    if passes := {name: count for name, count in details.get("passes", {}).items() if count}:
        yield "fused", ", ".join(f"{count} {name}" for name, count in passes.items())
    if details.get("requantized_from"):
        yield "re-quantized from", details["requantized_from"]
    if details.get("fallbacks"):
        yield "fallbacks", _fallbacks(details["fallbacks"])


def _fallbacks(rows: list[dict[str, str]]) -> str:
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row["wanted"], row["type"])
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{n} tensors {was} -> {now}" for (was, now), n in counts.items())
