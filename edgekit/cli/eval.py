"""`edgekit eval`: parse, call, render."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from edgekit import agreement, evaluate, plot, remote
from edgekit.cli import (
    show,
    show_agreement,
    show_divergence,
    show_needle,
    show_sensitivity,
    show_tasks,
)
from edgekit.errors import UsageError
from edgekit.target import open_target

_N_CTX = 512
# The answers are the same on every machine; only the wait differs.
_HERE = {"device": "leave out --device: a model's answers do not depend on where it runs"}


@click.command()
@click.argument("models", metavar="ARTIFACT", nargs=-1, required=True, type=Path)
@click.option(
    "--against",
    type=Path,
    metavar="REF",
    help="Reference with the same tokenizer, such as the model's F16 file: adds KL divergence.",
)
@show_agreement.options
@click.option("--text", type=Path, metavar="FILE", help="UTF-8 text (default: edgekit's own).")
@show_tasks.options
@show_needle.options
@show_sensitivity.options
@click.option(
    "--ctx",
    "n_ctx",
    type=click.IntRange(min=evaluate.MIN_N_CTX),
    help="Tokens of a chunk (default 512), or of a question with its answer (default 2048).",
)
@click.option("--chunks", type=click.IntRange(min=1), help="Chunks to read (default: all).")
@click.option("--threads", type=click.IntRange(min=1), help="Default: what was measured fastest.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the KL divergence, the heat map of --needle or the parts of --sensitivity"
    " (.png or .svg).",
)
@click.option("--device", metavar="NAME", help="Evaluate there: a device of yours, an SSH host.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    models: tuple[Path, ...],
    against: Path | None,
    text: Path | None,
    n_ctx: int | None,
    chunks: int | None,
    threads: int | None,
    plot_file: Path | None,
    device: str | None,
    as_json: bool,
    task_file: Path | None,
    needle_: bool,
    sensitivity_: bool,
    **fields: Any,
) -> None:
    """Measure how well ARTIFACT predicts a text, alone or against a reference.

    ARTIFACT and REF are artifacts' folders or GGUF files. An ARTIFACT that is no language model is
    held against REF, of whatever format, or against the float model that it was made of: do both
    answer alike, and where do they part. With --sensitivity they are models to
    quantize: GGUF files, Hugging Face folders, hub ids or the built-in name smollm2-135m.

    \b
    edgekit eval build/smollm2-q4 --text my-text.txt
    edgekit eval build/smollm2-q4 --against build/smollm2-f16 --plot kl.png
    edgekit eval build/smollm2-q4 --tasks questions.jsonl --shots 5
    edgekit eval build/smollm2-q4 --needle --lengths 1024,4096 --plot needle.png
    edgekit eval build/vit-int8 --explain-loss
    edgekit eval build/vit-int8 --against build/vit-f32 --eval-data photos/
    edgekit eval --sensitivity ./Llama-2-7b ./Llama-3-8B --bits 8,4,3 --plot loss.png
    """
    widths = {name: fields.pop(name) for name in show_sensitivity.NAMES}
    tensors = {name: fields.pop(name) for name in show_agreement.NAMES}
    asked = {name: value or None for name, value in tensors.items()}
    if sensitivity_:
        other = {"against": against, "chunks": chunks, "tasks": task_file, "device": device}
        other |= fields | asked
        _refuse("with --sensitivity", other | {"needle": needle_ or None}, _HERE)
        return show_sensitivity.run(
            models,
            text=text,
            plot_file=plot_file,
            as_json=as_json,
            threads=threads,
            n_ctx=n_ctx,
            **widths,
        )
    _refuse("without --sensitivity", widths)
    if len(models) > 1:
        raise UsageError(
            f"this takes one model, not {len(models)}",
            hint="edgekit eval ARTIFACT --against REF compares two; so does --sensitivity",
        )
    if agreement.is_of_tensors(models[0]):
        other = fields | {"text": text, "ctx": n_ctx, "chunks": chunks, "tasks": task_file}
        other |= {"plot": plot_file, "device": device, "needle": needle_ or None}
        _refuse("for a model of tensors", other)
        return show_agreement.run(models[0], against, threads=threads, as_json=as_json, **tensors)
    _refuse("for a language model", asked)
    shared: dict[str, Any] = {"against": against, "threads": threads, "as_json": as_json}
    tasks = {name: fields.pop(name) for name in show_tasks.NAMES}
    needle = {name: fields.pop(name) for name in show_needle.NAMES}
    if task_file is not None:
        other = {"needle": needle_ or None, "text": text, "chunks": chunks, "plot": plot_file}
        other["device"] = device
        _refuse("with --tasks", needle | other, _HERE)
        return show_tasks.run(models[0], task_file, n_ctx=n_ctx, **tasks, **shared)
    if needle_:
        other = {"ctx": n_ctx, "chunks": chunks, "device": device}
        _refuse("with --needle", tasks | other, _HERE)
        return show_needle.run(models[0], text=text, plot_file=plot_file, **needle, **shared)
    _refuse("without --tasks", tasks)
    _refuse("without --needle", needle)
    n_ctx = n_ctx or _N_CTX
    if plot_file is not None:
        if against is None:
            raise UsageError("--plot draws KL divergence", hint="add --against REF")
        plot.check_form(plot_file)
    body = evaluate.read_text(text)
    facts = {"model": str(models[0]), "text": "builtin" if text is None else str(text)}
    if device is not None:
        facts["device"] = device
    how: dict[str, Any] = {"n_ctx": n_ctx, "chunks": chunks, "threads": threads}
    with show.progress(quiet=as_json) as progress, ExitStack() as opened:
        target = None if device is None else opened.enter_context(open_target(device))
        how["progress"] = progress
        if against is None:
            alone = (
                evaluate.perplexity(models[0], body, **how)
                if target is None
                else remote.perplexity_on(target, models[0], body, **how)
            )
        else:
            found = (
                evaluate.compare(models[0], against, body, **how)
                if target is None
                else remote.compare_on(target, models[0], against, body, **how)
            )
    if against is None:
        return show_divergence.perplexity(alone, facts, as_json)
    show_divergence.divergence(found, facts | {"against": str(against)}, as_json)
    # The figures are out already, should there be no matplotlib or no room for the file.
    if plot_file is not None:
        evaluate.draw(found, plot_file)


def _refuse(when: str, options: dict[str, Any], hints: Mapping[str, str] | None = None) -> None:
    """An option that would be ignored is an error: somebody expects something of it."""
    for name, value in options.items():
        if value is not None:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} means nothing {when}", hint=(hints or {}).get(name))
