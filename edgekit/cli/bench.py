"""`edgekit bench`: parse, call, render."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgekit import bench_files, remote
from edgekit.bench import bench, bench_against
from edgekit.bench_verdict import profiles
from edgekit.cli import bench_latency, show, show_bench
from edgekit.cli.lists import numbers
from edgekit.compare import gate
from edgekit.errors import EdgekitError, UsageError
from edgekit.report import BenchReport


def _numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """``1,2,4``; a lone 0 means none of it, as in llama-bench."""
    found = numbers(context, parameter, value)
    return () if found == (0,) and parameter.name in ("prompts", "answers") else found


def _words(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    return None if value is None else tuple(value.split(","))


def _share(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """``5%`` -> 0.05."""
    if value is None:
        return None
    try:
        share = float(value.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise click.BadParameter(f"{value!r} is no share such as 5%")
    return share


def _list(*names: str, text: str, read: Any = _numbers) -> Callable[[Any], Any]:
    return click.option(*names, callback=read, metavar="LIST", help=text)


@click.command()
@click.argument("models", nargs=-1, metavar="MODEL...")
@_list("-t", "--threads", text="CPU threads [default: what edgekit.load would take].")
@_list("-p", "--prompt", "prompts", text="Tokens to read; 0 for none [default: 512].")
@_list("-n", "--answer", "answers", text="Tokens to generate; 0 for none [default: 128].")
@_list("-d", "--depth", "depths", text="Tokens that stand before the answer [default: 0].")
@_list("--kv", "kv_types", text="Types of the KV cache [default: f16].", read=_words)
@_list("--batch", "batches", text="Sequences decoded side by side [default: 1].")
@_list("--runtime", "runtimes", text="ONNX: the engines [default: the artifact's].", read=_words)
@click.option(
    "-r", "--repetitions", type=int, help="Rounds, in which all settings take turns [default: 5]."
)
@click.option(
    "--n-batch", type=int, help="Tokens of a prompt that are read at once [default: 512]."
)
@click.option("--no-flash-attention", is_flag=True, help="Without the fused attention kernels.")
@click.option("--no-session", is_flag=True, help="Only the engine's own loops.")
@click.option("--no-probe", is_flag=True, help="No verdict: do not measure the machine's limits.")
@click.option("--profile", is_flag=True, help="Show where the time goes, by operator and layer.")
@click.option(
    "--out",
    "outs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Write the report here: .json, .csv, .md, .png or .svg. Repeatable.",
)
@click.option(
    "--compare",
    "sides",
    nargs=2,
    metavar="A B",
    help="Is B slower than A? Each is a model, or an earlier report (.json).",
)
@click.option(
    "--fail-if-slower",
    "limit",
    callback=_share,
    metavar="PERCENT",
    help="With --compare: exit code 6 if B is slower by more, such as 5%.",
)
@click.option(
    "--device",
    "devices",
    callback=_words,
    metavar="NAME,...",
    help="Measure there: devices of yours, SSH hosts, or local. Several make one table.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    models: tuple[str, ...],
    outs: tuple[Path, ...],
    sides: tuple[str, str] | None,
    limit: float | None,
    as_json: bool,
    devices: tuple[str, ...] | None,
    no_probe: bool,
    no_session: bool,
    profile: bool,
    no_flash_attention: bool,
    **lists: Any,
) -> None:
    """Measure load times, speeds and memory of MODELs, and say what bounds them.

    MODEL is an artifact's folder, a GGUF, an ONNX or a TFLite file. Lists such as `-t 1,2 -p
    32,512` measure every combination. Models without tokens take --threads, --batch, --runtime and
    --repetitions; their figures are latencies.
    """
    for out in outs:
        bench_files.check(out)
    sweep = {name: value for name, value in lists.items() if value is not None}
    if no_session:
        sweep["sessions"] = False
    if no_flash_attention:
        sweep["flash_attention"] = False
    if devices is not None:
        if sides and len(devices) > 1:
            raise UsageError(
                "--compare looks at one device", hint=f"--device {devices[0]}, then the others"
            )
        if not sides and bench_latency.is_wanted(models):
            how = {"probe": not no_probe, "profile": profile}
            return bench_latency.measure_on(devices, models, sweep, outs, as_json=as_json, **how)
        if profile:
            raise UsageError(
                "--profile looks into the engine of this machine, and --device measures elsewhere",
                hint="run it on the device itself: what devices setup brought has edgekit bench",
            )
        if not sides:
            if limit is not None:
                raise UsageError("--fail-if-slower needs --compare A B")
            return _on_devices(devices, models, sweep | {"probe": not no_probe}, outs, as_json)
    if sides:
        if models or profile:
            raise UsageError("--compare takes its two sides alone: leave out models and --profile")
        return _compare(sides, devices[0] if devices else None, sweep, outs, limit, as_json)
    if limit is not None:
        raise UsageError("--fail-if-slower needs --compare A B")
    if not models:
        raise UsageError("which model?", hint="edgekit bench build/smollm2-q4")
    if bench_latency.is_wanted(models):
        return bench_latency.measure(
            models, sweep, outs, probe=not no_probe, profile=profile, as_json=as_json
        )
    if "runtimes" in sweep:
        raise UsageError("--runtime compares engines for ONNX files: a GGUF has one")
    with show.progress(quiet=as_json) as progress:
        found = bench(*models, probe=not no_probe, progress=progress, **sweep)
        parts = profiles(models, found, progress) if profile else []
    if not as_json:
        show_bench.report(found)
        for part in parts:
            show_bench.profile(part)
    elif profile:
        body = {"report": found.to_dict(), "profiles": [part.to_dict() for part in parts]}
        show.as_json(body)
    else:
        show.as_json(found.to_dict())
    _write(found, outs)
    for number, part in enumerate(parts, 1):
        for out in outs:
            bench_files.draw_profile(part, out, number)


def _on_devices(
    names: tuple[str, ...],
    models: tuple[str, ...],
    options: dict[str, Any],
    outs: tuple[Path, ...],
    as_json: bool,
) -> None:
    if not models:
        raise UsageError("which model?", hint="edgekit bench build/smollm2-q4 --device rpi5")
    with show.progress_of_each(names, quiet=as_json) as progress:
        found = remote.bench_devices(names, *models, progress=progress, **options)
    reports = {name: each for name, each in found.items() if isinstance(each, BenchReport)}
    errors = {name: each for name, each in found.items() if isinstance(each, EdgekitError)}
    if len(names) == 1 and errors:
        raise errors[names[0]]
    if as_json and len(names) == 1:
        show.as_json(reports[names[0]].to_dict())
    elif as_json:
        body = {name: report.to_dict() for name, report in reports.items()}
        show.as_json(show_bench.answers(body, errors))
    elif len(names) == 1:
        show_bench.report(reports[names[0]])
    else:
        show_bench.devices(reports)
    for name, report in reports.items():
        _write(report, show_bench.files_of(outs, name, names))
    for name, error in errors.items():
        show.warn(f"{name}: {error.message}")
    for error in errors.values():
        raise error


def _compare(
    sides: tuple[str, str],
    device: str | None,
    sweep: dict[str, Any],
    outs: tuple[Path, ...],
    limit: float | None,
    as_json: bool,
) -> None:
    with show.progress(quiet=as_json) as progress:
        found, measured = bench_against(*sides, device=device, progress=progress, **sweep)
    if measured is None and outs:
        raise UsageError("--out writes what is measured, and two reports are not")
    if as_json:
        report = measured and measured.to_dict()
        show.as_json({"comparison": found.to_dict(), "report": report})
    else:
        show_bench.comparison(found)
    if measured is not None:
        _write(measured, outs)
    if limit is not None:
        for sentence in gate(found, limit):
            show.warn(sentence)


def _write(report: BenchReport, outs: tuple[Path, ...]) -> None:
    for out in outs:
        bench_files.write(report, out)
