"""`edgekit eval --sensitivity`: its options, and how its report is shown. Measures nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from edgekit import evaluate, plot, sensitivity_plot
from edgekit.cli import show
from edgekit.cli.lists import numbers
from edgekit.intervals import Interval
from edgekit.sensitivity import sensitivity
from edgekit.sensitivity_report import InputRow, ModelRows, PartRow, Report

# The options that only --sensitivity knows.
NAMES = ("bits", "layers", "text_bytes")
_WORST = 5


_OPTIONS = (
    click.option(
        "--sensitivity",
        "sensitivity_",
        is_flag=True,
        help="Instead: what each of several models loses when it is quantized, and where.",
    ),
    click.option(
        "--bits",
        callback=numbers,
        metavar="N,N,...",
        help="With --sensitivity: widths, as export's --bits (default 8,6,5,4,3,2).",
    ),
    click.option(
        "--layers",
        type=click.IntRange(min=0),
        help="With --sensitivity: layers to quantize alone (default 8); 0: no parts at all.",
    ),
    click.option(
        "--text-bytes",
        type=click.IntRange(min=1),
        help="With --sensitivity: how much of the text all models read (default 32768).",
    ),
)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of this file."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run(
    models: Sequence[Path],
    *,
    text: Path | None,
    plot_file: Path | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Measure and show; ``fields`` as in ``sensitivity``, None for its default."""
    if plot_file is not None:
        plot.check_form(plot_file)
    given = {name: value for name, value in fields.items() if value is not None}
    with show.progress(quiet=as_json) as progress:
        found = sensitivity(
            [str(model) for model in models],
            evaluate.read_text(text),
            progress=progress,
            **given,
        )
    report(found, as_json)
    # The figures are out already, should there be no matplotlib or no room for the file.
    if plot_file is not None:
        for written in sensitivity_plot.draw(found, plot_file):
            click.echo(f"drew {written}", err=True)


def report(found: Report, as_json: bool) -> None:
    """The answer first, then the figures that it comes from."""
    if as_json:
        return show.as_json(found.to_dict())
    for answer in found.answers:
        click.echo(answer.sentence)
    if found.answers:
        click.echo()
    _widths(found)
    for model in found.models:
        if model.kinds:
            click.echo()
            _parts(model, found.part_bits)
        if model.inputs:
            click.echo()
            _inputs(model)
    for note in found.notes:
        show.warn(note)


def _widths(found: Report) -> None:
    rows = [
        (
            model.name,
            str(row.bits),
            row.type,
            f"{row.bits_per_weight:.2f}",
            _figure(row.mean_kl),
            _figure(row.kl_per_byte),
            f"{row.perplexity_ratio.value:.3f} ± {_half(row.perplexity_ratio):.3f}",
            f"{row.top1.value:.1%}",
        )
        for model in found.models
        for row in model.bits
    ]
    show.table(
        rows,
        head=(
            *("model", "bits", "type", "bits/weight", "KL (nats/token)", "KL (bits/byte)"),
            *("perplexity ratio", "same top-1"),
        ),
    )
    for model in found.models:
        click.echo(
            f"{model.name}: perplexity of the floats {model.reference_perplexity:.2f},"
            f" {model.reference_bits_per_byte:.3f} bits per byte,"
            f" {model.bytes_per_token:.2f} bytes per token"
        )


def _half(interval: Interval) -> float:
    """Half the width of an interval, which may be a little lopsided."""
    return (interval.high - interval.low) / 2


def _figure(interval: Interval) -> str:
    return f"{interval.value:.3g} ± {_half(interval):.2g}"


def _parts(model: ModelRows, bits: int) -> None:
    """Kinds and layers, the one that hurts most first."""
    rows = [*_part_rows(model.kinds, ""), *_part_rows(model.layers, "layer ")]
    show.table(
        rows,
        head=(
            *(f"{model.name}, alone at {bits} bits", "type", "of the weights"),
            "KL (nats/token)",
        ),
    )


def _part_rows(rows: Sequence[PartRow], prefix: str) -> list[tuple[str, ...]]:
    return [
        (
            f"{prefix}{row.name}",
            "/".join(row.types),
            f"{row.share_of_weights:.1%}",
            _figure(row.mean_kl),
        )
        for row in sorted(rows, key=lambda row: -row.mean_kl.value)
    ]


def _inputs(model: ModelRows) -> None:
    """The inputs that spread furthest; matrices with the same input share a row."""
    kinds: defaultdict[tuple[int | None, float, float], list[InputRow]] = defaultdict(list)
    for row in model.inputs:
        kinds[row.layer, row.kurtosis, row.max_to_median].append(row)
    shared = sorted(kinds.values(), key=lambda rows: -rows[0].kurtosis)
    show.table(
        [
            (
                ", ".join(row.kind for row in rows),
                "-" if rows[0].layer is None else str(rows[0].layer),
                f"{rows[0].kurtosis:.1f}",
                f"{rows[0].max_to_median:.1f}",
            )
            for rows in shared[:_WORST]
        ],
        head=(f"{model.name}, widest inputs", "layer", "kurtosis", "largest channel / median"),
    )
